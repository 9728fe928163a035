"""k-sparse probing: how much of a label a few features hold, beside as few residual channels and a random SAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from workbench.core.display import first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.numbers import counted
from workbench.core.similarity import SparseMatrix
from workbench.core.stats import ANY, SHARE, Estimate, student_mean
from workbench.report.base import Headline, Report, Says, Section, Table, beside

Columns: TypeAlias = np.ndarray | SparseMatrix  # one column per input of a probe


@dataclass(frozen=True, kw_only=True)
class ProbingOptions:
    """How labels are probed.

    Attributes:
        ks: numbers of features that a probe may use.
        reseeds: splits, samples and shuffles; the interval is over them.
        per_class: examples of each class in training and test together, at most.
        test_share: share of the documents that are held out.
        seed: of the first reseed.
    """

    ks: tuple[int, ...] = (1, 2, 5)
    reseeds: int = 5
    per_class: int = 400
    test_share: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or self.reseeds < 2 or not 0 < self.test_share < 1:
            raise InvalidInputError(f"{self}: needs ks of at least 1, two reseeds and a test share between 0 and 1.")


@dataclass(frozen=True, eq=False)
class Examples:
    """One labelled set as vectors.

    Attributes:
        acts: feature activations by the name of the SAE, `scipy.sparse` matrices `(n, d_sae)`; "SAE" and "random SAE".
    """

    name: str
    x: np.ndarray
    acts: dict[str, SparseMatrix]
    labels: np.ndarray
    documents: np.ndarray

    def __post_init__(self) -> None:
        sizes = {len(self.x), len(self.labels), len(self.documents), *(a.shape[0] for a in self.acts.values())}
        if len(sizes) != 1:
            raise ShapeError(
                f"Examples({self.name!r}): {first_few(sorted(sizes))} rows; x, acts, labels and documents must pair."
            )


@dataclass(frozen=True)
class ProbeScore:
    """One probe on held-out documents; t intervals over reseeds.

    Attributes:
        reads: "SAE", "residual channels", "random SAE", "full residual" or "SAE, shuffled labels".
        k: inputs of the probe; 0 for all.
        accuracy: share right; classes are balanced, so that chance is 0.5.
        by_reseed: the accuracy of each reseed; all probes of a set have the same splits.
    """

    task: str
    reads: str
    k: int
    accuracy: Estimate
    f1: Estimate
    by_reseed: tuple[float, ...]

    @property
    def sd(self) -> float:
        """Standard deviation of the accuracy over reseeds."""
        return float(np.std(self.by_reseed, ddof=1))


@dataclass(frozen=True)
class ProbingReport(Report):
    """k-sparse probes of an SAE on several labelled sets, beside their controls."""

    scores: tuple[ProbeScore, ...]

    def mean(self, reads: str, k: int) -> Estimate:
        """Mean accuracy over the sets, with a t interval over them; of one set, over its reseeds."""
        return _over_sets(self._by_reseed(reads, k), SHARE)

    def ahead(self, reads: str, k: int, other: str) -> Estimate:
        """Mean over the sets of the accuracy of one probe minus that of another with as many inputs, set by set."""
        pairs = zip(self._by_reseed(reads, k), self._by_reseed(other, k), strict=True)
        return _over_sets([np.subtract(mine, theirs) for mine, theirs in pairs])

    def _by_reseed(self, reads: str, k: int) -> list[np.ndarray]:
        return [np.array(s.by_reseed) for s in self.scores if (s.reads, s.k) == (reads, k)]

    def findings(self) -> tuple[str, ...]:
        """Mean accuracies per k, and how far they are ahead of the controls."""
        lines = []
        for k in sorted({s.k for s in self.scores if s.reads == "SAE"}):
            ahead = {other: self.ahead("SAE", k, other) for other in ("residual channels", "random SAE")}
            channels, random = (f"{by.words('worse', 'better')} (the SAE is ahead by {by})" for by in ahead.values())
            lines.append(
                f"With {counted(k, 'features')} the SAE reaches accuracy {self.mean('SAE', k)}; "
                f"{counted(k, 'residual channels')}: {channels}; a random SAE: {random}."
            )
        largest = max(s.k for s in self.scores)
        full, shuffled = self.mean("full residual", 0), self.mean("SAE, shuffled labels", largest)
        return (*lines, f"A probe of the whole residual reaches {full}; with shuffled labels it is {shuffled}.")

    def headline(self) -> Headline:
        """Accuracy with the most features, beside as many of a random SAE."""
        return Headline.of(
            Says(*(
                f"A few SAE features tell labels apart {how} as many features of a random SAE."
                for how in ("better than", "no better than", "worse than")
            )),
            self._beside(),
        )  # fmt: skip

    def _beside(self) -> Table:
        k = max(s.k for s in self.scores if s.reads == "SAE")
        size, control = counted(k, "features"), "random SAE"
        value, other = (f"SAE, {size}", self.mean("SAE", k)), (f"{control}, {size}", self.mean(control, k))
        return beside("accuracy", value, other, self.ahead("SAE", k, control))

    def section(self) -> Section:
        """One row per probe."""
        rows = tuple((s.task, s.reads, s.k or "all", s.accuracy, s.f1, s.sd) for s in self.scores)
        caption = "Held-out documents; balanced classes, chance is 0.5; t intervals over reseeds."
        table = Table(("set", "probe reads", "k", "accuracy", "F1", "sd"), rows, caption)
        keys = dict.fromkeys((s.reads, s.k) for s in self.scores)
        metrics = {
            f"{reads.replace(' ', '_').replace(',', '')}_k{k or 'all'}": self.mean(reads, k) for reads, k in keys
        }
        return Section("k-sparse probing", (table, self._beside()), self.findings(), {**metrics}, self.headline())


def probe_sets(sets: Sequence[Examples], options: ProbingOptions | None = None) -> ProbingReport:
    """k-sparse probes of every set.

    Features are chosen by the largest `|mean of class 1 - mean of class 0|` on the training half; the probe is an L2
    logistic regression with C = 1 on standardised inputs.

    Raises:
        DegenerateInputError: for no sets, or for one with too few examples or documents.
    """
    options = options or ProbingOptions()
    if not sets:
        raise DegenerateInputError("probe_sets: there is no labelled set.")
    return ProbingReport(tuple(score for examples in sets for score in _probe(examples, options)))


def _probe(examples: Examples, options: ProbingOptions) -> list[ProbeScore]:
    scored: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for reseed in range(options.reseeds):
        random = np.random.default_rng(options.seed + reseed)
        train, test = split_by_document(examples, options, random)
        shuffled = random.permutation(examples.labels[train])
        inputs = {"SAE": examples.acts["SAE"], "residual channels": examples.x, **examples.acts}
        for k in options.ks:
            for name, values in inputs.items():
                scored.setdefault((name, k), []).append(_fit(values, examples.labels, train, test, k))
        largest = max(options.ks)
        null = _fit(examples.acts["SAE"], examples.labels, train, test, largest, shuffled)
        scored.setdefault(("SAE, shuffled labels", largest), []).append(null)
        scored.setdefault(("full residual", 0), []).append(_fit(examples.x, examples.labels, train, test, 0))
    return [
        ProbeScore(
            examples.name, reads, k, t_mean([a for a, _ in pairs], within=SHARE),
            t_mean([f for _, f in pairs], within=SHARE),
            tuple(a for a, _ in pairs),
        )
        for (reads, k), pairs in scored.items()
    ]  # fmt: skip


def split_by_document(
    examples: Examples, options: ProbingOptions, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of balanced training and test examples of different documents.

    Raises:
        DegenerateInputError: if a class has fewer than four examples on either side.
    """
    documents = random.permutation(np.unique(examples.documents))
    n_test = max(1, round(options.test_share * len(documents)))
    held = np.isin(examples.documents, documents[:n_test])
    parts = []
    for side, share in ((~held, 1 - options.test_share), (held, options.test_share)):
        of_class = [np.flatnonzero(side & (examples.labels == label)) for label in (0, 1)]
        n = min(*map(len, of_class), round(share * options.per_class))
        if n < 4:
            raise DegenerateInputError(
                f"Set {examples.name!r}: a class has {n} examples in {len(documents)} documents on one side of the "
                "split; at least 4 are needed. Give more text."
            )
        parts.append(np.concatenate([random.permutation(rows)[:n] for rows in of_class]))
    return parts[0], parts[1]


