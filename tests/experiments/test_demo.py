"""The demo on a tiny model: killed in the middle, started again, finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import tiny_hf, tiny_tokenizer

STEPS = ["model", "glitch", "sae", "features", "steering", "shift", "refusal"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "tiny"
    tiny_hf().save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "workbench.cli", "demo", "--model", str(folder), "--out", str(out), "--json"]
    small = ["--tokens", "4096", "--training-tokens", "20480", "--k", "4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*command, *small], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def saved(out: Path) -> dict[str, float]:
    return {file.stem: file.stat().st_mtime for file in out.glob("*/steps/*.json")}


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
