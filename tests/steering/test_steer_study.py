"""The study of feature selection: groups, claims on planted scores, and a whole run on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments.steering_features import Sizes, selection
from tests.features.toys import random_sae
from tests.tiny import tiny_model
from workbench.errors import InvalidInputError
from workbench.features import ContextOptions, ScoreOptions
from workbench.features.table import COLUMNS, FeatureTable
from workbench.saes.config import SAEConfig
from workbench.steering.options import SteerOptions
from workbench.steering.study import (
    FILTERED,
    SECOND,
    UNFILTERED,
    Depth,
    StudyOptions,
    cooccurrence_claim,
    depth_claim,
    difference_of_shares,
    filter_claim,
    groups_of,
    observed_over_expected,
    selection_study,
)
from workbench.steering.study import _Steered as Steered

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
    return Depth(None, table(*args, **kwargs))


HIGH, LOW = np.full(100, 0.5), np.zeros(100)


def test_groups_are_what_their_names_say() -> None:
    output = np.where(np.arange(40) < 12, 0.02, 0.001)
    output[7] = 0.9
    found = groups_of(table(output, np.arange(40) / 40), OPTIONS)
    assert len(found[UNFILTERED]) == len(found[SECOND]) == 3
    assert not set(found[UNFILTERED]) & set(found[SECOND])
    assert all(f < 12 for f in found[FILTERED])
    assert found["best output scores"][0] == found["largest change of confidence"][0] == 7
    assert found["best input scores"] == [39, 38, 37]
    assert FILTERED not in groups_of(table(LOW), OPTIONS)


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


def test_no_cooccurrence_where_none_was_to_be_expected_proves_nothing() -> None:
    assert observed_over_expected(0, 1.0).high > 1
    assert observed_over_expected(0, 10.0).high < 1
    rare = np.where(np.arange(100) < 5, 0.5, 0.0)
    assert cooccurrence_claim([depth(rare, rare[::-1].copy())], OPTIONS).verdict == "not clear"


def success(filtered: float, unfiltered: float, n: int = 8) -> Steered:
    noise = np.random.default_rng(0).random((n, 6)) * 0.1
    values = {FILTERED: noise + filtered, UNFILTERED: noise + unfiltered, SECOND: noise[::-1] + unfiltered}
    return Steered(values, {name: np.ones((n, 6)) for name in values})


def test_filtering_is_a_ratio_beside_a_second_draw() -> None:
    claim = filter_claim([success(2.0, 0.5)])
    assert claim.verdict == "holds" and 3 < claim.value.value < 4.5
    assert claim.control.low <= 1 <= claim.control.high
    assert filter_claim([success(0.1, 0.5)]).verdict == "does not hold"
    assert filter_claim([success(0.5, 0.5)]).verdict == "not clear"


def test_a_depth_with_few_filtered_features_counts_as_little_for_the_unfiltered() -> None:
    """Success is 10 at one depth and 1 at the other, filtered or not: no ratio may come from depth alone."""
    deep, shallow = success(10.0, 10.0), success(1.0, 1.0)
    few = Steered({**shallow.success, FILTERED: shallow.success[FILTERED][:1]}, shallow.nll)
    assert filter_claim([few, deep]).value.value == pytest.approx(1.0, abs=0.05)


def test_one_depth_is_refused() -> None:
    model, sae = tiny_model(), random_sae()
    with pytest.raises(InvalidInputError, match="two or more"):
        selection_study(model, [Depth(sae, table(HIGH[:40]))], OPTIONS)
    with pytest.raises(InvalidInputError, match="cuts"):
        replace(OPTIONS, threshold=0.0)


def test_the_whole_study_on_a_tiny_model(tmp_path: Path) -> None:
    model = tiny_model()
    sizes = Sizes(
        layers=(0, 2), tokens=2048, context=32, study=OPTIONS,
        sae=SAEConfig(d_sae=48, k=4, tokens=4096, batch=256),
        scores=ScoreOptions(random_directions=16, contexts=ContextOptions(max_tokens=1024)),
    )  # fmt: skip
    report = selection(model, tmp_path, sizes)
    assert [p.layer for p in report.profile] == [0, 2]
    assert len(report.claims) == 3
    assert {c.verdict for c in report.claims} <= {"holds", "does not hold", "not clear"}
    pooled = {g.group: g.n for g in report.groups if g.layer is None}
    assert pooled[UNFILTERED] == 6 and "best input scores" in pooled
    assert report._repr_html_() and report.to_json()
    again = selection(model, tmp_path, sizes)
    assert again.to_json() == report.to_json(), "resumed from its folder"
