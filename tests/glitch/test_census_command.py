from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.glitch.tiny_copy import N, saved, wordy_model
from workbench.cli import main
from workbench.glitch.verification.probing import SHORT_FILE


@pytest.fixture(autouse=True)
def _no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), wordy_model())


def _run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_census_then_search_with_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--out", tmp_path / "runs", "--dtype", "float32", "--no-confirm")
    census = _run(capsys, "glitch", "census", folder, *common)
    run = Path(str(census["run"]))
    assert (run / "DONE").is_file() and (run / "report.html").is_file() and census["complete"] is True
    assert len((run / "artifacts" / "tokens.csv").read_text().splitlines()) == N + 6 + 1
    before = (run / "artifacts" / SHORT_FILE).read_bytes()
    found = _run(
        capsys, "glitch", "search", folder, *common, "--census", run, "--methods", "indicator", "random", "--budget",
        "20", "--seeds", "2",
    )  # fmt: skip
    assert found["n_glitch"] == census["metrics"]["n_glitch_ordinary"]["value"] > 0  # type: ignore[index]
    searched = Path(str(found["run"]))
    assert (searched / "artifacts" / "searches.csv").is_file() and (searched / "report.html").is_file()
    assert (run / "artifacts" / SHORT_FILE).read_bytes() == before == (searched / "artifacts" / SHORT_FILE).read_bytes()


def test_an_interrupted_census_is_continued_by_the_same_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import workbench.glitch.counting.census as library

    words = ("glitch", "census", folder, "--out", tmp_path, "--no-confirm", "--batch-size", "64")
    real = library.run_census

    def stopped(model: object, plan: object, where: Path | None = None) -> object:
        import dataclasses

        real(model, dataclasses.replace(plan, ids=plan.ids[:100]), where)  # type: ignore[arg-type, attr-defined, type-var]
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "run_census", stopped)
    assert main([*map(str, words)]) != 0
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir())
    first = (run / "artifacts" / SHORT_FILE).read_text().splitlines()
    assert len(first) == 1 + 100
    dtype = (run / "artifacts" / "dtype.json").read_text()
    capsys.readouterr()
    monkeypatch.setattr(library, "run_census", real)
    done = _run(capsys, *words)
    assert Path(str(done["run"])) == run and done["complete"] is True
    again = (run / "artifacts" / SHORT_FILE).read_text().splitlines()
    assert again[:101] == first and len(again) == 1 + N
    assert (run / "artifacts" / "dtype.json").read_text() == dtype


def test_a_census_that_is_none_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["glitch", "search", str(folder), "--out", str(tmp_path / "runs"), "--census", str(tmp_path)]
    assert main(words) == 2
    assert "Name a run folder" in capsys.readouterr().err
