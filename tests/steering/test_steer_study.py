"""The study of feature selection: groups, claims on planted scores, and a whole run on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.feature_selection import Sizes, selection, study_time
from tests.features.toys import random_sae
from tests.tiny import tiny_model, tiny_tokenizer
from workbench.core.errors import InvalidInputError
from workbench.core.progress import Task
from workbench.engine.job import job_to_json
from workbench.features import ContextOptions, ScoreOptions
from workbench.features.scores.table import COLUMNS, FeatureTable
from workbench.models.model import Model
from workbench.saes.config import SAEConfig
from workbench.steering.selection.claims import (
    cooccurrence_claim,
    depth_claim,
    difference_of_shares,
    filter_claim,
    observed_over_expected,
)
from workbench.steering.selection.groups import FILTERED, MATCHED, SECOND, UNFILTERED, Depth, StudyOptions, groups_of
from workbench.steering.selection.steer_groups import Measured, Steered, SteerFeatures
from workbench.steering.selection.study import selection_study
from workbench.steering.sweep.options import SteerOptions
from workbench.steering.sweep.steer import Bench

PROMPTS = ("one day", "the", "for now, I", "he said")
STEERING = SteerOptions(new_tokens=3, k=5, plain_texts=())
OPTIONS = StudyOptions(n_features=3, strengths=(1.0,), prompts=PROMPTS, steering=STEERING)


def table(output: np.ndarray, read: np.ndarray | None = None, noise: float = 0.0) -> FeatureTable:
    n = len(output)
    columns: dict[str, Any] = {name: [float("nan")] * n for name in COLUMNS}
    columns |= {
        "feature": range(n), "output_score": output, "input_score": np.zeros(n) if read is None else read,
        "confidence_delta": -output, "frequency": [0.1] * n, "max_act": [1.0] * n,
    }  # fmt: skip
    return FeatureTable(pd.DataFrame(columns), {}, {"random_output_score": (noise,) * 100})


def depth(*args: Any, **kwargs: Any) -> Depth:
    return Depth(random_sae(), table(*args, **kwargs))


HIGH, LOW = np.full(100, 0.5), np.zeros(100)


def test_groups_are_what_their_names_say() -> None:
    output = np.where(np.arange(40) < 12, 0.02, 0.001)
    output[7] = 0.9
    scored = table(output, np.arange(40) / 40)
    scored.df["frequency"] = np.where(np.arange(40) % 2, 0.5, 0.001)
    found = groups_of(Depth(random_sae(), scored), OPTIONS)
    assert len(found[UNFILTERED]) == len(found[SECOND]) == 3
    assert not set(found[UNFILTERED]) & set(found[SECOND])
    assert all(f < 12 for f in found[FILTERED])
    assert found["best output scores"][0] == found["largest change of confidence"][0] == 7
    assert found["best input scores"] == [39, 38, 37]
    assert not set(found[MATCHED]) & set(found[FILTERED])
    assert sorted(f % 2 for f in found[MATCHED]) == sorted(f % 2 for f in found[FILTERED]), "as frequent"
    without = groups_of(Depth(random_sae(), table(LOW[:40])), OPTIONS)
    assert FILTERED not in without and MATCHED not in without


def test_deep_output_features_are_found_and_noise_is_taken_off() -> None:
    deep = depth_claim([depth(LOW), depth(HIGH)], OPTIONS)
    assert deep.verdict == "holds" and deep.value.value == 1.0 and deep.control.value == 0.0
    assert depth_claim([depth(HIGH), depth(LOW)], OPTIONS).verdict == "does not hold"
    assert depth_claim([depth(LOW), depth(LOW)], OPTIONS).verdict == "not clear"
    also_noise = depth_claim([depth(LOW), depth(HIGH, noise=0.5)], OPTIONS)
    assert also_noise.verdict == "not clear", "random directions write deep as well"


def test_shares_are_compared_with_their_uncertainty() -> None:
    few, many = np.array([True] * 3), np.array([True] * 300)
    assert difference_of_shares(few, ~few).low < difference_of_shares(many, ~many).low
    assert difference_of_shares(many, many).low <= 0 <= difference_of_shares(many, many).high
    assert difference_of_shares(many, ~many, many, ~many).value == 0.0


def test_cooccurrence_is_measured_against_independence() -> None:
    half = np.where(np.arange(100) < 50, 0.5, 0.0)
    apart, together = depth(half, 0.5 - half), depth(half, half)
    assert cooccurrence_claim([apart], OPTIONS).verdict == "holds"
    both = cooccurrence_claim([together, together], OPTIONS)
    assert both.verdict == "does not hold"
    assert both.value.value == pytest.approx(2.0)  # 100 of 200 against 200 * 1/2 * 1/2
    independent = cooccurrence_claim([depth(half, np.tile([0.5, 0.0], 50))], OPTIONS)
    assert independent.verdict == "not clear" and independent.value.value == pytest.approx(1.0)
    assert cooccurrence_claim([depth(LOW, half)], OPTIONS).verdict == "not clear"


def test_scores_that_both_rise_with_depth_do_not_make_a_cooccurrence() -> None:
    few, many = (np.where(np.arange(100) < n, 0.5, 0.0) for n in (10, 60))
    shuffled = np.random.default_rng(0).permutation
    depths = [depth(few, shuffled(few)), depth(many, shuffled(many))] * 3
    claim = cooccurrence_claim(depths, OPTIONS)
    assert claim.verdict == "not clear" and claim.value.low < 1 < claim.value.high
    assert claim.control.value == pytest.approx(1.0, abs=0.05)
    assert "all depths as one 1." in claim.note and "[1." in claim.note.split("all depths as one")[1]


def test_no_cooccurrence_where_none_was_to_be_expected_proves_nothing() -> None:
    assert observed_over_expected(0, 1.0).high > 1
    assert observed_over_expected(0, 10.0).high < 1
    rare = np.where(np.arange(100) < 5, 0.5, 0.0)
    assert cooccurrence_claim([depth(rare, rare[::-1].copy())], OPTIONS).verdict == "not clear"


def success(filtered: float, unfiltered: float, n: int = 8, noise: float = 0.0) -> Steered:
    draws = np.random.default_rng(0).random((n, 6)) * 0.1
    values = {FILTERED: draws + filtered, UNFILTERED: draws + unfiltered, SECOND: draws[::-1] + unfiltered}

    def measured(of: dict[str, np.ndarray]) -> dict[str, Measured]:
        return {name: Measured(value, np.ones((n, 6)), value) for name, value in of.items()}

    random = {name: draws[:, ::-1] + (noise if name == FILTERED else 0.0) for name in values}
    return Steered(measured(values), measured(random), measured({name: draws * 0 for name in values}))


def test_filtering_is_a_ratio_beside_a_second_draw() -> None:
    claim = filter_claim([success(2.0, 0.5)])
    assert claim.verdict == "holds" and 3 < claim.value.value < 4.5
    assert claim.control.low <= 1 <= claim.control.high
    assert filter_claim([success(0.1, 0.5)]).verdict == "does not hold"
    assert filter_claim([success(0.5, 0.5)]).verdict == "not clear"


def test_tokens_that_any_push_writes_are_no_success_of_the_feature() -> None:
    """Four times the tokens, but as many under random directions: 2 - 1.5 is what the unfiltered ones gain as well."""
    claim = filter_claim([success(2.0, 0.5, noise=1.5)])
    assert claim.value.low > 1 and claim.verdict == "not clear"


def test_a_depth_with_few_filtered_features_counts_as_little_for_the_unfiltered() -> None:
    """Success is 10 at one depth and 1 at the other, filtered or not: no ratio may come from depth alone."""
    deep, shallow = success(10.0, 10.0), success(1.0, 1.0)
    one = {**shallow.feature, FILTERED: shallow.feature[FILTERED].of([0])}
    random = {**shallow.random, FILTERED: shallow.random[FILTERED].of([0])}
    few = Steered(one, random, shallow.unsteered)
    assert filter_claim([few, deep]).value.value == pytest.approx(1.0, abs=0.05)


def test_one_depth_is_refused() -> None:
    model, sae = tiny_model(), random_sae()
    with pytest.raises(InvalidInputError, match="two or more"):
        selection_study(model, [Depth(sae, table(HIGH[:40]))], OPTIONS)
    with pytest.raises(InvalidInputError, match="cuts"):
        replace(OPTIONS, threshold=0.0)


SIZES = Sizes(
    layers=(0, 2), tokens=2048, context=32, study=OPTIONS, sae=SAEConfig(d_sae=48, k=4, tokens=4096, batch=256),
    scores=ScoreOptions(random_directions=16, contexts=ContextOptions(max_tokens=1024)),
)  # fmt: skip


def test_the_whole_study_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    report = selection(model, tmp_path, SIZES)
    assert [p.layer for p in report.profile] == [0, 2]
    assert len(report.claims) == 3
    assert {c.verdict for c in report.claims} <= {"holds", "does not hold", "not clear"}
    pooled = {g.group: g for g in report.groups if g.layer is None}
    assert pooled[UNFILTERED].n == 6 and "best input scores" in pooled
    for group in pooled.values():
        assert group.gain.value == pytest.approx(group.success.value - group.random.value)
    assert report._repr_html_() and report.to_json()
    texts = pd.concat(map(pd.read_parquet, tmp_path.glob("texts/layer*/*/parts/*.parquet")))
    assert set(texts["arm"]) == {"feature", "random", "unsteered"}
    assert set(texts["prompt"]) == set(PROMPTS)
    monkeypatch.setattr(Bench, "__init__", lambda *_: pytest.fail("a finished study is not steered again"))
    assert selection(model, tmp_path, SIZES).to_json() == report.to_json(), "resumed from its folder"


def test_an_interrupted_study_goes_on_to_the_same_result(tmp_path: Path) -> None:
    model = tiny_model()
    whole = selection(model, tmp_path, SIZES).to_json()
    files = sorted((tmp_path / "texts").glob("layer*/*/parts/*.json"))
    assert len(files) > 2, "more than one block of features"
    files[1].unlink()
    assert selection(model, tmp_path, SIZES).to_json() == whole
    other = replace(SIZES, study=replace(OPTIONS, strengths=(2.0,)))
    assert selection(model, tmp_path, other).to_json() != whole, "texts of other settings are not taken"


def test_texts_of_another_precision_are_not_taken() -> None:
    fp32, bf16 = tiny_model(), Model(tiny_model().hf.bfloat16(), tiny_tokenizer())
    scored = Depth(random_sae(), table(HIGH))
    jobs = [job_to_json(SteerFeatures.of(model, scored, [1], OPTIONS, Task())) for model in (fp32, bf16)]
    assert fp32.fingerprint == bf16.fingerprint and jobs[0] != jobs[1]


def test_the_time_grows_with_the_work() -> None:
    model = tiny_model()
    small, large = (study_time(model, replace(SIZES, tokens=n)) for n in (2048, 2**30))
    assert large.writing > small.writing > 0 and str(small).startswith("about ")
    groups, depths = 7, 2
    assert small.texts == len(PROMPTS) * depths * (1 + 2 * groups * OPTIONS.n_features)  # one strength
