from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.saes.stores import READ, SITE, WRITTEN, small_store
from workbench.activations.store import ActivationStore
from workbench.cli import main
from workbench.runs.live import WandbLog
from workbench.saes.formats.load import load_sae


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return small_store(tmp_path_factory.mktemp("store"), (SITE, READ, WRITTEN))


SHORT = ["--tokens", "600", "--batch", "100", "--kernel", "csr"]


def _train(
    store: ActivationStore, out: Path, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, dict[str, Any], str]:
    code = main(["sae", "train", str(store.path), "--out", str(out), *SHORT, *words, "--json"])
    shown = capsys.readouterr()
    return code, json.loads(shown.out) if shown.out else {}, shown.err


def test_one_sae_is_written_into_the_folder_itself(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, _ = _train(store, tmp_path, capsys, "--site", SITE, "--k", "4")
    assert code == 0 and found["sae"] == str(tmp_path)
    assert load_sae(tmp_path).cfg.k == 4 and load_sae(tmp_path).cfg.d_sae == 8 * 16


def test_several_values_make_a_sweep(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--site", SITE, WRITTEN, "--k", "2", "4", "--seed", "0", "1", "--d-sae", "32"]
    code, found, _ = _train(store, tmp_path, capsys, *words)
    assert code == 0 and len(found["saes"]) == 8
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{site}-topk-32-k{k}-s{seed}" for site in (SITE, WRITTEN) for k in (2, 4) for seed in (0, 1)
    }
    words = ["--site", SITE, "--architecture", "relu", "batchtopk", "--k", "2", "--l1", "1", "3", "--d-sae", "32"]
    _, found, _ = _train(store, tmp_path / "kinds", capsys, *words)
    assert sorted(Path(entry["sae"]).name for entry in found["saes"]) == [
        f"{SITE}-batchtopk-32-k2-s0", f"{SITE}-relu-32-l1_coefficient=1.0-s0", f"{SITE}-relu-32-l1_coefficient=3.0-s0",
    ]  # fmt: skip


def test_a_transcoder_is_trained(store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--site", READ, "--target-site", WRITTEN, "--architecture", "batchtopk", "--k", "4"]
    code, _, _ = _train(store, tmp_path, capsys, *words)
    assert code == 0
    assert load_sae(tmp_path).cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--site", "resid_post.7"], "Site resid_post.7 is not stored"),
        ([], "No site was named"),
        (["--site", SITE, "--k", "500"], "k=500, d_sae=128"),
        (["--site", SITE, "--batch", "900", "--tokens", "900"], "one batch needs 900"),
        (["--site", SITE, "--l1", "2"], "l1 (2.0,) has no effect on topk"),
        (["--site", SITE, "--architecture", "tpok"], "Did you mean topk"),
        (["--site", SITE, "--target-site", WRITTEN, SITE], "2 target sites for 1 site"),
        (["--site", READ, "--target-site", WRITTEN], "Use 'batchtopk'"),
        (["--site", SITE, "--k", "4", "--lr", "1e30"], "Lower lr"),
        (["--site", SITE, "--device", "cuda:9"], "device='cuda:9'"),
    ],
)
def test_wrong_input_gives_one_line(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, _, err = _train(store, tmp_path, capsys, *words)
    assert code == 2
    assert message in err and err.count("\n") == 1, err


class _FakeRun:
    def __init__(self, **settings: Any) -> None:
        self.settings, self.lines, self.finished = settings, [], False

    def log(self, line: dict[str, float], step: int) -> None:
        self.lines.append((step, line))

    def finish(self) -> None:
        self.finished = True


def _fake_wandb(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    import sys

    fake = SimpleNamespace(init=init, Settings=lambda **words: words, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_curves_go_to_wandb_when_asked(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[_FakeRun] = []

    def init(**settings: Any) -> _FakeRun:
        runs.append(_FakeRun(**settings))
        return runs[-1]

    _fake_wandb(monkeypatch, init)
    code, found, _ = _train(store, tmp_path / "saes", capsys, "--site", SITE, "--k", "2", "4", "--wandb")
    assert code == 0 and len(runs) == 2 and all(run.finished for run in runs)
    for run, entry in zip(runs, found["saes"], strict=True):
        folder = Path(entry["sae"])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [{"step": step, **line} for step, line in run.lines] == lines
        assert run.settings["name"] == folder.name and run.settings["group"] == "saes"
        assert run.settings["mode"] == "offline" and run.settings["config"]["site"] == SITE


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_of_wandb_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no disk")

    run = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    if where != "init":
        setattr(run, where, fail)
    _fake_wandb(monkeypatch, fail if where == "init" else lambda **_: run)
    with WandbLog(tmp_path) as log:
        for step in range(5):
            log("a", {"step": step, "loss": 1.0})
    assert log.problem == "RuntimeError: no disk"


def test_wandb_that_is_switched_off_is_not_touched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_wandb(monkeypatch, lambda **_: pytest.fail("started"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with WandbLog(tmp_path / "x") as log:
        log("a", {"step": 1, "loss": 1.0})
    assert "WANDB_MODE" in (log.problem or "") and not (tmp_path / "x").exists()


def test_features_are_not_called_alive_on_too_few_tokens(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sae", "train", str(store.path), "--out", str(tmp_path), *SHORT, "--site", SITE, "--k", "4"]
    assert main(words) == 0
    assert "too few tokens to call a feature dead" in capsys.readouterr().out
