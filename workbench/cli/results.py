"""Commands that look at what other commands wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from workbench.cli.base import BaseCommand
from workbench.core.numbers import number
from workbench.core.stats import Estimate
from workbench.report.section import MetricRow
from workbench.runs.run import RunDir, RunInfo, find_run, list_runs


@dataclass(frozen=True, kw_only=True)
class Runs(BaseCommand):
    """List the runs in a folder: when, what, how far, main numbers."""

    folder: tyro.conf.Positional[Path] = Path("runs")
    """Folder that holds the run folders."""
    limit: int = 20
    """How many to show, newest first."""
    metrics: int = 3
    """How many numbers to show per run; `--json` gives all."""

    def run(self) -> None:
        """List them."""
        infos = list_runs(self.folder)
        shown = infos[: self.limit]
        self.emit({"folder": self.folder, "total": len(infos), "runs": shown}, self._lines(shown, len(infos)))

    def _lines(self, shown: tuple[RunInfo, ...], total: int) -> Iterator[str]:
        if not shown:
            yield f"No runs in {self.folder}. `workbench demo` makes the first."
            return
        for info in shown:
            yield f"{info.started[:16].replace('T', ' ')}  {info.status:<10}  {info.path}"
            if info.problem:
                yield f"    {info.problem}"
            for name, metric in list(info.metrics.items())[: self.metrics]:
                yield f"    {name} = {_metric(metric)}"
        if total > len(shown):
            yield f"{total - len(shown)} older runs are not shown; --limit {total} shows all."


@dataclass(frozen=True, kw_only=True)
class Report(BaseCommand):
    """Write report.html of a run again from its saved steps, and say where it is."""

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
        self.emit({"report": report, "finished": run.finished, "steps": run.steps()}, [str(report)])


def _metric(metric: MetricRow) -> str:
    value, low, high = (metric.get(key) for key in ("value", "low", "high"))
    if isinstance(value, str):
        return value
    if value is None or not isinstance(low, int | float) or not isinstance(high, int | float):
        return number(value)
    return str(Estimate(value, low, high, metric["n"] or 0, metric["method"] or "", metric["unit"] or ""))
