"""An SAE as its author wrote it down, every convention named, and the one function that removes the conventions."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.errors import CorruptFileError, InvalidInputError, ShapeError

Activation = Literal["relu", "topk", "groupmax", "jumprelu", "gated"]
Norm = Literal["none", "layer_norm", "constant_norm_rescale"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RawSAE:
    """Weights in the orientation of sae_lens and what its author does around them.

    With `n` the norm per token (`norm`) and `r` the norm of each decoder row, or 1 without `rescales`:

        x' = (n(x) - mean) * scale,   pre = (x' - centre) @ W_enc + b_enc,   acts = activation(pre) * r
        out = n_inverse(((acts / r) @ W_dec + b_dec + W_skip @ x') / scale_out + mean_out)

    where `centre` is `b_dec` if `subtracts_b_dec`, plus `shift`. TopK ranks `pre * r`.

    Attributes:
        activation: what turns `pre` into activations; "gated" has `b_enc` as the bias of its gate.
        W_enc: encoder, `(d_in, d_sae)`.
        b_enc: encoder bias, `(d_sae,)`, as `threshold`, `r_mag` and `b_mag`.
        W_dec: decoder, `(d_sae, d_out)`.
        b_dec: decoder bias, `(d_out,)`.
        k: of "topk" and "groupmax".
        threshold: of "jumprelu", compared with `pre`.
        r_mag: of "gated": log scale of the magnitude path.
        b_mag: of "gated": bias of the magnitude path.
        W_skip: linear path past the features, `(d_out, d_in)`.
        transcodes: it reconstructs another site than it reads.
        subtracts_b_dec: `b_dec` is subtracted from the input.
        rescales: activations are in units of the decoder norm.
        shift: a further vector that is subtracted from the scaled input.
        scale: factor of the input.
        mean: mean of the training data, subtracted before scaling and added to the output of an SAE.
        scale_out: factor of the target of a transcoder; None takes `scale` for an SAE and 1 for a transcoder.
        mean_out: mean of the target of a transcoder.
        norm: normalisation per token, which no weight can hold.
        metadata: site (`hook_name`), model and the like, in the words of sae_lens.

    Raises:
        ShapeError: if the tensors don't fit together.
        CorruptFileError: if a tensor holds NaN or infinite values.
        InvalidInputError: if what the activation needs is missing.
    """

    activation: Activation
    W_enc: Float[Tensor, ...]
    b_enc: Float[Tensor, ...]
    W_dec: Float[Tensor, ...]
    b_dec: Float[Tensor, ...]
    k: int | None = None
    threshold: Float[Tensor, ...] | None = None
    r_mag: Float[Tensor, ...] | None = None
    b_mag: Float[Tensor, ...] | None = None
    W_skip: Float[Tensor, ...] | None = None
    transcodes: bool = False
    subtracts_b_dec: bool = True
    rescales: bool = False
    shift: Float[Tensor, ...] | None = None
    scale: float = 1.0
    mean: Float[Tensor, ...] | None = None
    scale_out: float | None = None
    mean_out: Float[Tensor, ...] | None = None
    norm: Norm = "none"
    metadata: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_values(self)
        needs = {"topk": "k", "groupmax": "k", "jumprelu": "threshold", "gated": "r_mag"}.get(self.activation)
        if needs is not None and getattr(self, needs) is None:
            raise InvalidInputError(f"A {self.activation} SAE needs {needs}; its file names none. Pass {needs}=.")
        d_sae = self.W_dec.shape[0]
        if self.k is not None and not (type(self.k) is int and 1 <= self.k <= d_sae):
            raise InvalidInputError(f"k={self.k!r} of an SAE with {d_sae} features: choose 1 <= k <= {d_sae}.")
        if self.activation == "groupmax" and d_sae % (self.k or 1):
            raise InvalidInputError(f"{d_sae} features don't divide into k={self.k} groups of equal size.")
        if self.transcodes and self.subtracts_b_dec:
            raise InvalidInputError("A transcoder can't subtract b_dec, which belongs to its output, from its input.")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        found = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _check_values(raw: RawSAE) -> None:
    if raw.W_enc.ndim != 2 or raw.W_dec.ndim != 2:
        raise ShapeError(
            f"W_enc {tuple(raw.W_enc.shape)} and W_dec {tuple(raw.W_dec.shape)} must be matrices, (d_in, d_sae) and "
            "(d_sae, d_out)."
        )
    (d_in, d_sae), d_out = raw.W_enc.shape, raw.W_dec.shape[1]
    expected = {
        "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "mean": (d_in,), "mean_out": (d_out,),
        "shift": (d_in,), "W_skip": (d_out, d_in),
    }  # fmt: skip
    for name, tensor in raw.tensors().items():
        shape = expected.get(name, (d_sae,))
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}; W_enc {(d_in, d_sae)} and W_dec {tuple(raw.W_dec.shape)} "
                f"ask for {shape}. The file is not of this format, or damaged."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CorruptFileError(f"{name} holds NaN or infinite values. Fetch the file again.")
    if not raw.transcodes and d_in != d_out:
        raise ShapeError(f"An SAE that reads {d_in} and writes {d_out} values per token is a transcoder; say so.")


def fold(raw: RawSAE) -> RawSAE:
    """The same function of `x` with scale, means, shift and decoder norms inside the weights.

    Only `norm` remains, which differs from token to token. Activations stay those of the author. Folding twice is
    folding once. Computed in fp64, returned in the dtype of the weights.

    >>> one = torch.ones(1)
    >>> raw = RawSAE(activation="relu", W_enc=one[None], b_enc=one, W_dec=one[None], b_dec=one, scale=2.0)
    >>> done = fold(raw)
    >>> done.W_enc.item(), done.W_dec.item(), done.b_dec.item(), done.scale  # (2x - 1) = 2 (x - 1/2)
    (2.0, 0.5, 0.5, 1.0)
    """
    dtype = raw.W_enc.dtype
    wide = replace(raw, **{name: tensor.double() for name, tensor in raw.tensors().items()})
    folded = _fold_scale(_fold_shift(_fold_norms(wide)))
    return replace(folded, **{name: tensor.to(dtype) for name, tensor in folded.tensors().items()})


def _fold_norms(raw: RawSAE) -> RawSAE:
    """Activations in units of the decoder norm: unit decoder rows, everything before the activation times the norm."""
    if not raw.rescales:
        return raw
    norms = raw.W_dec.norm(dim=1)
    safe = norms.clamp_min(1e-30)
    per_feature = {
        name: raw.tensors()[name] * norms for name in ("b_enc", "threshold", "b_mag") if name in raw.tensors()
    }
    return replace(raw, W_enc=raw.W_enc * norms, W_dec=raw.W_dec / safe[:, None], rescales=False, **per_feature)


def _fold_shift(raw: RawSAE) -> RawSAE:
    """A subtracted vector that is not `b_dec`, and a mean where `b_dec` can't hold it, go into the encoder's biases."""
    inside = torch.zeros(raw.W_enc.shape[0]).to(raw.W_enc) if raw.shift is None else raw.shift
    if raw.mean is not None and not raw.subtracts_b_dec:
        inside = inside + raw.scale * raw.mean
    if raw.subtracts_b_dec and raw.W_skip is not None:
        # a linear path reads what is not centred, so the SAE is written as a transcoder, whose b_dec is output alone
        extra = raw.b_dec if raw.mean is None else raw.b_dec + raw.scale * raw.mean
        raw, inside = replace(raw, subtracts_b_dec=False), inside + extra
    moved = inside @ raw.W_enc
    b_mag = None
    if raw.b_mag is not None and raw.r_mag is not None:
        b_mag = raw.b_mag - moved * raw.r_mag.exp()
    return replace(raw, shift=None, b_enc=raw.b_enc - moved, b_mag=b_mag)


def _fold_scale(raw: RawSAE) -> RawSAE:
    """Scale and means, of the input into the encoder and of the output into the decoder."""
    out = raw.scale_out if raw.scale_out is not None else (1.0 if raw.transcodes else raw.scale)
    b_dec = raw.b_dec / out
    skip = raw.W_skip
    if skip is not None:
        if raw.mean is not None:
            b_dec = b_dec - skip @ raw.mean * (raw.scale / out)
        skip = skip * (raw.scale / out)
    mean_out = raw.mean_out if raw.transcodes else raw.mean
    if mean_out is not None:
        b_dec = b_dec + mean_out
    return replace(
        raw, W_enc=raw.W_enc * raw.scale, W_dec=raw.W_dec / out, b_dec=b_dec, W_skip=skip, scale=1.0, mean=None,
        scale_out=None, mean_out=None,
    )  # fmt: skip
