"""What a site holds when only some of its nodes do what they do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.decomposition import Place
from workbench.bases.base import Basis
from workbench.core.display import OneLine


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept at one place.

    Attributes:
        features: numbers of the features that are computed.
        mask: where each is kept.
        error: where the error node is kept.
        inverted: these nodes are ablated and all others kept.
    """

    features: Int[Tensor, " f"]
    mask: Bool[Tensor, "pos f"]
    error: Bool[Tensor, " pos"]
    inverted: bool = False


@dataclass(frozen=True, eq=False)
class Reference(OneLine):
    """What ablated nodes are at one place, for one row or, with a leading axis of 1, for all.

    Attributes:
        x: the activation.
        written: what all features write together.
        read: what the basis reads, for the coefficients of single features; None where they are zero or known.
        coefficients: of every feature, where they are known.
    """

    x: Float[Tensor, "rows pos d"] | None
    written: Float[Tensor, "rows pos d"] | None
    read: Float[Tensor, "examples pos d_in"] | None
    coefficients: Float[Tensor, " d_sae"] | None = None


def nothing(n_tokens: int) -> Kept:
    """No node."""
    none = torch.zeros(0, dtype=torch.long)
    return Kept(none, torch.zeros(n_tokens, 0, dtype=torch.bool), torch.zeros(n_tokens, dtype=torch.bool))


def ablated(
    place: Place, kept: Kept, x: Tensor, read: Tensor, ours: Tensor | None, reference: Reference
) -> Float[Tensor, "rows pos d"]:
    """The activation with everything but the kept nodes at its reference."""
    basis = place.basis
    empty = basis.constant(read) if reference.x is None else reference.x.expand_as(x)
    written = None if reference.written is None else reference.written.expand_as(x)
    if ours is None:
        chosen = torch.zeros_like(x)
    else:
        moved = (basis.coefficients(read, kept.features) - ours) * kept.mask.to(x.device)
        chosen = moved @ basis.rows(kept.features).to(moved)
    error = kept.error.to(x.device)[:, None]
    if not kept.inverted:
        if not bool(error.any()):
            return empty + chosen
        return empty + chosen + error * error_moved(basis, x, read, empty, written)
    # Everything but the chosen nodes: the activation as it is, with those at their reference.
    without = x - chosen
    return without - error * error_moved(basis, x, read, empty, written) if bool(error.any()) else without


def error_moved(
    basis: Basis,
    x: Float[Tensor, "*rows pos d"],
    read: Float[Tensor, "*rows pos d_in"],
    empty: Float[Tensor, "*some pos d"],
    reference: Float[Tensor, "*others pos d"] | None,
) -> Float[Tensor, "*rows pos d"]:
    """By how much the error node differs from its reference: what is no feature, the constant included.

    Args:
        basis: the basis.
        x: activations where it writes.
        read: activations where it reads.
        empty: what `x` is with every node at its reference.
        reference: what all features write at their reference; None if nothing.
    """
    written = basis.contribution(read)
    return (x - empty) - (written if reference is None else written - reference)
