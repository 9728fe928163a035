from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments.score_features import FeaturesScore
from tests.features.toys import random_sae
from tests.tiny import tiny_model
from workbench.activations.store import ActivationStore
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    UnknownNameError,
    UnknownSiteError,
)
from workbench.features import ContextOptions, FeatureTable, ScoreOptions, input_score, output_scores, score_features
from workbench.features.scores.output_score import OutputOptions
from workbench.features.scores.score_report import co_occurrence

OPTIONS = ScoreOptions(k=5, rows=16, random_directions=12, contexts=ContextOptions(per_feature=20))


def small_table(output: list[float], frequency: list[float]) -> FeatureTable:
    import pandas as pd

    n = len(output)
    nan, empty = [math.nan] * n, [[] for _ in range(n)]
    df = pd.DataFrame({
        "feature": range(n), "input_score": nan, "output_score": output, "output_score_delta": output, "frequency": frequency,
        "max_act": nan, "n_contexts": [0] * n, "best_token": [""] * n, "top_tokens": empty, "top_token_ids": empty,
        "contexts": empty, "context_token_ids": empty,
    })  # fmt: skip
    return FeatureTable(df, {}, {})


def test_scores_are_those_of_the_parts(table: FeatureTable) -> None:
    outputs = output_scores(tiny_model(), random_sae(), options=OutputOptions(k=5, rows=16))
    assert table.df["output_score"].tolist() == outputs.score.tolist()
    assert table.df["output_score_delta"].tolist() == outputs.delta.tolist()
    import torch

    for row in table.df.itertuples():
        expected = input_score(torch.tensor([row.context_token_ids]), torch.tensor([row.top_token_ids]))
        assert row.input_score == pytest.approx(float(expected), nan_ok=True)


def test_output_scores_alone_need_no_store() -> None:
    table = score_features(tiny_model(), random_sae(), features=[3, 1], scores=("output",), options=OPTIONS)
    assert table.df["feature"].tolist() == [3, 1]
    assert table.df["input_score"].isna().all()
    report = table.report()
    assert report.input_mean is None
    lines = list(FeaturesScore(sae=Path("sae")).details(report, Path("run")))
    assert lines and all("  input n/a  " in line and "nan" not in line for line in lines)
    with pytest.raises(InvalidInputError, match="need a store"):
        score_features(tiny_model(), random_sae(), scores=("input",))
    with pytest.raises(InvalidInputError, match="Did you mean output"):
        score_features(tiny_model(), random_sae(), scores=("outputs",))


def test_store_of_another_model_or_site_is_refused_first(
    token_store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "workbench.features.scores.score_features.direction_scores", lambda *_: pytest.fail("something was computed")
    )
    with pytest.raises(MismatchError):
        score_features(tiny_model(seed=7), random_sae(), token_store, options=OPTIONS)
    with pytest.raises(UnknownSiteError, match="not stored"):
        sae = random_sae(site="resid_post.0")
        score_features(tiny_model(), sae, token_store, options=OPTIONS)


def test_saved_and_loaded_tables_are_equal(table: FeatureTable, tmp_path: Path) -> None:
    again = FeatureTable.load(table.save(tmp_path / "f"))
    assert again.df.equals(table.df)
    assert again.meta == table.meta
    assert again.controls == table.controls
    assert again.report() == table.report()


def test_damaged_and_missing_tables_are_refused(table: FeatureTable, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="features score"):
        FeatureTable.load(tmp_path)
    table.save(tmp_path)
    file = tmp_path / "features.parquet"
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "meta and rows can't be mixed"
    rows = pq.read_table(file)
    pq.write_table(rows.set_column(rows.column_names.index("contexts"), "contexts", [[1] * len(rows)]), file)
    with pytest.raises(CorruptFileError, match="can't be read"):
        FeatureTable.load(tmp_path)
    pq.write_table(rows.set_column(0, "feature", [[None] * len(rows)]), file)
    with pytest.raises(CorruptFileError, match="feature is missing"):
        FeatureTable.load(tmp_path)
    file.write_bytes(b"PAR1 no")
    with pytest.raises(CorruptFileError):
        FeatureTable.load(tmp_path)