def _fit(
    values: Columns,
    labels: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    k: int,
    train_labels: np.ndarray | None = None,
) -> tuple[float, float]:
    """Accuracy and F1 on the test rows; `train_labels` replace those of the training rows."""
    y = labels[train] if train_labels is None else train_labels
    columns = top_columns(values[train], y, k) if k else np.arange(values.shape[1])
    seen, unseen = (dense(values[rows][:, columns]) for rows in (train, test))
    predicted = logistic(seen, y).predict(unseen)
    return float((predicted == labels[test]).mean()), f1(labels[test], predicted)


def top_columns(values: Columns, labels: np.ndarray, k: int) -> np.ndarray:
    """The k columns with the largest difference of class means, largest first; dense or sparse rows.

    >>> top_columns(np.array([[0.0, 5.0, 1.0], [0.0, 5.0, 4.0]]), np.array([0, 1]), 1)
    array([2])
    """
    difference = np.abs(class_difference(values, labels))
    return np.argsort(-difference, kind="stable")[:k]


def class_difference(values: Columns, labels: np.ndarray) -> np.ndarray:
    """Mean of class 1 minus mean of class 0, per column."""
    one, zero = (np.asarray(values[labels == label].mean(axis=0)).ravel() for label in (1, 0))
    return one - zero


