"""SAEs and transcoders of sae_lens as a basis; the only reader of their attributes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.bases.base import Basis, FeatureRows, Features
from workbench.bases.sitenames import named_site
from workbench.core.errors import InvalidInputError
from workbench.core.precision import precise

_THRESHOLDED = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_PER_FEATURE = ("standard", "gated", "transcoder", "skip_transcoder", *_THRESHOLDED)
"""Architectures of which a feature's activation does not depend on the other features."""
_COMPETING = ("topk", "abstopk", "workbench_groupmax", "workbench_topk_transcoder")
_LINEAR = (*_PER_FEATURE, *_COMPETING, "matching_pursuit", "batchtopk", "matryoshka_batchtopk")
"""Architectures whose decoder is known: rows and a bias."""
_STATE = ("ln_mu", "ln_std", "x_norm_coeff", "d_head", "reshape_fn_in")
"""What sae_lens keeps on the SAE from `encode` to `decode`."""
_SIZES = "_sizes_of_tokens"
_WEIGHTS = ("W_dec", "W_enc", "W_skip", "b_dec", "b_enc", "b_gate", "b_mag", "r_mag", "threshold")


@runtime_checkable
class SAELike(Protocol):
    """An SAE or transcoder in the sae_lens form: of sae_lens, or an object with the same attributes.

    `encode` and `W_dec` are enough to edit with; `b_dec` is needed to reconstruct, and `cfg` says what it was made for.
    """

    W_dec: Any  # a Parameter in sae_lens and a Tensor elsewhere

    def encode(self, x: Any) -> Any:
        """Feature activations."""
        ...


AnySAE = SAELike | Basis
"""What takes an SAE takes any basis."""


def as_basis(sae: object) -> Basis:
    """An SAE as a basis; a basis is returned as it is.

    Raises:
        InvalidInputError: for anything else, and for the temporal SAE of sae_lens.
    """
    return sae if isinstance(sae, Basis) else SAEBasis.of(sae)


