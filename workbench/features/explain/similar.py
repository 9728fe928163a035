"""Windows compared by their tokens: hard negatives, and whether the windows of a feature are alike at all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from workbench.core.stats import Estimate, wilson
from workbench.features.explain.examples import Examples, Windows, joined
from workbench.features.explain.testing import Items, balanced_items


def tf_idf(windows: Windows) -> Float[np.ndarray, "windows words"]:
    """Unit vectors of token counts times `log(n / windows with the token)`; a window of common tokens alone is zero.

    Tokens are compared as they are, case and leading spaces included; their order plays no part.
    """
    n = len(windows)
    ids, place = np.unique(windows.view.ids[windows.inside], return_inverse=True)
    counts = np.zeros((n, len(ids)))
    np.add.at(counts, (windows.inside.nonzero()[0], place), 1.0)
    weighted = counts * np.log(n / np.maximum((counts > 0).sum(0), 1))
    norm = np.linalg.norm(weighted, axis=1, keepdims=True)
    return np.divide(weighted, norm, out=np.zeros_like(weighted), where=norm > 0)


def most_alike(pool: Windows, to: Windows, n: int) -> Windows:
    """The n windows of a pool with the largest mean cosine (TF-IDF) to some windows, the most alike first."""
    if not len(pool) or not len(to):
        return pool[:0]
    vectors = tf_idf(joined([pool, to]))
    likeness = vectors[: len(pool)] @ vectors[len(pool) :].mean(0)
    return pool[np.argsort(-likeness, kind="stable")[:n]]


def hard_items(examples: Examples) -> Items:
    """Detection whose windows without the feature are those most like the ones that its explanation is made from.

    An explanation that names only a token, of a feature that depends on more than the token, passes with windows drawn
    at random and fails here.
    """
    alike = most_alike(examples.held_silent, examples.shown, len(examples.tested))
    return balanced_items(examples.tested, alike)


@dataclass(frozen=True)
class IntruderScore:
    """Whether windows with a feature can be told from one without it by likeness alone, without any explanation.

    Attributes:
        accuracy: share of trials in which the window without the feature was found; None without a full trial.
        control: the same where none of the windows has the feature, and one of them is called the intruder.
        chance: 1 / windows per trial.
    """

    accuracy: Estimate | None
    control: Estimate | None
    chance: float


def intruder_score(examples: Examples, shown: int = 4) -> IntruderScore:
    """Finds the intruder among `shown` windows with the feature, of like strength, and one without it.

    The guess is the window with the smallest mean cosine (TF-IDF) to the others. Trials share no window. A feature
    that reads tokens is found at once; one that reads a topic where its windows share words; one whose windows have
    nothing in common stays at chance.

    Args:
        examples: windows of the feature; the held-out ones are used.
        shown: windows with the feature in each trial.
    """
    peaks = np.nan_to_num(examples.tested.values).max(1, initial=0.0)
    inside = examples.tested[np.argsort(-peaks, kind="stable")]
    accuracy = _guessed(inside, examples.tested_silent, shown)
    half = len(examples.tested_silent) * shown // (shown + 1)
    control = _guessed(examples.tested_silent[:half], examples.tested_silent[half:], shown)
    return IntruderScore(accuracy, control, 1 / (shown + 1))


def _guessed(inside: Windows, intruders: Windows, shown: int) -> Estimate | None:
    trials = min(len(inside) // shown, len(intruders))
    if not trials:
        return None
    vectors = tf_idf(joined([inside, intruders]))
    right = 0
    for i in range(trials):
        one = np.concatenate([vectors[i * shown : (i + 1) * shown], vectors[[len(inside) + i]]])
        likeness = one @ one.T
        np.fill_diagonal(likeness, 0.0)
        # Turned by one place per trial, so that windows that are all alike are guessed at chance.
        right += int(np.roll(likeness.sum(1), i).argmin()) == (shown + i) % (shown + 1)
    return wilson(right, trials, unit="trials")
