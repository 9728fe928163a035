from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.glitch.tiny_copy import PADDING, PLANTED, N, slow_best, wordy_model
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.glitch.counting.census import CensusReport, run_census
from workbench.glitch.counting.plan import CensusOptions, CensusPlan, in_dtype, plan_census, prober_of, ranking
from workbench.glitch.scanning.saved import load_scan
from workbench.glitch.verification import probing
from workbench.glitch.verification.probing import SHORT_FILE, DtypeChoice
from workbench.glitch.verification.prompts import PROMPTS
from workbench.report.base import Report

OPTIONS = CensusOptions(confirm=PROMPTS[2:], again=(), shares=(0.02, 0.1, 0.5), batch_size=50)
MODEL = wordy_model()


@pytest.fixture(scope="module")
def plan() -> CensusPlan:
    return plan_census(MODEL, options=OPTIONS, measure_both=False)


@pytest.fixture(scope="module")
def report(plan: CensusPlan) -> CensusReport:
    return run_census(MODEL, plan)


def test_every_token_is_tested_once_and_padding_rows_are_not(plan: CensusPlan, report: CensusReport) -> None:
    assert sorted(plan.ids) == list(range(N)) and plan.ids.tolist() != list(range(N))
    assert report.is_complete and np.flatnonzero(~report.tested).tolist() == PADDING
    assert np.isnan(report.best[PADDING]).all()


def test_probabilities_are_those_of_one_uncached_prompt_at_a_time(report: CensusReport) -> None:
    glitch, fine = np.flatnonzero(report.glitch), np.flatnonzero(report.best >= 0.01)
    assert min(len(glitch), len(fine)) > 20, "both kinds are needed for the test to mean something"
    for i in [*glitch[:4], *PLANTED]:
        assert report.best[i] == pytest.approx(slow_best(MODEL, int(i), (probing.SHORT, PROMPTS[2])), abs=1e-5)
    for i in fine[:4]:
        alone = slow_best(MODEL, int(i), (probing.SHORT,))
        assert report.short[i] == pytest.approx(alone, abs=1e-5)
    rescued = np.flatnonzero((report.short < 0.01) & (report.best >= 0.01))
    assert len(rescued) and not report.glitch[rescued].any()


