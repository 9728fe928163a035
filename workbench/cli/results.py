"""Commands that look at what other commands wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from workbench.cli.base import BaseCommand, typed
from workbench.cli.places import RUNS, SAE_IN_RUN
from workbench.core.errors import MissingFileError
from workbench.core.numbers import number
from workbench.core.stats import Estimate
from workbench.report.section import MetricRow
from workbench.runs.content import HeadlineRow
from workbench.runs.run import RunDir, RunInfo, find_run, list_runs


@dataclass(frozen=True, kw_only=True)
class Runs(BaseCommand):
    """List runs: model, arguments, main numbers, how far.

    Arguments are those that differ from the defaults of the command.

    Example: workbench runs --limit 5
    """

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder that holds the run folders."""
    limit: int = 20
    """How many to show, newest first."""
    metrics: int = 3
    """How many results to show per run; `--json` gives all."""

    def run(self) -> None:
        """List them."""
        if not self.folder.is_dir():
            raise MissingFileError(f"There is no folder {self.folder}. Name one that holds runs; a study makes runs/.")
        infos = list_runs(self.folder)
        shown = infos[: self.limit]
        self.emit(
            {"folder": self.folder, "total": len(infos), "runs": shown},
            self._lines(shown, len(infos)),
            self._following(shown),
        )

    def _following(self, shown: tuple[RunInfo, ...]) -> str:
        return typed("report", shown[0].path, "--open") if shown else typed("demo")

    def _lines(self, shown: tuple[RunInfo, ...], total: int) -> Iterator[str]:
        if not shown:
            yield f"No runs in {self.folder}."
            return
        for info in shown:
            yield f"{info.started[:16].replace('T', ' ')}  {info.status:<10}  {info.path}"
            given = [f"{name}={_argument(value)}" for name, value in info.arguments.items() if name != "model"]
            for line in (
                info.problem,
                " ".join(filter(None, [info.model or str(info.arguments.get("model", "")), *given])),
            ):
                if line:
                    yield f"    {line}"
            yield from (f"    {line}" for line in _main_numbers(info, self.metrics))
        if total > len(shown):
            yield f"{total - len(shown)} older runs are not shown; --limit {total} shows all."


@dataclass(frozen=True, kw_only=True)
class Report(BaseCommand):
    """Write the report of a run again, and say where it is.

    It is made from the saved steps, also of a run that is not finished.

    Example: workbench report latest --open
    """

    which: tyro.conf.Positional[str] = "latest"
    """Run folder, part of its name, or "latest"."""
    folder: Path = Path("runs")
    """Where to look for a name."""
    open: bool = False
    """Open it in the browser."""

    def run(self) -> None:
        """Write it."""
        run = RunDir.open(find_run(self.which, self.folder))
        notice = "" if run.finished else f"Unfinished. Finished steps: {', '.join(run.steps()) or 'none'}."
        report = run.write_report(notice).resolve()
        if self.open:
            import webbrowser

            webbrowser.open(report.as_uri())
        summary = {"report": report, "finished": run.finished, "steps": run.steps()}
        self.emit(summary, [str(report)], self._following(run))

    def _following(self, run: RunDir) -> str:
        """The page, if it is not open yet; then what the run has made, or the other runs."""
        if not self.open:
            return typed("report", run.path, "--open")
        if (run.path / SAE_IN_RUN).is_dir():
            return typed("serve", "--sae", run.path)
        return typed("runs", *([] if run.path.parent == RUNS else [run.path.parent]))


def _main_numbers(info: RunInfo, most: int) -> list[str]:
    """The headlines of the steps; the first numbers of a run that has none."""
    told = [_headline(row) for row in info.headlines if row["value"] is not None]
    return (told or [f"{name} = {_metric(metric)}" for name, metric in info.metrics.items()])[:most]


def _headline(row: HeadlineRow) -> str:
    value, control = row["value"], row["control"]
    assert value is not None
    beside = "" if control is None else f", {row['control_name'] or 'control'} {_metric(control)}"
    return f"{row['step']}: {row['measure']} {_metric(value)}{beside}: {row['verdict']}"


def _argument(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _metric(metric: MetricRow) -> str:
    value, low, high = (metric.get(key) for key in ("value", "low", "high"))
    if isinstance(value, str):
        return value
    if value is None or not isinstance(low, int | float) or not isinstance(high, int | float):
        return number(value)
    return str(Estimate(value, low, high, metric["n"] or 0, metric["method"] or "", metric["unit"] or ""))
