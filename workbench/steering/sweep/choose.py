"""Choosing among strengths: two rules for one feature, and the points that no other point beats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.steering.sweep.measures import DEGENERATE_COUNT

HELD_OUT_RULE = "held-out rule"
PAPER_RULE = "paper's rule"


@checked
def best_strength(
    success: Float[np.ndarray, "strengths prompts"], nll: Float[np.ndarray, "strengths prompts"]
) -> tuple[int, bool]:
    """Index of the strength with the largest (lens tokens per text) / perplexity, and whether all gave repetition.

    Give it the selection prompts alone: the effect is then measured on others. Perplexity is the exponential of the
    mean over texts. Strengths with more than three lens tokens per text are left out; if none is left, the first is
    taken. Of equal strengths the first wins.

    >>> best_strength(np.array([[1.0], [2.0]]), np.array([[1.0], [1.1]]))  # 1 / e < 2 / e^1.1
    (1, False)
    """
    counts = success.mean(1)
    means = np.array([row[np.isfinite(row)].mean() if np.isfinite(row).any() else np.inf for row in nll])
    scores = np.where(counts <= DEGENERATE_COUNT, counts * np.exp(-means), -1.0)
    best = int(scores.argmax())
    return (0, True) if scores[best] < 0 else (best, False)


@checked
def paper_strength(
    success: Float[np.ndarray, "strengths prompts"], nll: Float[np.ndarray, "strengths prompts"]
) -> tuple[int, bool]:
    """Index of the strength by the paper's rule, and whether all gave repetition.

    Strengths with a mean generation success above 3 are dropped; of the others the one with the largest
    `(GS / max GS) / (PPL / max PPL)` is taken, each maximum over all strengths. PPL is the mean perplexity of the
    texts. The paper chooses and reports on the same prompts, which flatters the strength that is chosen.

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063), section 4.1; they take the perplexity of prompt and text
    together under a larger model, here it is that of the text under the unsteered model.

    >>> paper_strength(np.array([[1.0], [2.0], [9.0]]), np.array([[1.0], [2.0], [1.0]]))  # 1 / e > 2 / e^2; 9 > 3
    (0, False)
    """
    counts = success.mean(1)
    perplexity = np.array([np.exp(row[np.isfinite(row)]).mean() if np.isfinite(row).any() else np.inf for row in nll])
    top = counts.max()
    worst = perplexity[np.isfinite(perplexity)].max(initial=1.0)
    scores = np.where(counts <= DEGENERATE_COUNT, (counts / top if top else counts) / (perplexity / worst), -1.0)
    best = int(scores.argmax())
    return (0, True) if scores[best] < 0 else (best, False)


@checked
def pareto_front(
    effect: Sequence[float] | Float[np.ndarray, " points"], cost: Sequence[float] | Float[np.ndarray, " points"]
) -> tuple[int, ...]:
    """Indices of the points that no other point dominates, by rising cost.

    A point dominates another if it has at least as much effect at no more cost, and is better in one of the two. Equal
    points do not dominate each other. Points with a nan are never on the front.

    Raises:
        ShapeError: if effects and costs do not pair up.
        DegenerateInputError: if there is no point.

    >>> pareto_front([1.0, 2.0, 1.5], [0.0, 1.0, 2.0])  # the last has less effect than the second at more cost
    (0, 1)
    """
    if len(effect) != len(cost):
        raise ShapeError(f"pareto_front: {len(effect)} effects and {len(cost)} costs must pair up.")
    if not len(effect):
        raise DegenerateInputError("pareto_front: there is no point. Give at least one.")
    points = [(e, c, i) for i, (e, c) in enumerate(zip(effect, cost, strict=True)) if not math.isnan(e + c)]
    front = [
        (c, i)
        for e, c, i in points
        if not any(oe >= e and oc <= c and (oe > e or oc < c) for oe, oc, other in points if other != i)
    ]
    return tuple(i for _, i in sorted(front))
