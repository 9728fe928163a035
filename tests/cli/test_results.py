from __future__ import annotations

import json
from pathlib import Path

import pytest

from workbench import cli
from workbench.core.stats import wilson
from workbench.report.base import Section
from workbench.runs.run import RunDir


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    done = RunDir.create("done", {"seed": 0}, tmp_path)
    done.save_step("one", Section("First", (), ("It works.",), {"rate": wilson(1, 4, unit="prompts"), "n": 7}))
    done.finish("Done")
    RunDir.create("open", {"seed": 0}, tmp_path)
    return tmp_path


def test_runs_are_listed_with_status_and_numbers(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "unfinished" in lines[0]
    assert "-open-" in lines[0]
    assert "finished" in lines[1]
    assert lines[2] == "    one.rate = 0.250 [0.046, 0.699] (n = 4 prompts)"
    assert lines[3] == "    one.n = 7"
    assert cli.main(["runs", str(runs), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in listed["runs"]] == ["open", "done"]
    assert listed["runs"][1]["metrics"]["one.rate"]["n"] == 4


def test_the_list_can_be_cut(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(runs), "--limit", "1"]) == 0
    assert "1 older runs are not shown; --limit 2 shows all." in capsys.readouterr().out


def test_no_runs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "No runs in" in capsys.readouterr().out


def test_a_report_is_rendered_again(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = next(runs.glob("*-done-*/report.html"))
    before = report.read_text()
    report.unlink()
    assert cli.main(["report", "done", "--folder", str(runs)]) == 0
    written, following = capsys.readouterr().out.splitlines()
    assert Path(written) == report.resolve()
    assert following == f"Next: workbench report {report.parent} --open"
    assert report.read_text() == before


def test_an_open_report_is_followed_by_what_the_run_holds(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    run = next(runs.glob("*-done-*"))
    for following in (f"workbench runs {runs}", f"workbench serve --sae {run}"):
        assert cli.main(["report", "done", "--folder", str(runs), "--open"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"Next: {following}"
        (run / "artifacts" / "sae").mkdir(parents=True, exist_ok=True)
    assert opened == [(run / "report.html").resolve().as_uri()] * 2


def test_the_report_of_an_unfinished_run_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "latest", "--folder", str(runs), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["finished"] is False
    assert "Unfinished. Finished steps: none." in Path(answer["report"]).read_text()


def test_a_run_that_is_not_there_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "nothing", "--folder", str(runs)]) == 2
    assert capsys.readouterr().err.startswith("error: No run 'nothing'.")
