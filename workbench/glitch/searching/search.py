"""Searches for glitch tokens side by side: what each finds, and what it costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from workbench.core.errors import DegenerateInputError, require, require_known
from workbench.core.progress import track
from workbench.glitch.counting.census_result import CensusPlan, ranking
from workbench.glitch.searching.gradient import GradientOptions, climb
from workbench.glitch.searching.hunter import HunterOptions, hunt
from workbench.glitch.searching.oracle import Found, Oracle, in_order
from workbench.glitch.searching.search_report import SearchReport, SearchRuns
from workbench.glitch.verification.probing import Prober
from workbench.glitch.verification.verify import VERIFIED
from workbench.hooks.ends import embedding
from workbench.models.model import Model

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
        methods=METHODS,
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
