"""Tests of explanations: windows to tell apart, at random or hard ones, and the scores of a set of answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from workbench.controls.area import chance_above
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.core.html import Shown
from workbench.core.stats import Estimate, wilson
from workbench.features.explain.examples import Examples, Windows, joined

MARK_SHARE = 0.3
"""Tokens with at least this share of their window's largest activation are marked; wrong marks lie below it."""
RESAMPLES = 500


@dataclass(frozen=True, eq=False)
class Items:
    """Windows of a test, each with the right answer.

    Attributes:
        labels: True where the right answer is yes.
        marks: marked tokens, for fuzzing; None for detection.
        unusable: windows without a pair of right and wrong marks, because too few of their tokens lie below the
            threshold.
    """

    windows: Windows
    labels: np.ndarray
    marks: np.ndarray | None = None
    unusable: int = 0

    def __len__(self) -> int:
        return len(self.labels)


def detection_items(examples: Examples) -> Items:
    """Is the feature active in this window? As many windows with it as without, as far as there are."""
    return balanced_items(examples.tested, examples.tested_silent)


def balanced_items(active: Windows, silent: Windows) -> Items:
    """The first windows of each kind, the same number of both."""
    n = min(len(active), len(silent))
    return Items(joined([active[:n], silent[:n]]), np.repeat([True, False], n))


def fuzzing_items(examples: Examples, seed: int = 0) -> Items:
    """Are the marks on the tokens that activate the feature? Each window with right marks and with as many wrong ones.

    Wrong marks are drawn per window from the tokens of known activation below the threshold.
    """
    right, wrong, usable = [], [], []
    random = np.random.default_rng([seed, examples.feature])
    known = examples.tested.known
    for i in range(len(examples.tested)):
        values = np.where(known[i], examples.tested.values[i], np.nan)
        limit = MARK_SHARE * np.nanmax(values)
        marked = np.nan_to_num(values, nan=-1.0) >= limit
        free = (known[i] & ~marked).nonzero()[0]
        if len(free) < marked.sum():
            continue
        other = np.zeros_like(marked)
        other[random.choice(free, int(marked.sum()), replace=False)] = True
        right.append(marked)
        wrong.append(other)
        usable.append(i)
    chosen = examples.tested[np.array(usable, dtype=int)]
    marks = np.array([*right, *wrong], dtype=bool).reshape(-1, examples.tested.values.shape[1])
    return Items(joined([chosen, chosen]), np.repeat([True, False], len(usable)), marks, len(known) - len(usable))


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


def answer_scores(labels: np.ndarray, answers: np.ndarray, documents: np.ndarray, seed: int = 0) -> dict[str, Estimate]:
    """Balanced accuracy, precision, recall and F1 of yes-or-no answers, with intervals by resampling documents.

    Precision and F1 of a set that never says yes are 0.

    Raises:
        ShapeError: if the three do not pair up.
        DegenerateInputError: if a class is missing.

    >>> yes, no = np.array([True, True, False, False]), np.array([True, False, False, False])
    >>> scores = answer_scores(yes, no, np.arange(4))
    >>> scores["balanced_accuracy"].value, round(scores["f1"].value, 4)  # (1/2 + 2/2) / 2, and 2 * 1 / (2 + 0 + 1)
    (0.75, 0.6667)
    """
    _check(labels, answers, documents)
    cells = np.stack([labels & answers, labels & ~answers, ~labels & answers, ~labels & ~answers], 1).astype(float)
    weights = _weights(documents, seed)
    point, draws = _ratios(cells.sum(0)[None]), _ratios(weights @ cells)
    n = len(np.unique(documents))
    return {name: _estimate(float(point[name][0]), draws[name], n) for name in point}


def auroc(labels: np.ndarray, scores: np.ndarray, documents: np.ndarray, seed: int = 0) -> Estimate:
    """Chance that a right yes scores above a right no, ties half, with an interval by resampling documents.

    >>> auroc(np.array([True, False, False]), np.array([2.0, 1.0, 2.0]), np.arange(3)).value  # (1 + .5) / 2
    0.75
    """
    _check(labels, scores, documents)
    draws = _area_draws(labels, scores, _weights(documents, seed))
    return _estimate(_area(labels, scores), draws, len(np.unique(documents)))