def test_html_is_escaped(table: FeatureTable) -> None:
    table.df.at[int(table.df["output_score"].idxmax()), "top_tokens"] = ["<script>alert(1)</script>"]
    assert "<script>" not in table._repr_html_()
    assert "&lt;script&gt;" in table._repr_html_()
    assert "<script>alert" not in table.report()._repr_html_()


def test_select_takes_the_best_that_are_alive() -> None:
    table = small_table([0.9, 0.5, 0.02, 0.001], [0.0, 0.1, 0.1, 0.1])
    assert table.select() == (1, 2)
    assert table.select(1) == (1,)
    with pytest.raises(InvalidInputError, match="n=0"):
        table.select(0)
    with pytest.raises(DegenerateInputError, match="best has 0.5"):
        table.select(min_output_score=0.95)


def test_worst_features_are_matched_on_frequency() -> None:
    output = [0.9, 0.8, 0.001, 0.002, 0.003, 0.5, 0.6, 0.7]
    frequency = [0.1, 0.001, 0.0012, 0.09, 0.01, 0.1, 0.001, 0.1]
    table = small_table(output, frequency)
    assert table.worst_matched((0, 1), share=0.5) == (3, 2)
    assert table.worst_matched((1, 0), share=0.5) == (2, 3)
    alike = small_table([0.9, 0.8, 0.001, 0.002], [0.1, 0.1, 0.1, 0.001])
    assert alike.worst_matched((0, 1)) == (2, 3), "feature 2 is taken once"
    with pytest.raises(DegenerateInputError):
        table.worst_matched(range(8))


def test_a_threshold_that_is_no_number_is_refused(table: FeatureTable) -> None:
    with pytest.raises(InvalidInputError, match="threshold=nan"):
        table.report(float("nan"))


def test_report_counts_and_controls(table: FeatureTable) -> None:
    report = table.report(threshold=0.1)
    scores = table.df["output_score"].to_numpy()
    assert report.above is not None
    assert report.above.value == pytest.approx(float((scores >= 0.1).mean()))
    assert len(report.random_output_scores) == 12
    assert len(report.shuffled_input_scores) == len(table.df) - report.n_few
    assert report.section().metrics["n_features"] == 40
    assert all(str(n) in " ".join(report.findings()) for n in (40, 12))


def test_co_occurrence_against_chance() -> None:
    half = np.arange(400) % 2 == 0
    both, independent, pmi = co_occurrence(half, half)
    assert (both.value, independent) == (0.5, 0.25)
    assert pmi is not None
    assert pmi.value == pytest.approx(1.0, abs=0.02)
    assert pmi.excludes(0.0)
    quarter = np.arange(400) % 4 < 2
    _, _, none = co_occurrence(half, quarter)  # each combination 100 times: independent
    assert none is not None
    assert none.value == pytest.approx(0.0, abs=1e-9)
    assert not none.excludes(0.0)
    assert co_occurrence(half, np.zeros(400, dtype=bool))[2] is None


def test_random_directions_have_the_norms_of_the_features() -> None:
    from workbench.controls.directions import random_directions

    sae: Any = random_sae()
    norms = random_directions(3 * sae.W_dec, OPTIONS.random_directions).norm(dim=1)
    assert norms.tolist() == pytest.approx([3.0] * 12, rel=1e-5)


def test_select_by_confidence_takes_the_largest_change_in_either_direction() -> None:
    table = small_table([0.9, 0.5, 0.02, 0.001], [0.0, 0.1, 0.1, 0.1])
    table.df["confidence_delta"] = [9.0, 0.1, -2.0, 1.0]
    assert table.select(2, by="confidence_delta") == (2, 3)
    with pytest.raises(UnknownNameError, match="output_score"):
        table.select(by="output_scores")
    table.df["confidence_delta"] = float("nan")
    with pytest.raises(DegenerateInputError, match="no feature of this table"):
        table.select(by="confidence_delta")
