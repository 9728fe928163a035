"""The area under the ROC curve: how well scores tell positive from negative rows."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError


@checked
def auroc(
    scores: Float[Tensor, "rows columns"], positive: Bool[Tensor, " labels"] | Int[Tensor, " labels"]
) -> Float[Tensor, " columns"]:
    """Probability that a positive row scores above a negative one, per column; ties count half. In fp64.

    Scores are compared in the precision that they have.

    Raises:
        ShapeError: if the rows do not pair up.
        InvalidInputError: for labels that are neither 0 nor 1.
        DegenerateInputError: if one side has no row, or a score is nan.

    >>> is_positive = torch.tensor([True, True, False, False])
    >>> auroc(torch.tensor([[3.0], [1.0], [2.0], [1.0]]), is_positive).item()  # (2 + .5) / 4
    0.625
    """
    from scipy.stats import rankdata

    if scores.shape[0] != positive.shape[0]:
        raise ShapeError(f"auroc: {scores.shape[0]} rows of scores and {positive.shape[0]} labels; they must pair up.")
    is_positive = positive.bool()
    if bool((positive != is_positive).any()):
        raise InvalidInputError(
            "auroc: labels other than 0 and 1. Give True for positive rows and False for the others."
        )
    n_positive = int(is_positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative or bool(scores.isnan().any()):
        raise DegenerateInputError(
            f"auroc: {n_positive} positive and {n_negative} negative rows, {int(scores.isnan().sum())} scores are nan. "
            "Give at least one row of each kind, and scores that are numbers."
        )
    # bf16 has no numpy type; fp32 holds its values exactly.
    comparable = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    ranks = np.asarray(rankdata(comparable.cpu().numpy(), axis=0))
    wins = ranks[is_positive.cpu().numpy()].sum(0) - n_positive * (n_positive + 1) / 2
    return torch.from_numpy(np.asarray(wins / (n_positive * n_negative)))


@checked
def chance_above(upper: Float[np.ndarray, " m"], lower: Float[np.ndarray, " n"]) -> float:
    """Probability that a value of `upper` lies above one of `lower`: the `auroc` of two samples.

    >>> chance_above(np.array([2.0, 3.0]), np.array([1.0, 3.0]))  # (1 + 1 + 0 + 0.5) / 4
    0.625
    """
    scores = torch.from_numpy(np.concatenate([upper, lower]))
    return float(auroc(scores[:, None], torch.arange(len(scores)) < len(upper)))
