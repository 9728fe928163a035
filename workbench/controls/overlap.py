"""How near two sets of directions are, beside sets of the same size that hold no match."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from workbench.controls.directions import random_directions
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import number
from workbench.core.similarity import max_cosines
from workbench.core.stats import SIGNED_SHARE, Estimate, sample_mean, wilson

RESAMPLES = 500
NULL_SEED = 0x5EED_0000
"""Added to the seeds of null dictionaries: an SAE that was initialised from seed 0 must not meet its own start."""


def permuted_dictionary(b: Float[Tensor, "m d"], seed: int) -> Float[Tensor, "m d"]:
    """The values of each dimension dealt out again among the directions.

    The mean direction and the scale of each dimension stay, so this null also holds what outlier dimensions give.
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.rand(b.shape, generator=random).argsort(dim=0)
    return normalize(b.float().cpu(), dim=1).gather(0, order)


NULLS = {
    # Of one length, so that a zero row of `b` is no exception.
    "random": lambda b, seed: random_directions(torch.ones(b.shape), seed=seed),
    "permuted": permuted_dictionary,
}
"""Dictionaries that hold no match, by name."""


@dataclass(frozen=True)
class Nearest:
    """Largest signed cosine of each direction with any of another set: its mean, and the share above a threshold."""

    mean_max: Estimate
    above: Estimate


@dataclass(frozen=True)
class Overlap:
    """How near one set of directions is to another, beside sets that hold no match.

    Attributes:
        nulls: the same with `b` replaced: "random" directions of the same number and width, and "permuted", `b` with
            each dimension dealt out again; one per draw.
        threshold: of `above`. It means something beside the nulls of this width and number only.
    """

    observed: Nearest
    nulls: dict[str, tuple[Nearest, ...]]
    threshold: float
    n: int
    m: int
    d: int

    @property
    def better(self) -> bool:
        """Whether the interval of the mean lies above the interval of every draw of every null."""
        return self.observed.mean_max.low > max(draw.mean_max.high for draws in self.nulls.values() for draw in draws)

    @property
    def verdict(self) -> str:
        """Either "better than null" or "no better than null"."""
        return "better than null" if self.better else "no better than null"

    def __str__(self) -> str:
        nulls = ", ".join(
            f"{name} {number(max(d.mean_max.value for d in draws))}" for name, draws in self.nulls.items()
        )
        return f"mean largest cosine {self.observed.mean_max}, {self.verdict} ({nulls}; d={self.d}, m={self.m})"


def overlap(
    a: Float[Tensor, "n d"], b: Float[Tensor, "m d_b"], *, threshold: float = 0.7, draws: int = 3, seed: int = 0
) -> Overlap:
    """Largest cosines of the rows of `a` with those of `b`, beside `draws` null dictionaries of each kind.

    Raises:
        ShapeError: if the widths differ.
        InvalidInputError: without a null.
    """
    if draws < 1:
        raise InvalidInputError(f"overlap(draws={draws}): a cosine says nothing without a null; use at least 1.")

    def nearest(other: Tensor) -> Nearest:
        values = max_cosines(a.cpu(), other.cpu()).values.double().clamp(-1, 1).numpy()
        above = wilson(int((values > threshold).sum()), len(values), unit="directions")
        mean = sample_mean(values, unit="directions", seed=seed, resamples=RESAMPLES, within=SIGNED_SHARE)
        return Nearest(mean, above)

    nulls = {
        name: tuple(nearest(make(b, NULL_SEED + seed * 1000 + i)) for i in range(draws)) for name, make in NULLS.items()
    }
    return Overlap(nearest(b), nulls, threshold, len(a), len(b), a.shape[1])
