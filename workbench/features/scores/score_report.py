"""Report on the scores of an SAE's features, with their controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.core.errors import InvalidInputError
from workbench.core.jsontext import Record
from workbench.core.numbers import counted, number, setting
from workbench.core.stats import SHARE, Estimate, sample_mean, wilson
from workbench.report.base import Block, Headline, Histogram, Lines, Metric, Report, Says, Section, Series, Table, Text

MIN_DRAWN_SCORE = 1e-12
"""Smaller scores are drawn at this value, on a logarithmic axis."""

MIN_SHOWN_SCORE = 1e-6
"""Where the curve over the output score begins."""


@dataclass(frozen=True, kw_only=True)
class FeatureScoreReport(Report):
    """Distributions, shares and co-occurrence of input and output scores.

    Attributes:
        n: features scored; `n_dead` of them were active on no token read, `n_few` on too few rows for an input score.
        output_scores: of features that are alive.
        random_output_scores: of random directions with the features' norms.
        input_scores: of features with enough contexts.
        shuffled_input_scores: of the same features against the lens tokens of other features.
        above: share of alive features with an output score of at least `threshold`.
        random_above: the same share of random directions.
        input_mean: mean input score; `shuffled_input_mean` is its control.
        pmi: log2 of P(high input and high output) / (P(high input) P(high output)); None where a margin is empty.
        both: share of features with both scores high; `independent` is the product of the two shares.
        best: feature, output score, input score, frequency and lens tokens of the best features.
    """

    meta: Record
    n: int
    n_dead: int
    n_few: int
    threshold: float
    high: float
    output_scores: tuple[float, ...]
    random_output_scores: tuple[float, ...]
    input_scores: tuple[float, ...]
    shuffled_input_scores: tuple[float, ...]
    above: Estimate | None
    random_above: Estimate | None
    input_mean: Estimate | None
    shuffled_input_mean: Estimate | None
    both: Estimate | None
    independent: float | None
    pmi: Estimate | None
    best: tuple[tuple[int, float, float, float, str], ...]

    def findings(self) -> tuple[str, ...]:
        """The scores compared with their controls, in sentences."""
        n_tokens = self.meta.get("n_tokens")
        dead = (
            f"; {self.n_dead} of them were never active on the {counted(n_tokens, 'tokens')} read" if n_tokens else ""
        )
        sentences = [f"{counted(self.n, 'features')} scored{dead}."]
        if self.above is not None and self.random_above is not None:
            verdict = "more than" if self.above.low > self.random_above.high else "not clearly more than"
            sentences.append(
                f"Share with an output score of at least {setting(self.threshold)}: {self.above} of the live features, "
                f"{verdict} random directions of the same norm, {self.random_above}."
            )
        if self.input_mean is not None and self.shuffled_input_mean is not None:
            verdict = "above" if self.input_mean.low > self.shuffled_input_mean.high else "not clearly above"
            sentences.append(
                f"Mean input score {self.input_mean}, {verdict} the score against other features' tokens, "
                f"{self.shuffled_input_mean}; {counted(self.n_few, 'features')} had too few contexts for one."
            )
        return (*sentences, self._co_occurrence()) if self.both is not None else tuple(sentences)

    def _co_occurrence(self) -> str:
        alone = number(self.independent)
        share = f"Both scores at least {setting(self.high)}: {self.both}; independent scores would give {alone}"
        if self.pmi is None:
            return f"{share}. No pointwise mutual information: no feature has a high score on one of the sides."
        if self.pmi.excludes(0.0):
            more = "more" if self.pmi.value > 0 else "less"
            return f"{share}, so the two go together {more} often than chance (PMI {self.pmi} bits)."
        return f"{share}; no dependence is shown (PMI {self.pmi} bits)."

    def section(self) -> Section:
        """Histograms of scores and controls, and the best features."""
        metrics: dict[str, Metric] = {"n_features": self.n, "n_dead": self.n_dead, "n_too_few_contexts": self.n_few}
        for name in ("above", "random_above", "input_mean", "shuffled_input_mean", "both", "pmi"):
            if (value := getattr(self, name)) is not None:
                metrics[name] = value
        return Section("Feature scores", (*self._blocks(),), self.findings(), metrics, self.headline())

    def headline(self) -> Headline:
        """Share of output features beside that of random directions."""
        table, column = self._beside_controls(), self._above
        return Headline.read(
            Says(*(
                f"Steering with a feature writes the tokens that it promotes {more} often than steering with a random "
                "direction writes its own."
                for more in ("more", "no more", "less")
            )),
            value=(table, "features", column), control=(table, "random directions", column),
            measure=f"share of features with an output score of at least {setting(self.threshold)}",
        )  # fmt: skip

    @property
    def _above(self) -> str:
        return f"output score of at least {setting(self.threshold)}"

    def _beside_controls(self) -> Table:
        rows = (
            ("features", self.above, self.input_mean),
            ("random directions", self.random_above, None),
            ("contexts of other features", None, self.shuffled_input_mean),
        )
        return Table(("scored", self._above, "mean input score"), rows, "Scores beside their controls")

    def _curves(self) -> list[Block]:
        groups = {"features": self.output_scores, "random directions": self.random_output_scores}
        grid = np.geomspace(MIN_SHOWN_SCORE, 1.0, 61)
        series = tuple(
            Series(name, tuple(grid.tolist()), tuple((np.asarray(scores)[:, None] >= grid).mean(0).tolist()))
            for name, scores in groups.items()
            if scores
        )
        title, x_label = "Share with at least this output score", "output score"
        return [Lines(title, series, x_label, "share", log_x=True)] if series else []

    def _blocks(self) -> list[Block]:
        meta = self.meta
        blocks: list[Block] = [Text(
            f"Site {meta.get('site')} of {meta.get('model')}. Output score: last token of {meta.get('prompt')!r} "
            f"steered with {meta.get('strength')} times the largest activation there, score of the best of "
            f"{meta.get('k')} logit-lens tokens, steered run only, in {meta.get('precision')}. Input score: share of a "
            "feature's top contexts whose most activating token is a lens token."
        )]  # fmt: skip
        blocks += [*self._curves(), self._beside_controls()]
        blocks += _histogram("Output score", self.output_scores, "features", log=True)
        blocks += _histogram("Output score of random directions", self.random_output_scores, "directions", log=True)
        blocks += _histogram("Input score", self.input_scores, "features")
        blocks += _histogram("Input score, contexts of other features", self.shuffled_input_scores, "features")
        rows = tuple(tuple(None if v != v else v for v in row) for row in self.best)  # nan: not measured
        columns = ("feature", "output score", "input score", "frequency", "lens tokens")
        return [*blocks, Table(columns, rows, "Features with the highest output scores")] if rows else blocks


def _histogram(title: str, values: Sequence[float], unit: str, log: bool = False) -> list[Block]:
    if not values:
        return []
    shown = tuple(max(v, MIN_DRAWN_SCORE) for v in values) if log else tuple(values)
    floor = f"; scores below {setting(MIN_DRAWN_SCORE)} are drawn there" if log else ""
    caption = f"{counted(len(values), unit)}{floor}"
    return [Histogram(title, shown, x_label="score", y_label=unit, log_x=log, caption=caption)]


def score_report(
    df: Any, meta: Record, controls: Mapping[str, Sequence[float]], threshold: float, high: float
) -> FeatureScoreReport:
    """The report of a feature table; see `FeatureTable.report`."""
    if math.isnan(threshold) or math.isnan(high):
        raise InvalidInputError(f"threshold={threshold}, high={high}: give numbers to compare scores with.")
    dead = df["frequency"].to_numpy() == 0
    alive = df[~dead]
    outputs, inputs = _known(alive["output_score"]), _known(alive["input_score"])
    random, shuffled = (_known(controls.get(name, ())) for name in ("random_output_score", "shuffled_input_score"))
    pair = alive[["input_score", "output_score"]].dropna().to_numpy()
    both, independent, pmi = co_occurrence(pair[:, 0] >= high, pair[:, 1] >= high) if len(pair) else (None, None, None)
    best = alive.sort_values("output_score", ascending=False)[:15]
    return FeatureScoreReport(
        meta=meta, n=len(df), n_dead=int(dead.sum()), threshold=threshold, high=high,
        n_few=int((alive["n_contexts"] < meta.get("min_contexts", 0)).sum()) if meta.get("n_tokens") else 0,
        output_scores=tuple(outputs.tolist()), random_output_scores=tuple(random.tolist()),
        input_scores=tuple(inputs.tolist()), shuffled_input_scores=tuple(shuffled.tolist()),
        above=_share(outputs >= threshold, "features"), random_above=_share(random >= threshold, "directions"),
        input_mean=_mean(inputs), shuffled_input_mean=_mean(shuffled),
        both=both, independent=independent, pmi=pmi,
        best=tuple(
            (int(r["feature"]), float(r["output_score"]), float(r["input_score"]), float(r["frequency"]),
             " · ".join(repr(t)[1:-1] for t in list(r["top_tokens"])[:6]))
            for _, r in best.iterrows() if not math.isnan(r["output_score"])
        ),
    )  # fmt: skip


def _known(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    return array[np.isfinite(array)]


def _share(hits: np.ndarray, unit: str) -> Estimate | None:
    return wilson(int(hits.sum()), len(hits), unit=unit) if len(hits) else None


def _mean(values: np.ndarray) -> Estimate | None:
    return sample_mean(values, unit="features", within=SHARE) if len(values) else None


def co_occurrence(
    a: np.ndarray, b: np.ndarray, seed: int = 0, resamples: int = 2000
) -> tuple[Estimate, float, Estimate | None]:
    """Share of rows where both hold, the product of the two shares, and their pointwise mutual information in bits.

    The interval of the PMI is a percentile bootstrap over rows (a multinomial draw of the 2 x 2 table, which is the
    same thing), with half a row added to each cell so that an empty cell gives a finite value. None if one of the two
    never holds.

    >>> both, independent, pmi = co_occurrence(np.array([1, 1, 0, 0]) > 0, np.array([1, 1, 0, 0]) > 0)
    >>> both.value, independent  # 2/4, and 2/4 * 2/4
    (0.5, 0.25)
    """
    n = len(a)
    cells = np.array([(a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()], dtype=float)
    both = wilson(int(cells[0]), n, unit="features")
    independent = float(a.mean() * b.mean())
    if not a.any() or not b.any():
        return both, independent, None
    draws = np.random.default_rng(seed).multinomial(n, cells / n, size=resamples)
    low, high = np.quantile(_pmi(draws), [0.025, 0.975]).tolist()
    point, method = float(_pmi(cells[None])[0]), "percentile bootstrap, half a row added per cell"
    return both, independent, Estimate(point, low, high, n, method, "features")


def _pmi(cells: np.ndarray) -> np.ndarray:
    p = cells + 0.5
    p = p / p.sum(axis=1, keepdims=True)
    return np.log2(p[:, 0] / ((p[:, 0] + p[:, 1]) * (p[:, 0] + p[:, 2])))
