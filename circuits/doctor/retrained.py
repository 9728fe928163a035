"""Checks that retrain a light head on masked items: ROAR and DiffROAR."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from circuits.doctor.attribution import Attribution, LabelledScores
from circuits.doctor.measures import averaged, mean_of
from circuits.doctor.report import Check, inapplicable, judged

REMOVED, KEPT = (0.1, 0.3, 0.5, 0.7, 0.9), (0.05, 0.1, 0.25, 0.5)
"""Shares of the items that are masked, and that are kept."""
SEEDS, MIN_ROWS = 5, 40
"""Splits of the rows; below so many rows a held-out half says too little."""
_RIDGE = 1.0


def roar(group: Sequence[Attribution], seed: int = 0) -> list[Check]:
    """Checks 7 and 8, on `values` whose masked items are at the mean of the training rows, in both halves."""
    labelled = [one.labelled_rows() for one in group]
    known = [rows for rows in labelled if rows is not None]
    if len(known) < len(group):
        why = group[0].why.get(7, "no classes of the inputs are known, so there is no head to retrain")
        return [inapplicable(7, why), inapplicable(8, why)]
    counts = np.unique(known[0].labels, return_counts=True)[1]
    if len(counts) != 2 or counts.min() * 2 < MIN_ROWS // 2 or counts.sum() < MIN_ROWS:
        why = f"needs two classes and {MIN_ROWS} inputs, and has {len(counts)} classes and {int(counts.sum())} inputs"
        return [inapplicable(7, why), inapplicable(8, why)]
    # Per seed and site: accuracy lost beyond random masking, and top minus bottom
    found = np.array([[_of_seed(rows, seed + s) for s in range(SEEDS)] for rows in known])
    lost, gained, whole = (averaged(list(found[..., c])) for c in range(3))
    return [
        Check(number=7, part="accuracy of the head on all items", value=mean_of(whole, "seeds")),
        judged(7, "accuracy lost beyond random items", mean_of(lost, "seeds"), 0.0, "above",
               "Masking the highest items costs no more than masking random ones."),
        judged(8, "accuracy on the highest minus the lowest items", mean_of(gained, "seeds"), 0.0, "above",
               "The highest items predict no better than the lowest."),
    ]  # fmt: skip


def _of_seed(rows: LabelledScores, seed: int) -> tuple[float, float, float]:
    random = np.random.default_rng((seed, 7))
    x, n_items = rows.values, rows.values.shape[1]
    train = _stratified(rows.labels, random)
    order = np.argsort(-np.abs(rows.scores), axis=1, kind="stable")
    drawn = random.permuted(np.tile(np.arange(n_items), (len(x), 1)), axis=1)

    def accuracy(ranked: np.ndarray) -> float:
        """With these items of each row masked."""
        masked = x.copy()
        np.put_along_axis(masked, ranked, np.take_along_axis(_means(x, train), ranked, axis=1), axis=1)
        return _accuracy(masked, rows.labels, train)

    counts = [round(share * n_items) for share in REMOVED]
    lost = [accuracy(drawn[:, :k]) - accuracy(order[:, :k]) for k in counts]
    kept = [max(1, round(share * n_items)) for share in KEPT]
    gained = [accuracy(order[:, k:]) - accuracy(order[:, : n_items - k]) for k in kept]
    return float(np.mean(lost)), float(np.mean(gained)), accuracy(order[:, :0])


def _means(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    return np.broadcast_to(x[train].mean(0), x.shape)


def _stratified(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """True for half of each class."""
    train = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == label))
        train[own[: (len(own) + 1) // 2]] = True
    return train


def _accuracy(x: np.ndarray, labels: np.ndarray, train: np.ndarray) -> float:
    """Held-out accuracy, mean over classes, of ridge regression on the class, on standardised items."""
    y = np.where(labels == labels.max(), 1.0, -1.0)
    mean, spread = x[train].mean(0), x[train].std(0)
    z = (x - mean) / np.where(spread > 0, spread, 1.0)
    gram = z[train] @ z[train].T
    weights = np.linalg.solve(gram + _RIDGE * np.eye(len(gram)), y[train] - y[train].mean())
    said = z[~train] @ (z[train].T @ weights) + y[train].mean()
    right = np.sign(said) == y[~train]
    return float(np.mean([right[y[~train] == c].mean() for c in (-1.0, 1.0)]))
