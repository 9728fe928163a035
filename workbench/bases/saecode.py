"""Encoding and decoding with a sae_lens SAE without its module state: only the features asked for, in fp32.

The SAE may be on another device than the activations: results are on the device of `x`, decoder rows on the SAE's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.errors import InvalidInputError, MismatchError, UnknownSiteError
from workbench.hooks.sites import Site

_PER_FEATURE = ("standard", "jumprelu", "gated")
_STATE = ("ln_mu", "ln_std", "x_norm_coeff")
"""What sae_lens keeps on the SAE from `encode` to `decode`."""


@dataclass(frozen=True, eq=False)
class Basis:
    """The features of an SAE as summands of the activations `x` that it reads, in fp32 and without gradient.

    `x = contributions(x) @ rows() + constant(x) + error`. A contribution is the feature's activation times the factor
    by which the SAE scales its output back to the size of the token, so zeroing a feature subtracts its contribution
    times its row, also under `layer_norm` and `constant_norm_rescale`. The factor differs from token to token: a mean
    over tokens is exact for contributions, not for activations.

    Attributes:
        sae: an SAE in the sae_lens form.

    Raises:
        MismatchError: for a transcoder.
        InvalidInputError: for the temporal SAE of sae_lens.
    """

    sae: Any

    def __post_init__(self) -> None:
        if _kind(self.sae) == "temporal":
            raise InvalidInputError(
                "A temporal SAE of sae_lens predicts each token from those before it, so its features are no summands "
                "of one token. Give an SAE of another kind."
            )
        refuse_transcoder(self.sae, "A basis of features")

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.sae.W_dec.shape[0])

    @property
    def width(self) -> int:
        """Width of the activations."""
        return int(self.sae.W_dec.shape[1])

    @torch.no_grad()
    def activations(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d_sae"]:
        """Feature activations in the SAE's own units, on the device of `x`."""
        return encode(self.sae, x)

    @torch.no_grad()
    def contributions(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d_sae"]:
        """By how many of its rows each feature moves each token: activation times `output_scale`, where `x` is."""
        return self.activations(x) * output_scale(self.sae, x)

    def rows(self, features: Int[Tensor, " f"] | None = None) -> Float[Tensor, "f d"]:
        """What one unit of contribution adds to a token; of all features by default."""
        return decoder_rows(self.sae, features)

    @torch.no_grad()
    def constant(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The reconstruction without any feature, where `x` is: the decoder's bias in the scale of each token."""
        bias = _bias(self.sae).float().to(x.device)
        return (bias * output_scale(self.sae, x) + _mean(self.sae, x)).expand(len(x), -1)


def encode(sae: Any, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """All feature activations, fp32, without gradient."""
    with torch.no_grad():
        if _kind(sae) not in (*_PER_FEATURE, "topk"):
            return _encode_by_itself(sae, x)
        return _activate(sae, _input(sae, x), None).float().to(x.device)


def encode_some(sae: Any, x: Float[Tensor, "n d_in"], features: Int[Tensor, " f"]) -> Float[Tensor, "n f"]:
    """The activations of some features, fp32, without gradient.

    Where features do not compete (ReLU, JumpReLU) only their columns of the encoder are used.
    """
    with torch.no_grad():
        features = features.to(sae.W_dec.device)
        if _kind(sae) not in _PER_FEATURE:
            return encode(sae, x)[:, features.to(x.device)]
        return _activate(sae, _input(sae, x), features).float().to(x.device)


def decode(sae: Any, acts: Float[Tensor, "n d_sae"], x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    """The reconstruction of `x` from feature activations, fp32."""
    with torch.no_grad():
        acts, near = acts.to(sae.W_dec), x.to(sae.W_dec.device)
        if _rescales(sae):
            acts = acts / _norms(sae.W_dec).to(acts)
        out = (acts @ sae.W_dec + _bias(sae)).float()
        return (out * output_scale(sae, near) + _mean(sae, near)).to(x.device)


def decoder_rows(sae: Any, features: Int[Tensor, "*f"] | None = None) -> Float[Tensor, "*f d_in"]:
    """What one unit of each feature's activation adds to the reconstruction, before `output_scale`, fp32.

    Of all features by default.
    """
    W_dec = sae.W_dec.detach()
    rows = (W_dec if features is None else W_dec[features.to(W_dec.device)]).float()
    return rows / _norms(rows)[..., None] if _rescales(sae) else rows


def output_scale(sae: Any, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n 1"] | float:
    """By what the decoder's output is multiplied to be in the units of `x`: 1 unless the SAE normalises its input.

    In fp32, on the device of `x`.
    """
    kind, x = _normalisation(sae), x.float()
    if kind == "constant_norm_rescale":
        return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    if kind == "layer_norm":
        return (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
    return 1.0


def writing(sae: Any) -> Bool[Tensor, " d_sae"]:
    """Which features write anything: those whose decoder row is not zero."""
    return (sae.W_dec.detach() != 0).any(dim=1)


def refuse_transcoder(sae: Any, what: str) -> None:
    """For edits of activations at the site that they are read off: what a transcoder writes belongs elsewhere.

    Args:
        sae: an SAE in the sae_lens form; one without metadata reads what it writes.
        what: who needs an SAE, to begin the message.

    Raises:
        MismatchError: for a transcoder.
    """
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None) or {}
    names = metadata if hasattr(metadata, "get") else vars(metadata)
    read, written = names.get("hook_name"), names.get("hook_name_out")
    if (written or read) != read or "transcoder" in _kind(sae):
        raise MismatchError(
            f"{what} needs an SAE and got a transcoder: it reads {_site(read)} and writes {_site(written)}, so its "
            "features can't be edited where they are read. Give an SAE, or add decoder rows where it writes, with Add; "
            "feature_cards shows what a transcoder reads and promotes."
        )


def sae_fingerprint(sae: Any) -> str:
    """Changes with any entry of the decoder or the encoder, bfloat16 rounding apart; 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in ("W_dec", "W_enc"):
        if (matrix := getattr(sae, name, None)) is not None:
            digest.update(matrix.detach().cpu().bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def _site(name: str | None) -> str:
    try:
        return str(Site.parse(name or ""))
    except UnknownSiteError:
        return name or "a site that it does not name"


def _norms(rows: Float[Tensor, "*f d"]) -> Float[Tensor, "*f"]:
    """Norms to divide by; a row of zeros stays one."""
    return rows.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def _kind(sae: Any) -> str:
    config = getattr(sae, "cfg", None)
    return config.architecture() if config is not None and hasattr(config, "architecture") else "unknown"


def _rescales(sae: Any) -> bool:
    return bool(getattr(getattr(sae, "cfg", None), "rescale_acts_by_decoder_norm", False))


def _normalisation(sae: Any) -> str:
    return str(getattr(getattr(sae, "cfg", None), "normalize_activations", "none"))


def _bias(sae: Any) -> Float[Tensor, " d_in"]:
    """What the decoder adds: matching pursuit adds `b_dec` only where it subtracted it."""
    b_dec = sae.b_dec.detach()
    left_out = _kind(sae) == "matching_pursuit" and not sae.cfg.apply_b_dec_to_input
    return torch.zeros_like(b_dec) if left_out else b_dec


def _mean(sae: Any, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n 1"] | float:
    """The mean of each token, which `layer_norm` takes off and adds again."""
    return x.float().mean(-1, keepdim=True) if _normalisation(sae) == "layer_norm" else 0.0


def _input(sae: Any, x: Tensor) -> Tensor:
    kind, x = _normalisation(sae), x.to(sae.W_enc.device)
    if kind != "none":
        x = x.float()  # a norm or a mean that is taken in bf16 is off by up to 0.4 %
    if kind == "constant_norm_rescale":
        x = x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))
    elif kind == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.std(-1, keepdim=True) + 1e-5)  # the epsilon of sae_lens
    x = x.to(sae.W_enc)
    return x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x


def _activate(sae: Any, x: Tensor, features: Tensor | None) -> Tensor:
    chosen = slice(None) if features is None else features
    pre = x @ sae.W_enc[:, chosen]
    if _kind(sae) == "gated":
        magnitude = pre * sae.r_mag[chosen].exp() + sae.b_mag[chosen]
        return sae.activation_fn(magnitude) * (pre + sae.b_gate[chosen] > 0)
    pre = pre + sae.b_enc[chosen]
    if _kind(sae) == "topk" and _rescales(sae):
        pre = pre * sae.W_dec.norm(dim=-1)
    acts = sae.activation_fn(pre)
    if _kind(sae) == "jumprelu":
        acts = acts * (pre.float() > sae.threshold[chosen].float())
    return acts


def _encode_by_itself(sae: Any, x: Tensor) -> Tensor:
    """What the SAE's own code gives, with its state as it was."""
    before = {name: vars(sae)[name] for name in _STATE if name in vars(sae)}
    acts = sae.encode(x.to(sae.W_dec)).float().to(x.device)
    for name in _STATE:
        vars(sae).pop(name, None)
    vars(sae).update(before)
    return acts
