"""Names and orientations under which projects keep the tensors of an SAE."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.bases.sitenames import site_metadata
from workbench.core.errors import CorruptFileError, MismatchError
from workbench.saes.formats.overrides import Overrides
from workbench.saes.formats.raw import RawSAE

_NAMES = {
    "W_enc": ("W_enc", "w_enc", "encoder.weight", "encoder_linear.weight"),
    "W_dec": ("W_dec", "w_dec", "decoder.weight", "decoder_linear.weight"),
    "b_enc": ("b_enc", "encoder.bias", "encoder_linear.bias", "gate_bias", "b_gate"),
    "b_dec": ("b_dec", "decoder.bias", "decoder_linear.bias", "decoder_bias", "bias"),
    "threshold": ("threshold",),
    "r_mag": ("r_mag",),
    "b_mag": ("b_mag", "mag_bias"),
    "W_skip": ("W_skip",),
}


def find(tensors: dict[str, Tensor], name: str) -> Tensor | None:
    """A tensor under any of its known names, in fp32.

    Raises:
        CorruptFileError: if its numbers are complex.
    """
    found = next((tensors[alias] for alias in _NAMES[name] if alias in tensors), None)
    if found is not None and found.is_complex():
        raise CorruptFileError(f"{name} holds complex numbers ({found.dtype}); an SAE has real weights.")
    return None if found is None else found.float()


def need(tensors: dict[str, Tensor], path: Path, *names: str) -> list[Tensor]:
    """Several tensors.

    Raises:
        CorruptFileError: if one is missing.
    """
    found = [find(tensors, name) for name in names]
    if missing := [name for name, tensor in zip(names, found, strict=True) if tensor is None]:
        raise CorruptFileError(
            f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(tensors)[:20])}. It is not of this format."
        )
    return [tensor for tensor in found if tensor is not None]


def oriented(W_enc: Tensor, W_dec: Tensor, d_in: int, linear: Iterable[str]) -> tuple[Tensor, Tensor]:
    """`W_enc (d_in, d_sae)` and `W_dec (d_sae, d_out)`.

    The shape decides; of a square matrix the name does, because a torch `Linear` keeps `(out, in)`.

    Args:
        W_enc: encoder as stored.
        W_dec: decoder as stored.
        d_in: width of the input.
        linear: which of "W_enc" and "W_dec" are the weights of a `Linear`.
    """
    square = W_enc.shape[0] == W_enc.shape[1]
    if ("W_enc" in linear) if square else (W_enc.shape[1] == d_in):
        W_enc = W_enc.T
    d_sae = W_enc.shape[1]
    square = W_dec.shape[0] == W_dec.shape[1]
    if ("W_dec" in linear) if square else (W_dec.shape[1] == d_sae):
        W_dec = W_dec.T
    return W_enc.contiguous(), W_dec.contiguous()


def linear_names(tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Which of the two matrices are stored as the weight of a `Linear`."""
    return tuple(name for name in ("W_enc", "W_dec") if any(".weight" in t for t in _NAMES[name] if t in tensors))


def bare(tensors: dict[str, Tensor], path: Path, overrides: Overrides) -> RawSAE:
    """An SAE from tensors that come without a config.

    Raises:
        MismatchError: if nothing says what its activation is.
        CorruptFileError: if a tensor is missing.
    """
    W_enc, W_dec, b_dec = need(tensors, path, "W_enc", "W_dec", "b_dec")
    W_enc, W_dec = oriented(W_enc, W_dec, len(b_dec), linear_names(tensors))
    d_sae = W_enc.shape[1]
    b_enc = find(tensors, "b_enc")
    r_mag, b_mag = find(tensors, "r_mag"), find(tensors, "b_mag")
    threshold = per_feature(find(tensors, "threshold") if overrides.threshold is None else overrides.threshold, d_sae)
    k = overrides.k if overrides.k is not None else _stored_k(tensors)
    activation: Any = overrides.activation
    if activation is None:
        activation = "gated" if r_mag is not None else "topk" if k else "jumprelu" if threshold is not None else None
    if activation is None:
        raise MismatchError(
            f"{path} holds tensors without a config, and the same tensors are a ReLU, a TopK and a JumpReLU SAE. Pass "
            "k= or threshold=, or activation='relu'."
        )
    subtracts = True if overrides.subtracts_b_dec is None else overrides.subtracts_b_dec
    return RawSAE(
        activation=activation, W_enc=W_enc, W_dec=W_dec, b_dec=b_dec, r_mag=r_mag, b_mag=b_mag,
        b_enc=torch.zeros(d_sae) if b_enc is None else b_enc,
        k=k if activation in ("topk", "groupmax") else None,
        threshold=threshold if activation == "jumprelu" else None,
        subtracts_b_dec=subtracts, scale=overrides.scale or 1.0,
        metadata=site_metadata(overrides.site, overrides.site_out),
    )  # fmt: skip


def per_feature(threshold: Tensor | float | None, d_sae: int) -> Tensor | None:
    """A threshold for each feature, from one per feature or one for all."""
    if threshold is None:
        return None
    wide = torch.as_tensor(threshold, dtype=torch.float32)
    return wide.reshape(-1).expand(d_sae).clone() if wide.numel() == 1 else wide


def _stored_k(tensors: dict[str, Tensor]) -> int | None:
    return int(tensors["k"]) if "k" in tensors and tensors["k"].numel() == 1 else None
