"""The demo on a tiny model: killed in the middle, started again, finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import demo
from tests.tiny import tiny_hf, tiny_tokenizer
from workbench import cli
from workbench.report.base import Section

STEPS = ["model", "glitch", "sae", "features", "steering", "shift", "refusal"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "tiny"
    hf = tiny_hf()
    hf.config.max_position_embeddings = 1024
    hf.save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "workbench.cli", "demo", "--model", str(folder), "--out", str(out), "--json"]
    small = ["--tokens", "4096", "--training-tokens", "20480", "--k", "4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*command, *small], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def saved(out: Path) -> dict[str, float]:
    return {file.stem: file.stat().st_mtime for file in out.glob("*/steps/*.json")}


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--k", "999"], "k=999"), (["--layer", "9"], "layer 9"), (["--expansion", "0"], "--expansion 0")],
)
def test_what_a_later_step_would_refuse_is_refused_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert cli.main(["demo", "--model", str(folder), "--out", str(tmp_path / "runs"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_step_that_a_model_can_not_do_is_left_out_and_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    done = tuple((name, title, lambda _: Section("done")) for name, title, _ in demo.STEPS)
    monkeypatch.setattr(demo, "STEPS", done)
    for model, left_out in ((folder, 0), (plain, 1)):
        out = tmp_path / f"runs-{model.name}"
        assert cli.main(["demo", "--model", str(model), "--out", str(out)]) == 0
        captured = capsys.readouterr()
        assert captured.err.count("left out: refusals are answers to chat messages") == left_out
        assert captured.out.count("Left out: refusals are answers to chat messages") == left_out
        assert ("Left out: refusals" in next(out.glob("*/report.html")).read_text()) == bool(left_out)


@pytest.mark.slow
def test_a_killed_demo_goes_on_and_ends_with_a_valid_folder(folder: Path, tmp_path: Path) -> None:
    first = start(folder, tmp_path)
    deadline = time.monotonic() + 240
    while "features" not in saved(tmp_path) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    _, err = first.communicate()
    before = saved(tmp_path)
    assert "features" in before and "refusal" not in before, err[-2000:]

    second = start(folder, tmp_path)
    out, err = second.communicate(timeout=400)
    assert second.returncode == 0, err[-3000:]
    summary = json.loads(out)
    run = Path(summary["run"])
    assert (run / "DONE").exists() and len(list(tmp_path.glob("*-demo-*"))) == 1
    after = saved(tmp_path)
    assert sorted(after) == sorted(STEPS)
    assert {step: after[step] for step in before} == before  # finished steps were not done again
    assert not summary["reused"] and len(summary["findings"]) >= len(STEPS)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert any(name.startswith("sae") for name in result["metrics"])

    third = start(folder, tmp_path)
    out, err = third.communicate(timeout=120)
    assert third.returncode == 0, err[-2000:]
    assert json.loads(out)["reused"] and json.loads(out)["run"] == str(run)