def auroc_difference(
    labels: np.ndarray, scores: np.ndarray, others: np.ndarray, documents: np.ndarray, seed: int = 0
) -> Estimate:
    """AUROC of some scores less that of other scores on the same windows, with an interval by resampling documents.

    >>> labels, documents = np.array([True, False]), np.arange(2)
    >>> auroc_difference(labels, np.array([1.0, 0.0]), np.array([0.0, 0.0]), documents).value  # 1 - .5
    0.5
    """
    _check(labels, scores, documents)
    weights = _weights(documents, seed)
    draws = _area_draws(labels, scores, weights) - _area_draws(labels, others, weights)
    return _estimate(_area(labels, scores) - _area(labels, others), draws, len(np.unique(documents)))


def _area(labels: np.ndarray, scores: np.ndarray) -> float:
    return chance_above(scores[labels], scores[~labels])


def _area_draws(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The area in each resample; nan where a kind is missing."""
    wins = (scores[labels][:, None] > scores[~labels]) + 0.5 * (scores[labels][:, None] == scores[~labels])
    yes, no = weights[:, labels], weights[:, ~labels]
    total = yes.sum(1) * no.sum(1)
    won = ((yes @ wins) * no).sum(1)
    return np.divide(won, total, out=np.full(len(total), np.nan), where=total > 0)


def frequency_weighted(f1: Sequence[float], counts: Sequence[int]) -> float:
    """Mean F1 over features, each weighted by the number of its active tokens.

    Raises:
        DegenerateInputError: without any active token.

    >>> frequency_weighted([1.0, 0.5], [1, 3])  # (1 * 1 + .5 * 3) / 4
    0.625
    """
    if len(f1) != len(counts) or not sum(counts):
        raise DegenerateInputError(
            f"frequency_weighted: {len(f1)} scores and {len(counts)} counts with sum {sum(counts)}. Give one count per "
            "score, not all zero."
        )
    return float(np.dot(f1, counts) / np.sum(counts))


def _check(labels: np.ndarray, answers: np.ndarray, documents: np.ndarray) -> None:
    if not len(labels) == len(answers) == len(documents):
        raise ShapeError(
            f"{len(labels)} labels, {len(answers)} answers, {len(documents)} documents. Give one of each per window."
        )
    if labels.all() or not labels.any():
        raise DegenerateInputError(
            f"{int(labels.sum())} of {len(labels)} right answers are yes. Give windows of each kind."
        )


def _weights(documents: np.ndarray, seed: int) -> np.ndarray:
    """Number of times that each item counts in each resample of documents."""
    unique, inverse = np.unique(documents, return_inverse=True)
    return _draws(len(unique), seed)[:, inverse]


@functools.lru_cache(maxsize=256)
def _draws(n: int, seed: int) -> np.ndarray:
    """Number of times that each of n documents is drawn in each resample; kept, because drawing takes longest."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)


def _ratios(sums: np.ndarray) -> dict[str, np.ndarray]:
    hit, missed, wrong, rejected = sums.T
    yes, no = hit + missed, wrong + rejected
    nan = np.full(len(sums), np.nan)
    recall = np.divide(hit, yes, out=nan.copy(), where=yes > 0)
    specificity = np.divide(rejected, no, out=nan.copy(), where=no > 0)
    fired = hit + wrong
    precision = np.divide(hit, fired, out=np.zeros(len(sums)), where=fired > 0)
    f1 = np.divide(2 * hit, fired + yes, out=np.zeros(len(sums)), where=fired + yes > 0)
    return {"balanced_accuracy": (recall + specificity) / 2, "precision": precision, "recall": recall, "f1": f1}


def _estimate(point: float, draws: np.ndarray, n: int) -> Estimate:
    # A resample without one of the kinds has no value.
    valid = draws[~np.isnan(draws)]
    low, high = np.quantile(valid, [0.025, 0.975]) if len(valid) else (0.0, 1.0)
    return Estimate(point, float(low), float(high), n, "percentile bootstrap over documents", "documents")


@dataclass(frozen=True)
class IntruderScore(Shown):
    """Whether windows with a feature can be told from one without it by likeness alone, without any explanation.

    Attributes:
        accuracy: share of trials in which the window without the feature was found; None without a full trial.
        control: the same where none of the windows has the feature, and one of them is called the intruder.
        chance: 1 / windows per trial.
    """

    accuracy: Estimate | None
    control: Estimate | None
    chance: float


@checked
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