def dense(values: Columns) -> np.ndarray:
    """A few columns as a dense array."""
    return np.asarray(values if isinstance(values, np.ndarray) else values.todense(), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """A fitted logistic regression on standardised columns."""

    pipeline: Any  # of scikit-learn, which has no types

    def predict(self, x: np.ndarray) -> np.ndarray:
        """0 or 1 for each row."""
        return self.pipeline.predict(x)

    def accuracy(self, x: np.ndarray, labels: np.ndarray) -> float:
        """Share of the rows that are told right."""
        return float((self.predict(x) == labels).mean())

    @property
    def direction(self) -> np.ndarray:
        """Weights in the units of the raw inputs."""
        return self.pipeline[1].coef_[0] / self.pipeline[0].scale_


def logistic(x: np.ndarray, y: np.ndarray) -> LogisticProbe:
    """L2 logistic regression, C = 1, on standardised columns."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return LogisticProbe(make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000)).fit(x, y))


def f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """F1 of class 1; 0 where it is neither there nor predicted.

    >>> round(f1(np.array([1, 1, 0]), np.array([1, 0, 0])), 4)  # 2 * 1 / (2 + 1)
    0.6667
    """
    hits, total = np.sum((truth == 1) & (predicted == 1)), np.sum(truth == 1) + np.sum(predicted == 1)
    return float(2 * hits / total) if total else 0.0


def _over_sets(by_reseed: Sequence[np.ndarray], within: tuple[float, float] = ANY) -> Estimate:
    """Over the means of the sets; over the reseeds of a set that stands alone."""
    if len(by_reseed) == 1:
        return t_mean(by_reseed[0], within=within)
    return t_mean([x.mean() for x in by_reseed], unit="sets", within=within)


def t_mean(
    values: Sequence[float] | np.ndarray, level: float = 0.95, unit: str = "reseeds", within: tuple[float, float] = ANY
) -> Estimate:
    """Mean with a t interval; over reseeds the text is the same, so that it says nothing about other text.

    >>> round(t_mean([0.0, 1.0]).high, 3)  # 0.5 + 12.706 * sqrt(0.5 / 2)
    6.853
    """
    x = np.asarray(values, dtype=np.float64)
    return student_mean(x.mean(), x, unit, f"t interval over {unit}", level, within)
