from __future__ import annotations

import json

import numpy as np
import pytest

from tests.glitch.tiny_copy import wordy_model
from workbench.core.errors import InvalidInputError, UnknownNameError
from workbench.glitch.counting.plan import CensusOptions, CensusPlan, plan_census, prober_of, ranking
from workbench.glitch.searching.gradient import GradientOptions
from workbench.glitch.searching.hunter import HunterOptions
from workbench.glitch.searching.oracle import Found
from workbench.glitch.searching.search import METHODS, SearchOptions, SearchReport, SearchRuns, search
from workbench.glitch.verification.probing import Prober
from workbench.report.base import Report

MODEL = wordy_model()
OPTIONS = SearchOptions(
    seeds=4,
    hunter=HunterOptions(neighbours=8, resolution=5.0),
    gradient=GradientOptions(iterations=3, batch_size=6, neighbours=10),
)


@pytest.fixture(scope="module")
def plan() -> CensusPlan:
    return plan_census(MODEL, options=CensusOptions(confirm=(), batch_size=64), measure_both=False)


@pytest.fixture(scope="module")
def truth(plan: CensusPlan) -> Prober:
    prober = prober_of(MODEL, plan)
    prober.best_probabilities(plan.ids)
    return prober


@pytest.fixture(scope="module")
def report(plan: CensusPlan, truth: Prober) -> SearchReport:
    return search(MODEL, plan, truth, options=OPTIONS)


def test_every_search_runs_against_the_same_truth(plan: CensusPlan, truth: Prober, report: SearchReport) -> None:
    assert isinstance(report, Report) and [one.name for one in report.searches] == list(METHODS)
    plain = set(np.flatnonzero(plan.scan.table.ordinary).tolist())
    assert report.n_tokens == len(plain)
    assert report.n_glitch == sum(truth.best[i] < 0.01 for i in plain)
    for one in report.searches:
        for run in one.runs:
            assert set(run.asked.tolist()) <= plain and len(set(run.asked.tolist())) == run.calls
            assert np.array_equal(run.glitch, truth.best[run.asked] < 0.01)


def test_runs_and_budgets(plan: CensusPlan, report: SearchReport) -> None:
    calls = {one.name: [run.calls for run in one.runs] for one in report.searches}
    assert [len(calls[name]) for name in METHODS] == [1, 4, 1, 4]
    assert calls["gradient"] == [18]
    dearest = max(calls["hunter"] + calls["gradient"])
    assert calls["indicator"] == [dearest] and calls["random"] == [dearest] * 4
    indicator = report.search("indicator")
    assert indicator is not None and indicator.runs[0].asked.tolist() == ranking(plan.scan)[:dearest].tolist()


def test_recall_and_precision_are_counts_over_counts(report: SearchReport) -> None:
    assert report.n_glitch
    for one in report.searches:
        found = [run.glitch.sum() for run in one.runs]
        assert one.recall(report.n_glitch).value == pytest.approx(np.mean(found) / report.n_glitch)
        assert one.precision().value == pytest.approx(
            np.mean([g / run.calls for g, run in zip(found, one.runs, strict=True)])
        )
    random = report.search("random")
    rate = report.base_rate()
    assert random is not None and rate is not None
    assert random.precision().value == pytest.approx(rate.value, abs=0.1)
    first = random.recall(report.n_glitch, calls=10)
    assert first.value == pytest.approx(np.mean([run.glitch[:10].sum() for run in random.runs]) / report.n_glitch)


def test_the_report_compares_at_equal_cost(report: SearchReport) -> None:
    said = report.findings()
    assert any("With the 18 calls of gradient" in line and "random" in line for line in said)
    shown = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert len(shown["runs"]) == 10 and set(report.frame()["method"]) == set(METHODS)
    section = report.section()
    assert section.metrics["hunter.calls"] > 0 and "random.recall" in section.metrics
    assert [type(block).__name__ for block in section.blocks] == ["Table", "Lines", "Table"]


def test_without_a_census_tokens_are_run_and_recall_is_not_claimed(plan: CensusPlan) -> None:
    prober = prober_of(MODEL, plan)
    options = SearchOptions(methods=("indicator", "random"), budget=15, seeds=1)
    found = search(MODEL, plan, prober, options=options)
    assert found.n_glitch is None and not any(key.endswith(".recall") for key in found.metrics())
    assert "Recall is not known" in found.findings()[0]
    asked = {int(i) for one in found.searches for run in one.runs for i in run.asked}
    assert set(np.flatnonzero(~np.isnan(prober.best)).tolist()) == asked and 15 < len(asked) <= 30
    found.section()
    json.dumps(found.to_json(), allow_nan=False)


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="seeds"):
        SearchOptions(seeds=0)
    with pytest.raises((UnknownNameError, TypeError)):
        SearchOptions(methods=("hunt",))  # type: ignore[arg-type]


def test_runs_that_agree_are_no_surer_than_their_tokens() -> None:
    nothing = Found("random", np.arange(40), np.zeros(40, dtype=bool))
    two, one = SearchRuns("random", (nothing, nothing)), SearchRuns("random", (nothing,))
    assert two.precision().value == one.precision().value == 0
    assert two.precision().high == pytest.approx(one.precision().high) == pytest.approx(1 - 0.025 ** (1 / 40))
    half = Found("random", np.arange(40), np.arange(40) < 20)
    apart = SearchRuns("random", (nothing, half)).precision()
    assert apart.value == 0.25 and (apart.low, apart.high) == pytest.approx((0.0, 1.0), abs=1e-6), (
        "two runs this far apart say little"
    )
