"""Ratings from 0 to 2 of concept, instruction and fluency, and two ways to make one number of them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.steering.rating.questions import MAX_RATING


@checked
def mean_of_harmonics(scores: Float[Tensor, "*concepts examples ratings"]) -> float:
    """AxBench's aggregate: the harmonic mean of the three ratings of each example, then the mean over examples.

    An example with a rating of 0 counts as 0. Not comparable with `harmonic_of_means`, which is larger wherever the
    three ratings fail on different examples.

    Raises:
        ShapeError: if the last axis does not hold three ratings.
        DegenerateInputError: for no example.
        InvalidInputError: for ratings outside of 0 to 2.

    Source: AxBench (Wu et al. 2025, arXiv 2501.17148).

    >>> mean_of_harmonics(torch.tensor([[2.0, 2.0, 2.0], [0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]))  # (2 + 0 + 1) / 3
    1.0
    """
    return float(harmonic(_checked(scores, "mean_of_harmonics")).mean())


@checked
def harmonic_of_means(scores: Float[Tensor, "*concepts examples ratings"]) -> float:
    """The seed paper's aggregate: the mean of each rating over a concept's examples, then their harmonic mean.

    With several concepts, the mean over concepts.

    Raises:
        ShapeError: if the last axis does not hold three ratings.
        DegenerateInputError: for no example.
        InvalidInputError: for ratings outside of 0 to 2.

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063), from their code.

    >>> scores = torch.tensor([[2.0, 2.0, 2.0], [0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    >>> round(harmonic_of_means(scores), 4)  # means 1, 5/3, 5/3: 3 / (1 + 3/5 + 3/5)
    1.3636
    """
    return float(harmonic(_checked(scores, "harmonic_of_means").mean(-2)).mean())


def harmonic(scores: Float[Tensor, "*n ratings"]) -> Float[Tensor, "*n"]:
    """Harmonic mean over the last axis, 0 where one rating is 0.

    >>> harmonic(torch.tensor([[2.0, 2.0, 2.0], [0.0, 2.0, 2.0], [1.0, 1.0, 2.0]]))
    tensor([2.0000, 0.0000, 1.2000])
    """
    safe = 3 / (1 / scores.clamp_min(1e-12)).sum(-1)
    return safe.where((scores > 0).all(-1), torch.zeros_like(safe))


def _checked(scores: Tensor, caller: str) -> Tensor:
    if scores.ndim < 2 or scores.shape[-1] != 3:
        raise ShapeError(f"{caller}: scores of shape {tuple(scores.shape)}; give (examples, 3).")
    if not scores.numel():
        raise DegenerateInputError(f"{caller}: there is no example. Rate at least one.")
    if not bool(((scores >= 0) & (scores <= MAX_RATING)).all()):
        raise InvalidInputError(
            f"{caller}: ratings from {float(scores.min())} to {float(scores.max())}; they go from 0 to 2."
        )
    return scores.double()
