from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.glitch.tiny_copy import wordy_model
from tests.glitch.tiny_vocab import EMBED, byte_level, folder, matrix
from workbench.cli import main


@pytest.fixture(autouse=True)
def _no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def test_the_command_leaves_a_finished_run_with_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level()
    n = tokenizer.get_vocab_size()
    unused = [tokenizer.token_to_id(f"<unused{k}>") for k in range(6)]
    made = folder(tmp_path / "m", tokenizer, {EMBED: matrix(n, [*unused, tokenizer.token_to_id("ember")])})
    assert main(["glitch", "scan", str(made), "--out", str(tmp_path / "runs"), "--json", "--percentile", "1"]) == 0
    shown = json.loads(capsys.readouterr().out)
    run = Path(shown["run"])
    assert (run / "DONE").is_file() and (run / "report.html").is_file()
    assert len((run / "artifacts" / "tokens.csv").read_text().splitlines()) == n + 1
    assert json.loads((run / "artifacts" / "glitch.json").read_text())["indicator"] == "I_cos"
    assert shown["candidates"][0]["token"] == "ember"
    assert json.loads((run / "config.json").read_text())["percentile"] == 1.0


def test_a_missing_model_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["glitch", "scan", str(tmp_path / "absent"), "--out", str(tmp_path / "runs")]) == 2
    assert "not a model folder" in capsys.readouterr().err


def test_what_the_weights_say_is_kept_where_no_token_can_be_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = wordy_model("neox")
    with torch.no_grad():
        model.hf.get_output_embeddings().weight[-1] = float("nan")
    model.hf.save_pretrained(tmp_path / "m")
    model.tokenizer.save_pretrained(tmp_path / "m")
    command = ["glitch", "scan", str(tmp_path / "m"), "--verify", "top", "--out", str(tmp_path / "runs")]
    assert main(command) == 2
    said = capsys.readouterr().err.strip()
    assert ".weight holds NaN" in said and "Kept in" in said and "steps glitch" in said
    (run,) = (tmp_path / "runs").iterdir()
    found = json.loads((run / "artifacts" / "glitch.json").read_text())
    assert found["bad_rows"] == [model.d_vocab - 1]
    assert (run / "artifacts" / "tokens.csv").is_file() and "Unfinished" in (run / "report.html").read_text()
