"""What every study does with its run folder, whatever it measures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import tiny_model
from workbench.cli.study import Begin, Study
from workbench.core.errors import InvalidInputError
from workbench.report.base import Headline, Report, Section
from workbench.runs.run import RunDir, list_runs


@dataclass(frozen=True)
class Sum(Report):
    total: int

    def section(self) -> Section:
        return Section("A sum", (), self.findings(), {"total": self.total})

    def headline(self) -> Headline:
        return Headline(sentence="The numbers were added.")

    def findings(self) -> tuple[str, ...]:
        return (f"The sum is {self.total}.",)


@dataclass(frozen=True, kw_only=True)
class Adds(Study[Sum]):
    """Add numbers."""

    run_name, step = "adds", "sum"
    keeps_json = True

    numbers: tuple[int, ...] = ()
    estimate: bool = False

    def measure(self, begin: Begin) -> Sum | None:
        if self.estimate:
            self.emit({"seconds": 0}, ["At once."])
            return None
        run = begin()
        for i, number in enumerate(self.numbers):
            if not run.has(f"n{i}"):
                if number == 13:
                    raise KeyboardInterrupt
                if number < 0:
                    raise InvalidInputError("a negative number. Give others.")
                run.save_step(f"n{i}", Section(str(number), metrics={"n": number}))
        return Sum(sum(self.numbers))

    def details(self, report: Sum, folder: Path) -> Iterable[str]:
        return [f"  {number}" for number in self.numbers]

    def exit_code(self, report: Sum) -> int:
        return int(report.total > 9)


@dataclass(frozen=True, kw_only=True)
class Titled(Adds):
    """The same, and says more."""

    run_name = "titled"

    def title(self, report: Sum) -> str:
        return f"Sum of {len(self.numbers)}"

    def sections(self, report: Sum) -> Mapping[str, Section]:
        return {"first": report.section(), "second": Section("Second")}

    def summary(self, report: Sum, folder: Path) -> Mapping[str, object]:
        return {"total": report.total, "run": "not this"}

    def places(self, report: Sum, folder: Path) -> str:
        return f"In {folder.name}"


def _opens(run: Path) -> str:
    return f"workbench report {run} --open"


def test_a_study_keeps_its_run_folder_and_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Adds(numbers=(2, 3), out=tmp_path).run() == 0
    (info,) = list_runs(tmp_path)
    run = RunDir.open(info.path)
    assert run.finished and run.name == "adds" and run.steps() == ("n0", "n1", "sum")
    model = {"model": "embedded", "seed": 0, "dtype": "auto", "device": "auto"}
    assert run.config == model | {"numbers": [2, 3], "estimate": False}
    assert info.arguments == {"numbers": [2, 3]}
    assert json.loads((run.artifacts / "sum.json").read_text()) == {"total": 5}
    assert "A sum" in (run.path / "report.html").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "- The sum is 5.",
        "  2",
        "  3",
        f"Report: {run.path / 'report.html'}",
        f"Next: {_opens(run.path)}",
    ]


def test_json_is_one_object_and_the_places_are_those_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Adds(numbers=(9, 1), out=tmp_path / "a", json=True).run() == 1
    (info,) = list_runs(tmp_path / "a")
    expected = {"findings": ["The sum is 10."], "metrics": {"total": 10}, "run": str(info.path)}
    expected |= {"report": str(info.path / "report.html"), "next": _opens(info.path)}
    assert json.loads(capsys.readouterr().out) == expected
    assert Titled(numbers=(1,), out=tmp_path / "b", json=True).run() == 0
    (info,) = list_runs(tmp_path / "b")
    said = json.loads(capsys.readouterr().out)
    places = {"run": str(info.path), "report": str(info.path / "report.html"), "next": _opens(info.path)}
    assert said == {"total": 1} | places
    assert RunDir.open(info.path).steps() == ("n0", "first", "second")
    assert RunDir.open(info.path).env.get("title") == "Sum of 1"


def test_an_interrupted_study_is_continued_by_the_same_configuration_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        Adds(numbers=(1, 13), out=tmp_path).run()
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "has", lambda *_: True)
        Adds(numbers=(1, 13), out=tmp_path).run()
    Adds(numbers=(1, 12), out=tmp_path).run()
    assert [info.status for info in list_runs(tmp_path)] == ["finished", "finished"]


def test_wrong_input_and_other_requests_leave_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInputError, match="negative"):
        Adds(numbers=(-1,), out=tmp_path / "new").run()
    assert Adds(estimate=True, out=tmp_path / "new").run() is None
    assert not (tmp_path / "new").exists() and capsys.readouterr().out == "At once.\n"


@dataclass(frozen=True, kw_only=True)
class Reads(Study[Sum]):
    """Load a model and be interrupted."""

    run_name, step = "reads", "read"

    def measure(self, begin: Begin) -> Sum:
        dtypes.append(str(self.load_model(check=False).dtype))
        begin(self.load_model(check=False))
        raise KeyboardInterrupt


dtypes: list[str] = []


def test_an_interrupted_study_is_continued_in_its_own_precision_whatever_the_machine_measures_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.hf.save_pretrained(str(tmp_path / "model"))
    monkeypatch.setattr("workbench.models.loading._pick_device", lambda _: "cpu")
    dtypes.clear()
    for measured, seed in ((2.0, 0), (0.5, 0), (0.5, 1), (2.0, 1), (2.0, 2)):
        monkeypatch.setattr("workbench.models.loading.bf16_speedup", lambda measured=measured: measured)
        with pytest.raises(KeyboardInterrupt):
            Reads(model=str(tmp_path / "model"), seed=seed, out=tmp_path / "runs").run()
    bf16, fp32 = "torch.bfloat16", "torch.float32"
    assert dtypes == [bf16, bf16, fp32, fp32, bf16], "another configuration is a run of its own"
    assert len(list_runs(tmp_path / "runs")) == 3
