"""Searches for glitch tokens side by side: what each finds, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from workbench.core.errors import DegenerateInputError, require, require_known
from workbench.core.jsontext import Json
from workbench.core.numbers import counted, number, with_interval
from workbench.core.progress import track
from workbench.core.records import to_jsonable
from workbench.core.stats import SHARE, Estimate, clopper_pearson, sample_mean
from workbench.glitch.counting.plan import CensusPlan, ranking
from workbench.glitch.reporting import TokenReport, measured, shown
from workbench.glitch.searching.gradient import GradientOptions, climb
from workbench.glitch.searching.hunter import HunterOptions, hunt
from workbench.glitch.searching.oracle import Found, Oracle, in_order
from workbench.glitch.verification.probing import Prober
from workbench.glitch.verification.verify import VERIFIED
from workbench.hooks.ends import embedding
from workbench.models.model import Model
from workbench.report.base import Block, Headline, Lines, Metric, Says, Series, Table

if TYPE_CHECKING:
    import pandas as pd

_POINTS = 120
_ROWS = 60


@dataclass(frozen=True, eq=False)
class SearchRuns:
    """The runs of one search: one, or one per seed."""

    name: str
    runs: tuple[Found, ...]

    @property
    def calls(self) -> float:
        """Mean number of tokens tested."""
        return float(np.mean([run.calls for run in self.runs]))

    def precision(self, calls: int | None = None) -> Estimate:
        """Share of the tested tokens that are glitch tokens; `calls` takes only the first so many of each run."""
        return _over_runs([run.precision for run in self._first(calls)])

    def recall(self, n_glitch: int, calls: int | None = None) -> Estimate:
        """Share of all glitch tokens that are found; several runs give their mean with an interval over runs."""
        return _over_runs([run.recall(n_glitch) for run in self._first(calls)])

    @property
    def n_found(self) -> float:
        """Mean number of glitch tokens found."""
        return float(np.mean([run.n_found for run in self.runs]))

    def _first(self, calls: int | None) -> list[Found]:
        return [run if calls is None else run.first(calls) for run in self.runs]


def _over_runs(shares: list[Estimate]) -> Estimate:
    """The mean over runs; its interval is that over runs or that of one run's tokens, whichever reaches further.

    Runs that agree, such as two without any find, say nothing of how sure their share is: it is that of their tokens.
    """
    if len(shares) == 1:
        return shares[0]
    values = [share.value for share in shares]
    mean = sample_mean(values, unit="runs", within=SHARE)
    low, high = (float(np.mean([getattr(share, end) for share in shares])) for end in ("low", "high"))
    if min(values) == max(values):
        return dataclasses.replace(mean, low=low, high=high)
    return dataclasses.replace(mean, low=min(mean.low, low), high=max(mean.high, high))


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchReport(TokenReport):
    """Result of `search`.

    `n_glitch` counts glitch tokens by a census; None if they are not known. `token` is the text of those found.
    """

    _title = "Searches for glitch tokens in {self.model}"

    model: str
    n_tokens: int
    n_glitch: int | None
    searches: tuple[SearchRuns, ...]
    dtype: str
    indicator: str | None
    token: Mapping[int, str]

    def search(self, name: str) -> SearchRuns | None:
        """The runs of one search, or None if it did not run."""
        return next((search for search in self.searches if search.name == name), None)

    def base_rate(self) -> Estimate | None:
        """Share of glitch tokens among all: from the census, else from the first random run; None without either."""
        if self.n_glitch is not None:
            return clopper_pearson(self.n_glitch, self.n_tokens, unit="tokens")
        random = self.search("random")
        return None if random is None else random.runs[0].precision

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers per search."""
        metrics: dict[str, Metric | None] = {
            "n_tokens": self.n_tokens, "n_found": len(self.token), "n_glitch": self.n_glitch
        }  # fmt: skip
        for search in self.searches:
            metrics |= {f"{search.name}.calls": search.calls, f"{search.name}.precision": search.precision(),
                        f"{search.name}.recall": self._recall(search)}  # fmt: skip
        return measured(metrics)

    def _recall(self, search: SearchRuns) -> Estimate | None:
        return search.recall(self.n_glitch) if self.n_glitch else None

    def headline(self) -> Headline:
        """Precision of the first search that is no control, beside random order."""
        found = [search for search in self.searches if search.name != "random"] or list(self.searches)
        table = self._compared()
        return Headline.read(
            Says(
                "Searching finds glitch tokens with fewer tests than a random order of tokens.",
                "Searching finds no more glitch tokens per test than a random order of tokens.",
                "Searching finds fewer glitch tokens per test than a random order of tokens.",
                "No random search was run beside it.",
            ),
            value=(table, found[0].name, "precision"), measure=f"precision of {found[0].name}",
            control=(table, "random", "precision") if self.search("random") is not None else None,
        )  # fmt: skip

    def findings(self) -> tuple[str, ...]:
        """What was found, in sentences."""
        return (self._truth(), *(self._said(search) for search in self.searches), *self._at_equal_cost())

    def _truth(self) -> str:
        share = self.base_rate()
        if self.n_glitch is not None:
            return (
                f"{self.n_glitch} of {number(self.n_tokens)} ordinary tokens of {self.model} are glitch tokens, by a "
                f"census ({self.dtype}); recall is measured against them."
            )
        if share is None:
            return "Recall is not known: there is no census, and no random search to estimate the total from."
        value, low, high = (self.n_tokens * part for part in (share.value, share.low, share.high))
        return (
            f"{len(self.token)} glitch tokens of {self.model} found by all searches together. Recall is not known; by "
            f"the random search there are {' '.join(with_interval(value, low, high))} among {number(self.n_tokens)}."
        )

    def _said(self, search: SearchRuns) -> str:
        recall, passes = self._recall(search), search.runs[0].gradient_passes
        tested = f"{counted(round(search.calls), 'tokens')} tested, precision {search.precision()}"
        tested += "" if recall is None else f", recall {recall}"
        more = f"; {counted(passes, 'gradient passes')} on top" if passes else ""
        return f"{search.name} ({METHODS[search.name]}): {tested}{more}."

    def _at_equal_cost(self) -> Iterator[str]:
        others = [search for search in (self.search("indicator"), self.search("random")) if search is not None]
        for search in (self.search("hunter"), self.search("gradient")):
            if search is not None and others:
                calls = round(search.calls)
                stopped = [SearchRuns(other.name, tuple(other._first(calls))) for other in others]
                listed = "; ".join(f"{other.name} {number(other.n_found)}" for other in stopped)
                finds = f"which finds {number(search.n_found)} glitch tokens"
                yield f"With the {counted(calls, 'calls')} of {search.name}, {finds}: {listed}."

    def to_json(self) -> dict[str, Json]:
        """Every run with its tokens in the order asked; glitch tokens with their text."""
        runs = [
            {"method": search.name, "seed": k, "asked": run.asked.tolist(),
             "glitch": run.asked[run.glitch].tolist(),
             "gradient_passes": run.gradient_passes, "notes": run.notes}
            for search in self.searches for k, run in enumerate(search.runs)
        ]  # fmt: skip
        return to_jsonable({
            "model": self.model, "dtype": self.dtype, "n_tokens": self.n_tokens, "n_glitch": self.n_glitch,
            "found": {str(i): text for i, text in sorted(self.token.items())}, "runs": runs,
            "metrics": self.metrics(), "findings": list(self.findings()),
        })  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """One row per run, as a pandas table."""
        import pandas as pd

        rows = [
            {"method": search.name, "run": k, "calls": run.calls, "gradient_passes": run.gradient_passes,
             "found": run.n_found, "precision": run.precision.value,
             "recall": run.recall(self.n_glitch).value if self.n_glitch else float("nan")}
            for search in self.searches for k, run in enumerate(search.runs)
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def _blocks(self) -> tuple[Block, ...]:
        return self._compared(), self._curves(), self._listed()

    def _compared(self) -> Table:
        rows = tuple(
            (search.name, len(search.runs), round(search.calls), search.runs[0].gradient_passes, search.n_found,
             search.precision(), self._recall(search), "; ".join(search.runs[0].notes))
            for search in self.searches
        )  # fmt: skip
        columns = ("search", "runs", "tokens tested", "gradient passes", "found", "precision", "recall", "first run")
        caption = f"{counted(self.n_tokens, 'ordinary tokens')}; several runs differ in their seed, their mean is shown"
        return Table(columns, rows, caption=caption)

    def _curves(self) -> Lines:
        series = []
        for search in self.searches:
            hits = np.cumsum(search.runs[0].glitch)
            at = np.unique(np.linspace(1, len(hits), min(_POINTS, len(hits))).astype(int))
            series.append(Series(search.name, tuple(at.tolist()), tuple(hits[at - 1].tolist())))
        return Lines(
            "Glitch tokens found", tuple(series), x_label="tokens tested", y_label="glitch tokens", log_x=True,
            caption="First run of each search, in the order in which it asked"
            + (f"; there are {self.n_glitch}" if self.n_glitch is not None else ""),
        )  # fmt: skip

    def _listed(self) -> Table:
        by = {
            search.name: set(np.concatenate([run.asked[run.glitch] for run in search.runs]).tolist())
            for search in self.searches
        }
        rows = tuple(
            (i, shown(text), ", ".join(name for name, ids in by.items() if i in ids))
            for i, text in sorted(self.token.items())[:_ROWS]
        )
        caption = f"{len(rows)} of {len(self.token)} glitch tokens found, with the searches that found them"
        return Table(("id", "token", "found by"), rows, caption=caption)


Method = Literal["indicator", "hunter", "gradient", "random"]
METHODS: dict[str, str] = {
    "indicator": "the ranking by weights alone, from the top",
    "hunter": "clusters of the input embedding, sampled; clean ones are dropped",
    "gradient": "a walk to where the answer's entropy should be highest",
    "random": "tokens in random order: the control",
}
"""Every search with what it does."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Which searches run, and how much they may ask.

    Attributes:
        budget: tokens that the ranking and the random order test; None takes as many as the dearest other search.
        seeds: runs of each search that draws at random.
        hunter: of the clusters; its seed is counted up from run to run.
    """

    methods: tuple[Method, ...] = ("indicator", "hunter", "gradient", "random")
    budget: int | None = None
    seeds: int = 3
    hunter: HunterOptions = HunterOptions()
    gradient: GradientOptions = GradientOptions()
    seed: int = 0

    def __post_init__(self) -> None:
        for method in self.methods:
            require_known("search", method, METHODS)
        is_valid = self.methods and self.seeds >= 1 and (self.budget is None or self.budget >= 1)
        require(bool(is_valid), self, f"name at least one of {', '.join(METHODS)}; seeds and budget are at least 1.")


def search(model: Model, plan: CensusPlan, prober: Prober, *, options: SearchOptions | None = None) -> SearchReport:
    """Runs the searches over the ordinary tokens with one oracle, and counts what each asks.

    With a prober that knows every ordinary token from a census, nothing but the gradients is computed, and recall is
    exact. Otherwise the tokens that are asked for are run, and recall is estimated from the random search.

    Raises:
        DegenerateInputError: if no ordinary token has a finite row.
    """
    options = options or SearchOptions()
    rows = embedding(model.hf).weight.detach()
    table = plan.scan.table
    ids = np.flatnonzero(table.ordinary)
    ids = ids[torch.isfinite(rows[torch.from_numpy(ids).to(rows.device)]).all(1).cpu().numpy()]
    if len(ids) < 2:
        raise DegenerateInputError(f"search: {len(ids)} ordinary tokens have a finite row. Check the model's weights.")
    best = prober.best[ids]
    n_glitch = None if np.isnan(best).any() else int((best < VERIFIED).sum())
    searches = _run(model, plan, ids, rows, prober.is_glitch, options)
    return SearchReport(
        model=plan.scan.model, n_tokens=len(ids), n_glitch=n_glitch, searches=tuple(searches), dtype=plan.dtype.dtype,
        indicator=plan.scan.indicator,
        token={int(i): table.token[int(i)] for one in searches for run in one.runs for i in run.asked[run.glitch]},
    )  # fmt: skip


def _run(
    model: Model, plan: CensusPlan, ids: np.ndarray, rows: torch.Tensor, oracle: Oracle, options: SearchOptions
) -> list[SearchRuns]:
    """Searches that decide themselves how much they ask, then those with a budget."""
    runs: dict[str, list[Found]] = {}
    if "hunter" in options.methods:
        for k in track(range(options.seeds), description="hunter", unit="runs"):
            seeded = dataclasses.replace(options.hunter, seed=options.seed + k)
            runs.setdefault("hunter", []).append(hunt(rows, ids, oracle, seeded))
    if "gradient" in options.methods:
        runs["gradient"] = [climb(model, plan.short, ids, oracle, options.gradient)]
    dearest = max((run.calls for some in runs.values() for run in some), default=len(ids) // 50)
    budget = min(options.budget or max(1, dearest), len(ids))
    if "indicator" in options.methods and plan.scan.indicator is not None:
        ranked = ranking(plan.scan)
        runs["indicator"] = [in_order(oracle, "indicator", ranked[np.isin(ranked, ids)], budget)]
    if "random" in options.methods:
        orders = [np.random.default_rng(options.seed + k).permutation(ids) for k in range(options.seeds)]
        runs["random"] = [in_order(oracle, "random", order, budget) for order in orders]
    return [SearchRuns(name, tuple(runs[name])) for name in METHODS if name in runs]
