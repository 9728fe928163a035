from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import workbench as wb
from tests.glitch.tiny_copy import PADDING, PLANTED, N, saved, wordy_model
from workbench.glitch.counting.census import CensusReport
from workbench.glitch.counting.plan import CensusOptions
from workbench.glitch.verification.verify import verdict

MODEL = wordy_model()
OPTIONS = CensusOptions(confirm=(), shares=(0.1, 0.5), batch_size=50)


def test_a_scan_with_a_census_has_a_probability_and_a_verdict_for_every_token(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(
        json.dumps([{"name": "say", "preamble": "", "shown": "say {token}:", "answer": " {token}"}])
    )
    options = wb.glitch.ScanOptions(prompts=tmp_path / "prompts.json", forms="raw")
    report = wb.glitch.scan(MODEL, "census", options=options)
    assert isinstance(report, CensusReport) and report.is_complete
    assert [t.prompt.name for t in report.plan.confirm][-1] == "say", "prompts of a file confirm, not the built-in ones"
    df = report.frame()
    assert {"token_id", "token", "category", "indicator", "max_prob", "verdict"} <= set(df.columns)
    tested = df[~df.token_id.isin(PADDING)]
    assert len(tested) == N and tested.max_prob.notna().all() and (tested.verdict != "untested").all()
    padding = df[df.token_id.isin(PADDING)]
    assert padding.max_prob.isna().all() and (padding.verdict == "untested").all()
    assert all(verdict(p) == named for p, named in zip(tested.max_prob, tested.verdict, strict=True))
    assert set(df.token_id[:3]) <= {*PLANTED, *PADDING}, "the ranking is that of the weights"


def test_a_loaded_model_keeps_its_dtype_and_a_folder_gives_the_same(tmp_path: Path) -> None:
    before = next(MODEL.hf.parameters()).dtype
    loaded = wb.glitch.census(MODEL, options=OPTIONS)
    assert next(MODEL.hf.parameters()).dtype == before
    folder = saved(tmp_path / "model", MODEL)
    kept = tmp_path / "kept"
    read = wb.glitch.census(folder, options=OPTIONS, folder=kept)
    if read.plan.dtype.dtype == "float32":
        np.testing.assert_allclose(read.best, loaded.best, atol=1e-6)
    assert (read.glitch == loaded.glitch).all()
    assert any(kept.iterdir()), "results are kept where they were asked for"


def test_lint_finds_a_flagged_token_in_a_text_and_nothing_in_another() -> None:
    text = "say" + MODEL.tokenizer.decode(PLANTED[2:]) + "."
    report = wb.glitch.lint(MODEL, text)
    assert PLANTED[2] in [row.token_id for row in report.counts]
    assert not wb.glitch.lint(MODEL, "").counts
    with pytest.raises(wb.WorkbenchError, match="no kind 'candidat'"):
        wb.glitch.lint(MODEL, text, kinds=["candidat"])


def test_diff_of_a_model_with_itself_is_empty(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", MODEL)
    assert wb.glitch.diff(MODEL, folder).changes == ()
