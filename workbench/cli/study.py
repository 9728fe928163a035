"""What all studies share: a run folder that the same command continues, a report, and how both are printed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeAlias, TypeVar

from workbench.cli.base import BaseCommand, Command, LoadsModel, typed
from workbench.cli.saes import OneSAE, SAECommand
from workbench.core.records import save_json
from workbench.report.base import Report, Section

if TYPE_CHECKING:
    from workbench.models.model import Model
    from workbench.runs.run import RunDir

R = TypeVar("R", bound=Report)

Begin: TypeAlias = "Callable[..., RunDir]"
"""Opens the run folder and records the model that it is given, if any."""


@dataclass(frozen=True, kw_only=True)
class RunFolderStudy(BaseCommand, Generic[R]):
    """A command that measures something and keeps a run folder; its fields are the configuration of the run.

    A study says what it measures, and may say more about its result; what happens to the folder is said here.
    """

    run_name: ClassVar[str]
    """Of its run folders."""
    step: ClassVar[str]
    """Of its report in the run folder."""

    keeps_json: ClassVar[bool] = False
    """Whether the run folder keeps the report as JSON, in a file called after the step."""

    out: Path = dataclasses.field(default=Path("runs"), metadata={"config": False})
    """Folder of run folders; each run gets a new one in it."""

    def measure(self, begin: Begin) -> R | None:
        """The result.

        Everything that may be wrong with the options is met before `begin(model)`, which opens the run folder: the one
        of this configuration that was interrupted, or a new one. What is kept in it is not made again.

        Returns:
            The report; None if this call was for something else, such as an estimate.
        """
        raise NotImplementedError(f"{type(self).__name__} has no measure(). Define it.")

    def sections(self, report: R) -> Mapping[str, Section]:
        """What the run folder keeps, by step."""
        return {self.step: report.section()}

    def title(self, report: R) -> str:
        """Of the page."""
        return report.section().title

    def summary(self, report: R, folder: Path) -> Mapping[str, object]:
        """What `--json` prints besides the places of run folder and page."""
        return {"findings": report.findings(), "metrics": report.section().metrics}

    def details(self, report: R, folder: Path) -> Iterable[str]:
        """Lines that are printed below the findings."""
        return ()

    def places(self, report: R, folder: Path) -> str:
        """The last line: where the results are."""
        return f"Report: {folder / 'report.html'}"

    def following(self, report: R, folder: Path) -> str | None:  # noqa: ARG002 - studies differ in what they look at
        """The command that comes next."""
        return typed("report", folder, "--open")

    def exit_code(self, report: R) -> int:
        """Of the command."""
        return 0

    def runs_folder(self) -> Path:
        """Where runs are looked up by name: where this one is made."""
        return self.out

    def start(self, fresh: bool = False) -> RunDir:
        """The run folder of this configuration, continued if it was interrupted; inside `out`."""
        from workbench.engine.folder import require_local
        from workbench.runs.run import RunDir

        require_local(self.out)  # also for those who call it without the command line
        return RunDir.resume_or_create(self.run_name, self, root=self.out, fresh=fresh)

    def run(self) -> int | None:
        """Measures, saves the run folder, and says what was found."""
        begun: list[RunDir] = []
        with contextlib.ExitStack() as until_finished:

            def begin(model: Model | None = None) -> RunDir:
                begun.append(until_finished.enter_context(self.start()))
                if model is not None:
                    begun[0].note_model(model)
                return begun[0]

            report = self.measure(begin)
            if report is None:
                return None
            (run,) = begun
            if self.keeps_json:
                save_json(run.artifacts / f"{self.step}.json", report.to_json())
            for step, section in self.sections(report).items():
                run.save_step(step, section)
            html = run.finish(self.title(report))
        summary = {**self.summary(report, run.path), "run": run.path, "report": html}
        self.emit(summary, self._lines(report, run.path), self.following(report, run.path))
        return self.exit_code(report)

    def _lines(self, report: R, folder: Path) -> Iterator[str]:
        headline = report.section().headline
        if headline is not None:
            yield headline.line()
        yield from (f"- {finding}" for finding in report.findings())
        yield from self.details(report, folder)
        yield self.places(report, folder)


@dataclass(frozen=True, kw_only=True)
class _ModelStudy(RunFolderStudy[R], LoadsModel):
    """A study that loads a model.

    A subclass is its whole configuration: each field is an option of the command line, the string below it the help
    text. `out` and `json` say where results go and are no part of the configuration that a run folder records.
    """

    def load_model(self, *, check: bool = True) -> Model:
        """The model, in the precision of the interrupted run that this study continues, if there is one.

        Otherwise a measurement of speed decides, which another load of the machine may turn the other way; what is
        kept in the run folder must not be continued in another precision.
        """
        from workbench.runs.run import RunDir, interrupted_runs

        run = next(interrupted_runs(self.run_name, self, self.out), None)
        noted = [] if run is None else RunDir.open(run).env.get("models", [])
        dtype = noted[0].get("dtype", self.dtype) if noted else self.dtype
        return self.load(dtype=dtype.removeprefix("torch."), check=check)


@dataclass(frozen=True, kw_only=True)
class Study(_ModelStudy[R], Command):
    """A study of a model."""


@dataclass(frozen=True, kw_only=True)
class SAEOptionStudy(_ModelStudy[R], SAECommand):
    """A study of a model and an SAE that is an option of it."""


@dataclass(frozen=True, kw_only=True)
class SAEStudy(_ModelStudy[R], OneSAE):
    """A study of an SAE."""