def test_the_ranking_is_that_of_the_scan_and_recall_is_counted_by_hand(plan: CensusPlan, report: CensusReport) -> None:
    table = plan.scan.table
    plain = [i for i in range(N) if table.category[i] == "ok" and not table.reserved[i]]
    by_hand = sorted(plain, key=lambda i: (table.indicator[i], i))
    assert ranking(plan.scan).tolist() == by_hand and set(by_hand[:3]) == set(PLANTED)
    top = by_hand[: round(0.1 * len(by_hand))]
    bad = [i for i in by_hand if report.best[i] < 0.01]
    assert report.recall_at(0.1).value == pytest.approx(len(set(top) & set(bad)) / len(bad))
    short = [i for i in by_hand if report.short[i] < 0.01]
    assert report.recall_at(0.1, report.short).value == pytest.approx(len(set(top) & set(short)) / len(short))
    assert report.total().value == len(bad) == report.total().high
    late = by_hand[len(by_hand) // 2 :]
    control = report.control()
    assert control is not None and control.value == pytest.approx(len(set(late) & set(bad)) / len(late))


def test_zero_rows_head_the_ranking_and_rows_without_a_number_end_it(plan: CensusPlan) -> None:
    zero, nan = (int(i) for i in ranking(plan.scan)[[50, 60]])
    table = plan.scan.table
    value = table.indicator.copy()
    value[nan] = np.nan
    changed = dataclasses.replace(plan.scan, zero_rows=(zero,), table=dataclasses.replace(table, indicator=value))
    ranked = ranking(changed).tolist()
    assert ranked[0] == zero and ranked[-1] == nan


def test_the_report_says_what_ran_and_what_is_exact(report: CensusReport) -> None:
    assert isinstance(report, Report)
    said = " ".join(report.findings())
    assert (
        f"{N:,} tokens of wordy-llama tested" in said and "counts are exact" in said and "Recall of the first" in said
    )
    section = report.section()
    assert [type(block).__name__ for block in section.blocks] == ["Table", "Table", "Table", "Histogram", "Text"]
    json.dumps(report.to_json(), allow_nan=False)
    assert f"{N:,} tokens x" in str(report.plan) and "about" in str(report.plan)
    assert section.metrics["n_glitch"] == report.n_glitch > 0


def test_files_are_those_of_a_scan_with_every_token_tested(report: CensusReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    scan = load_scan(tmp_path)
    assert scan.complete and len(scan.tokens) == N + len(PADDING)
    grades = scan.flags()
    for i in np.flatnonzero(report.glitch):
        assert grades[int(i)] == "verified"
    fine = np.flatnonzero(report.best >= 0.1)
    assert not set(fine.tolist()) & set(grades)


def test_a_token_that_looks_like_a_formula_survives_the_table(report: CensusReport, tmp_path: Path) -> None:
    table = report.plan.scan.table
    tricky = ("'=1", "=1+1", "'", *table.token[3:])
    scan = replace(report.plan.scan, table=replace(table, token=tricky))
    replace(report, plan=replace(report.plan, scan=scan)).save(tmp_path)
    assert [load_scan(tmp_path).text(i) for i in range(3)] == ["'=1", "=1+1", "'"]
    cells = (tmp_path / "tokens.csv").read_text().replace("\n", ",").split(",")
    assert {"''=1", "'=1+1"} <= set(cells) and not {"'=1", "=1+1"} & set(cells)


def test_an_interrupted_census_goes_on_and_ends_the_same(
    plan: CensusPlan, report: CensusReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stopping(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    import workbench.glitch.verification.scoring as scoring

    real = scoring.greedy_logits
    monkeypatch.setattr(scoring, "greedy_logits", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_census(MODEL, plan, tmp_path)
    assert len((tmp_path / SHORT_FILE).read_text().splitlines()) == 1 + 3 * 50
    monkeypatch.setattr(scoring, "greedy_logits", real)
    part = prober_of(MODEL, plan, tmp_path)
    seen = np.flatnonzero(~np.isnan(part.short))
    assert set(seen) == set(plan.ids[:150])
    partial = CensusReport("m", "f", plan, part.short, part.short)
    assert not partial.is_complete and any("not tested" in said for said in partial.findings())
    open_ = CensusReport("m", "f", plan, part.short, part.best)
    assert open_.unconfirmed.any() and not open_.can_rank and open_.control() is None
    assert "not confirmed" in open_.findings()[-1] and "recall_at_0.1" not in open_.metrics()
    done = run_census(MODEL, plan, tmp_path)
    assert np.allclose(done.best, report.best, equal_nan=True, atol=1e-6)


def test_a_sample_tests_the_top_whole_and_estimates_the_rest(report: CensusReport) -> None:
    options = dataclasses.replace(OPTIONS, sample=60)
    sampled = run_census(MODEL, plan_census(MODEL, options=options, measure_both=False))
    assert sampled.tested.sum() == 60 and not sampled.is_complete
    strata = sampled.strata()
    assert strata[0].is_complete and not strata[-1].is_complete
    assert sampled.total().value == pytest.approx(sum(s.glitch * s.size / s.tested for s in strata))
    assert not sampled.total().excludes(report.total().value)
    assert "estimates" in sampled.findings()[-1]


def test_a_model_without_a_ranking_still_has_a_census() -> None:
    model = wordy_model()
    with torch.no_grad():
        weight = model.hf.get_output_embeddings().weight
        weight[[*PADDING, *PLANTED]] = torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(5))
    plan = plan_census(model, options=OPTIONS, measure_both=False)
    assert plan.scan.indicator is None
    report = run_census(model, plan)
    assert report.is_complete and report.control() is None
    assert any("No recall of a ranking" in said for said in report.findings())
    json.dumps(report.to_json(), allow_nan=False)
    report.section()
    with pytest.raises(DegenerateInputError, match="no ranking"):
        plan_census(model, options=dataclasses.replace(OPTIONS, sample=50), measure_both=False)


def test_the_model_has_to_be_in_the_dtype_of_the_plan(plan: CensusPlan) -> None:
    half = dataclasses.replace(plan, dtype=DtypeChoice("bfloat16", {"bfloat16": 1.0}, 0.0, "bfloat16: pretended"))
    with pytest.raises(InvalidInputError, match="float32"):
        run_census(MODEL, half)
    model = in_dtype(wordy_model(), half.dtype)
    assert model.dtype == torch.bfloat16
    found = run_census(model, dataclasses.replace(half, ids=half.ids[:30]))
    assert found.tested.sum() == 30 and not found.is_complete
    assert in_dtype(MODEL, plan.dtype) is MODEL


def test_a_second_cheap_prompt_comes_before_the_long_ones() -> None:
    plan = plan_census(MODEL, options=CensusOptions(confirm=PROMPTS[2:]), measure_both=False)
    assert [made.prompt.name for made in plan.confirm] == ["again", "meaning"]
    assert not plan_census(MODEL, options=CensusOptions(confirm=()), measure_both=False).confirm
    cost = len(plan.confirm[0].ids) - plan.confirm[0].shared
    assert cost < 16 and plan.confirm[0].form == "raw"


def test_options_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="too small"):
        CensusOptions(sample=5)
    with pytest.raises(InvalidInputError, match="shares"):
        CensusOptions(shares=(0.5, 1.5))