@dataclass(frozen=True, eq=False, kw_only=True)
class SAEBasis(Basis):
    """The features of an SAE or transcoder of any sae_lens architecture and normalisation.

    Computed without the module state of sae_lens, in the dtype of the weights, which are read at every call: an SAE
    that is trained further or moved stays right. Norms and thresholds are compared in fp32. The SAE may be on another
    device than the activations; decoder rows are where the SAE is.

    Attributes:
        sae: the SAE.
    """

    sae: Any  # SAELike; what else it has depends on the architecture of sae_lens

    @classmethod
    def of(cls, sae: object) -> SAEBasis:
        """Of any sae_lens SAE or transcoder.

        Raises:
            InvalidInputError: for anything else, and for the temporal SAE of sae_lens.
        """
        W_dec = getattr(sae, "W_dec", None)
        if not isinstance(W_dec, Tensor) or W_dec.ndim != 2 or not hasattr(sae, "encode"):
            raise InvalidInputError(
                f"{type(sae).__name__} is not an SAE: it needs encode and W_dec (d_sae, d_out). Load one with "
                "load_sae, or name a basis, as wb.basis('neurons', model, 'resid_post.3')."
            )
        config = getattr(sae, "cfg", None)
        kind = "unknown" if config is None or not hasattr(config, "architecture") else str(config.architecture())
        if kind == "temporal":
            raise InvalidInputError(
                "A temporal SAE of sae_lens predicts each token from those before it, so its features are no summands "
                "of one token. Give an SAE of another kind."
            )
        metadata = _metadata(config)
        site, out = _site(metadata, ""), _site(metadata, "_out")
        d_sae, d_out = W_dec.shape
        d_in = getattr(config, "d_in", getattr(sae, "W_enc", W_dec.T).shape[0])
        return cls(
            name=kind, architecture=kind, d_in=int(d_in), d_sae=d_sae, d_out=d_out, site=site,
            site_out=out or (None if "transcoder" in kind else site),
            model_fingerprint=metadata.get("model_fingerprint"),
            normalisation=str(getattr(config, "normalize_activations", "none")),
            transcodes="transcoder" in kind or (out or site) != site, sae=sae,
        )  # fmt: skip

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """All feature activations.

        Right after it, `decode` needs no `x`: the activations keep the sizes of their tokens until they are copied.
        """
        if self.architecture in (*_PER_FEATURE, *_COMPETING):
            acts = precise(self._activate(self._input(x), None)).to(x.device)
        else:
            acts = self._encode_by_itself(x)
        if self.normalises:
            setattr(acts, _SIZES, (self.scale(x), self._mean(x)))
        return acts

    def encode_some(self, x: Float[Tensor, "n d_in"], features: Features) -> Float[Tensor, "n f"]:
        """Activations of some features; where they do not compete only their columns of the encoder are used."""
        if self.architecture not in _PER_FEATURE:
            return self.encode(x)[:, torch.as_tensor(features, device=x.device)]
        some = torch.as_tensor(features, device=self.sae.W_dec.device)
        return precise(self._activate(self._input(x), some)).to(x.device)

    def decode(
        self, acts: Float[Tensor, "n d_sae"], x: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        """The reconstruction from feature activations.

        Args:
            acts: feature activations, changed or not.
            x: what they were encoded from. Needed where the SAE normalises, but right after `encode`; a transcoder adds
                its skip connection only if it is given.

        Raises:
            InvalidInputError: if the SAE normalises, `x` is missing and the activations were copied.
        """
        out = self._decoded(acts)
        if x is not None:
            out = self.rescaled(out, x) + self._mean(x) if self.normalises else out
            return out if self._skip is None else out + self._skipped(x)
        if not self.normalises:
            return out
        if (sizes := getattr(acts, _SIZES, None)) is None:
            raise InvalidInputError(
                f"decode(acts): this SAE normalises each token ({self.normalisation}), and copied activations do not "
                "say how large their tokens were. Give what was encoded: decode(acts, x)."
            )
        scale, mean = sizes
        return out * scale + mean

    def rows(self, features: FeatureRows | None = None) -> Float[Tensor, "*f d_out"]:
        """What one unit of each feature's coefficient adds; where the SAE is."""
        W_dec = self.sae.W_dec.detach()
        rows = precise(W_dec if features is None else W_dec[torch.as_tensor(features, device=W_dec.device)])
        return rows / _norms(rows)[..., None] if self._rescales else rows

    @property
    def bias(self) -> Float[Tensor, " d_out"]:
        """What the decoder adds: `b_dec`, which matching pursuit adds only where it subtracted it.

        Raises:
            InvalidInputError: if the SAE has none.
        """
        if not isinstance(b_dec := getattr(self.sae, "b_dec", None), Tensor):
            raise InvalidInputError(
                f"{type(self.sae).__name__} has no b_dec, so it can't reconstruct. Give it a b_dec (d_out), zeros if "
                "its decoder adds none."
            )
        left_out = self.architecture == "matching_pursuit" and not self.sae.cfg.apply_b_dec_to_input
        bias = precise(b_dec.detach())
        return torch.zeros_like(bias) if left_out else bias

    def encoder_directions(self) -> Float[Tensor, "d_sae d_in"]:
        """What each feature reads: the columns of the encoder, in fp32.

        Raises:
            InvalidInputError: if the SAE has no W_enc.
        """
        if not isinstance(W_enc := getattr(self.sae, "W_enc", None), Tensor):
            raise InvalidInputError(f"{type(self.sae).__name__} has no W_enc (d_in, d_sae). Use its decoder rows.")
        return precise(W_enc.detach().T)

    def scale(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n 1"]:
        """By what the decoder's output is multiplied to be in the units of `x`, in fp32."""
        if not self.normalises:
            return super().scale(x)
        x = precise(x)
        if self.normalisation == "constant_norm_rescale":
            return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)

    def constant(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """The reconstruction without any feature: the bias in the scale of each token, its mean, a skip connection."""
        scale = self.scale(x)
        out = self.bias.to(scale) * scale
        out = out + self._mean(x) if self.normalises else out
        return out if self._skip is None else out + self._skipped(x)

    @property
    def skip(self) -> Float[Tensor, "d_out d_in"] | None:
        """The linear path of a skip transcoder."""
        return None if self._skip is None else precise(self._skip.detach())

    def reading(self, x: Float[Tensor, "n d_in"], features: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """The column of the encoder of each token's feature, in the units of `x`; zero where it is not active.

        Raises:
            InvalidInputError: if the SAE normalises and its encoder is only known as code.
        """
        if self.architecture not in (*_PER_FEATURE, *_COMPETING):
            return super().reading(x, features)
        leaf, ids = self._input(x).detach().clone().requires_grad_(True), features.to(self.sae.W_dec.device)
        with torch.enable_grad():
            if self.architecture in _PER_FEATURE:
                some, column = torch.unique(ids, return_inverse=True)
                acts = self._activate(leaf, some).gather(1, column[:, None])
            else:
                acts = self._activate(leaf, None).gather(1, ids[:, None])
            slope = precise(torch.autograd.grad(acts.sum(), leaf)[0]).to(x.device)
        x = precise(x)
        if self.normalisation == "constant_norm_rescale":
            return slope * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))
        if self.normalisation == "layer_norm":
            slope = slope - slope.mean(-1, keepdim=True)
            return slope / ((x - self._mean(x)).std(-1, keepdim=True) + 1e-5)
        return slope

    @property
    def normalises(self) -> bool:
        """Whether the output is scaled back to the size of each token; a transcoder of sae_lens never does that."""
        return self.normalisation in ("constant_norm_rescale", "layer_norm") and "transcoder" not in self.architecture

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of sae_lens: names of sites, how it was trained."""
        return _metadata(getattr(self.sae, "cfg", None))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.sae.W_dec.dtype

    @property
    def fingerprint(self) -> str:
        """Changes with any weight, bfloat16 rounding apart, and with how they are used; 12 hexadecimal digits."""
        config = getattr(self.sae, "cfg", None)
        used = {name: getattr(config, name, None) for name in ("k", "apply_b_dec_to_input")}
        digest = hashlib.sha256(f"{self.architecture} {self.normalisation} {self._rescales} {used}".encode())
        for name in _WEIGHTS:
            if isinstance(weight := getattr(self.sae, name, None), Tensor):
                digest.update(name.encode())
                digest.update(weight.detach().cpu().bfloat16().contiguous().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:12]

    @functools.cached_property
    def _rescales(self) -> bool:
        return bool(getattr(getattr(self.sae, "cfg", None), "rescale_acts_by_decoder_norm", False))

    @property
    def _skip(self) -> Tensor | None:
        return getattr(self.sae, "W_skip", None)

    def _skipped(self, x: Tensor) -> Tensor:
        skip = self.sae.W_skip.detach()
        return precise(x.to(skip) @ skip.T).to(x.device)

    def _mean(self, x: Tensor) -> Tensor:
        """The mean of each token, which `layer_norm` takes off and adds again."""
        x = precise(x)
        return x.mean(-1, keepdim=True) if self.normalisation == "layer_norm" else torch.zeros_like(x[:, :1])

    def _input(self, x: Tensor) -> Tensor:
        W_enc, x_in = self.sae.W_enc, x.to(self.sae.W_enc.device)
        if self.normalisation in ("constant_norm_rescale", "layer_norm"):
            x_in = precise(x_in)  # a norm or a mean that is taken in bf16 is off by up to 0.4 %
        if self.normalisation == "constant_norm_rescale":
            x_in = x_in * (x_in.shape[-1] ** 0.5 / x_in.norm(dim=-1, keepdim=True))
        elif self.normalisation == "layer_norm":
            x_in = x_in - x_in.mean(-1, keepdim=True)
            x_in = x_in / (x_in.std(-1, keepdim=True) + 1e-5)  # the epsilon of sae_lens
        x_in = x_in.to(W_enc.dtype)
        subtracts = self.sae.cfg.apply_b_dec_to_input and "transcoder" not in self.architecture
        return x_in - self.sae.b_dec.detach() if subtracts else x_in

    def _activate(self, x: Tensor, features: Tensor | None) -> Tensor:
        sae, chosen = self.sae, slice(None) if features is None else features
        pre = x @ sae.W_enc.detach()[:, chosen]
        if self.architecture == "gated":
            magnitude = pre * sae.r_mag.detach()[chosen].exp() + sae.b_mag.detach()[chosen]
            return sae.activation_fn(magnitude) * (pre + sae.b_gate.detach()[chosen] > 0)
        pre = pre + sae.b_enc.detach()[chosen]
        if self.architecture in _COMPETING and self._rescales:
            pre = pre * sae.W_dec.detach().norm(dim=-1)
        acts = sae.activation_fn(pre)
        if self.architecture in _THRESHOLDED:
            acts = acts * (precise(pre) > precise(sae.threshold.detach()[chosen]))
        return acts.to_dense() if acts.is_sparse else acts

    def _encode_by_itself(self, x: Tensor) -> Tensor:
        """What the SAE's own code gives, with its state as it was."""
        sae = self.sae
        before = {name: vars(sae)[name] for name in _STATE if name in vars(sae)}
        read = x.to(sae.W_dec)
        if getattr(sae, "hook_z_reshaping_mode", False):
            read = read[:, None]  # sae_lens expects heads apart; one that is as wide as all of them does as well
        try:
            acts = _by_itself(sae, "encode", read)
        finally:
            for name in _STATE:
                vars(sae).pop(name, None)
            vars(sae).update(before)
        return precise(acts.to_dense() if acts.is_sparse else acts).to(x.device)

    def _decoded(self, acts: Tensor) -> Tensor:
        """Rows and bias alone, in the dtype of the weights and then in fp32."""
        W_dec, device = self.sae.W_dec.detach(), acts.device
        acts = acts.to(W_dec)
        if self.architecture not in _LINEAR and not self.normalises and hasattr(self.sae, "decode"):
            return precise(_by_itself(self.sae, "decode", acts)).to(device)
        if self._rescales:
            acts = acts / _norms(W_dec).to(acts)
        return precise(acts @ W_dec + self.bias.to(W_dec)).to(device)


class _Call(nn.Module):
    def __init__(self, sae: nn.Module, method: str) -> None:
        super().__init__()
        self.sae, self.method = sae, method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.sae, self.method)(x)


def _by_itself(sae: Any, method: str, x: Tensor) -> Tensor:
    """What a method of the SAE gives, with weights that take no gradient."""
    if not isinstance(sae, nn.Module):
        return getattr(sae, method)(x)
    weights = {f"sae.{name}": weight.detach() for name, weight in sae.named_parameters()}
    return torch.func.functional_call(_Call(sae, method), weights, (x,))


def _norms(rows: Float[Tensor, "*f d"]) -> Float[Tensor, "*f"]:
    """Norms to divide by; a row of zeros stays one."""
    return precise(rows).norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def _metadata(config: Any) -> Mapping[str, Any]:
    metadata = getattr(config, "metadata", None) or {}
    return metadata if isinstance(metadata, Mapping) else vars(metadata)


def _site(metadata: Mapping[str, Any], end: str) -> str | None:
    """A site that the metadata name; the name itself where it is of no site that is known here."""
    named = named_site(metadata, end)
    return metadata.get(f"hook_name{end}") if named is None else str(named)
