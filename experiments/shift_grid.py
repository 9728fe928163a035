"""Several SHIFT studies side by side: the same table of methods for each task, kept one by one in a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import circuits
from circuits.shift.asked import decider_of
from circuits.shift.choosing import methods_for
from circuits.shift.cue_panel import CueReliance
from circuits.shift.reading import ShiftOptions, of_two_labels
from circuits.shift.shift_report import RANDOM, SUBJECT, ShiftReport
from circuits.shift.task import ShiftTask
from circuits.shift.texts import LabelledTexts
from experiments.shift_task import read_saes, sae_model
from workbench.bases.base import Basis
from workbench.cli.study import Begin, SAEOptionStudy
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.numbers import counted
from workbench.core.records import from_jsonable, load_json, save_json
from workbench.core.stats import Estimate
from workbench.models.model import Model
from workbench.report.base import Headline, Metric, Report, Section, Table, Text
from workbench.report.blocks import Grid, Heat
from workbench.runs.run import RunDir

ORIGINAL, ORACLE = "original", "oracle probe"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One study of the grid.

    Attributes:
        name: of the step in the run folder.
        title: for people.
        task: its texts.
        judge: name of the judge.
        sites: sites of the SAEs; () takes all.
        probe_site: where the probe reads; None takes the last SAE's site.
    """

    name: str
    title: str
    task: ShiftTask
    judge: str
    sites: tuple[str, ...] = ()
    probe_site: str | None = None


@dataclass(frozen=True, kw_only=True)
class CellRow:
    """A method in one cell."""

    method: str
    regime: str | None
    accuracy: Estimate
    worst: Estimate
    cue_mcc: Estimate | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What is kept of one study beside its section.

    Attributes:
        title: of the cell.
        judge: who judged.
        n_spurious: features that were ablated.
        difference: SHIFT + retrain minus random features + retrain, paired.
        rows: one per method.
        reliance: per method and cue, where there are cues.
        traded: methods that rely less on one cue and more on another.
        left_out: methods that the study did not have, with reasons.
        seconds: of the study.
    """

    title: str
    judge: str
    n_spurious: int
    difference: Estimate
    rows: tuple[CellRow, ...]
    reliance: tuple[CueReliance, ...]
    traded: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float

    @classmethod
    def of(cls, cell: Cell, report: ShiftReport, seconds: float) -> CellResult:
        """Of a study."""
        difference = next(c.label for c in report.comparisons if (c.better, c.other) == (SUBJECT, RANDOM))
        return cls(
            title=cell.title, judge=report.judge, n_spurious=report.n_spurious, difference=difference,
            rows=tuple(
                CellRow(
                    method=row.name, regime=row.regime, accuracy=row.label, worst=row.worst, cue_mcc=row.cue_mcc,
                    seconds=row.seconds,
                )
                for row in report.methods
            ),
            reliance=report.cues.rows if report.cues else (), traded=report.cues.trades() if report.cues else (),
            left_out=report.left_out, seconds=seconds,
        )  # fmt: skip

    def row(self, method: str) -> CellRow | None:
        """The row of a method; None if the study did not have it."""
        return next((row for row in self.rows if row.method == method), None)

    def told(self) -> str:
        """The cell as a sentence."""
        parts = [f"{name} {row.worst}" for name in (ORIGINAL, SUBJECT, RANDOM, ORACLE) if (row := self.row(name))]
        verdict = self.difference.words("more than", "less than", "no more than")
        trading = f" Trading one cue for another: {', '.join(self.traded)}." if self.traded else ""
        return (
            f"{self.title}: worst-group accuracy {'; '.join(parts)}. {counted(self.n_spurious, 'features')} ablated, "
            f"which helps {verdict} random ones: accuracy {self.difference.change()}.{trading}"
        )


@dataclass(frozen=True, kw_only=True)
class ShiftGrid(Report):
    """Several studies side by side.

    Attributes:
        title: what is studied.
        about: how the tasks were made.
        cells: one per study.
        left_out: studies that could not be made, each with the reason.
    """

    title: str
    about: str
    cells: tuple[CellResult, ...]
    left_out: tuple[str, ...] = ()

    def findings(self) -> tuple[str, ...]:
        """One sentence per study, and which methods need no SAE and do as well."""
        return (*(cell.told() for cell in self.cells), *self._cheaper(), *self.left_out)

    def headline(self) -> Headline:
        """In how many studies SHIFT does more than random features; the numbers are of the least clear study."""
        helped = sum(cell.difference.low > 0 for cell in self.cells)
        sentence = (
            f"Ablating the features judged spurious helps more than random ones in {helped} of "
            f"{counted(len(self.cells), 'studies')}."
        )
        least = min(self.cells, key=lambda cell: cell.difference.low, default=None)
        own, other = (None, None) if least is None else (least.row(SUBJECT), least.row(RANDOM))
        if least is None or own is None or other is None:
            return Headline(sentence=sentence)
        return Headline(
            sentence=sentence, measure=f"Label accuracy, {least.title}", value=own.accuracy, control=other.accuracy,
            control_name=RANDOM, difference=least.difference,
        )  # fmt: skip

    def section(self) -> Section:
        """The grid as a section: a picture, then worst groups and accuracies by method and study."""
        metrics: dict[str, Metric] = {}
        for i, cell in enumerate(self.cells):
            for name in (ORIGINAL, SUBJECT, RANDOM, ORACLE):
                if row := cell.row(name):
                    metrics[f"{i}.{name}.worst"], metrics[f"{i}.{name}.label"] = row.worst, row.accuracy
            metrics[f"{i}.seconds"] = cell.seconds
        blocks = [
            Text(self.about), self._heat(), self._table("worst group", lambda row: row.worst),
            self._table("accuracy", lambda row: row.accuracy),
            self._table("correlation of attribute and prediction", lambda row: row.cue_mcc),
        ]  # fmt: skip
        if any(cell.reliance for cell in self.cells):
            blocks.append(self._reliance())
        return Section(self.title, tuple(blocks), self.findings(), metrics, self.headline())

    @property
    def _methods(self) -> tuple[str, ...]:
        """By what they may see."""
        regimes = {row.method: row.regime or "R9" for cell in self.cells for row in cell.rows}
        return tuple(sorted(regimes, key=lambda name: regimes[name]))

    def _heat(self) -> Heat:
        worst = {(cell.title, row.method): row.worst.value for cell in self.cells for row in cell.rows}
        titles = tuple(cell.title for cell in self.cells)
        values = tuple(tuple(worst.get((title, method)) for title in titles) for method in self._methods)
        return Heat("Worst-group accuracy", (Grid("methods by studies", self._methods, titles, values),))

    def _table(self, what: str, read: Callable[[CellRow], Estimate | None]) -> Table:
        rows = tuple(
            (method, *(None if (row := cell.row(method)) is None else read(row) for cell in self.cells))
            for method in self._methods
        )
        caption = f"{what.capitalize()} by method and study. Intervals are over the test texts of the study."
        return Table(("method", *(cell.title for cell in self.cells)), rows, caption)

    def _reliance(self) -> Table:
        rows = tuple(
            (cell.title, row.method, row.cue, row.mcc, row.change, row.drop)
            for cell in self.cells for row in cell.reliance
        )  # fmt: skip
        return Table(
            ("study", "method", "cue", "correlation with the prediction", "change", "drop of accuracy"), rows,
            "Whac-A-Mole: reliance on each cue. Changes are of sizes, against the original probe.",
        )  # fmt: skip

    def _cheaper(self) -> tuple[str, ...]:
        """Methods without features whose worst group is not below that of SHIFT + retrain, in every study."""
        ahead = []
        for method in self._methods:
            pairs = [(cell.row(method), cell.row(SUBJECT)) for cell in self.cells]
            is_other = "SHIFT" not in method and method not in (ORACLE, "skyline", "skyline + retrain")
            if is_other and all(a and b and a.worst.value >= b.worst.value for a, b in pairs):
                ahead.append(method)
        if not self.cells:
            return ()
        if not ahead:
            return ("No other method has a worst group at least as good as that of SHIFT + retrain in every study.",)
        return (f"At least as good as SHIFT + retrain in the worst group of every study: {', '.join(ahead)}.",)


@dataclass(frozen=True, kw_only=True)
class GridStudy(SAEOptionStudy[ShiftGrid]):
    """A command that runs several studies; each is kept as soon as it is done."""

    sae: tuple[Path, ...]
    """SAEs: each a folder, a run that holds one (folder, name or latest), or a folder of one SAE per site."""
    methods: tuple[str, ...] = ("all",)
    """What SHIFT is compared with: all, standard, or names of methods."""
    top_k: int = 64
    """How many features, strongest effect first, are judged."""
    random_draws: int = 5
    """Sets of random features to compare with."""
    attribution_rows: int = 16
    """Training texts of the effects that have to be estimated: those of embeddings, and of SAEs below the probe."""

    def cells(self) -> list[Cell]:
        """The studies."""
        raise NotImplementedError(f"{type(self).__name__} has no cells(). Define it.")

    def about(self) -> tuple[str, str]:
        """Title of the page, and how the tasks were made."""
        raise NotImplementedError(f"{type(self).__name__} has no about(). Define it.")

    def measure(self, begin: Begin) -> ShiftGrid:
        saes, cells = read_saes(self.sae, self.runs_folder()), self.cells()
        for cell in cells:
            options = self._options(cell)
            methods_for(of_two_labels(cell.task, options), decider_of(cell.judge, cell.task, self.seed), options)
            if missing := [site for site in cell.sites if site not in saes]:
                raise InvalidInputError(f"{cell.title}: --sae has no SAE at {missing[0]}. There are {', '.join(saes)}.")
        model = self.load_model()
        bases = circuits.bases(model, saes)
        title, about = self.about()
        run = begin(model)
        if not run.has(self.step):
            run.save_step(self.step, Section(title, (Text(about),)))  # the first on the page, whole at the end
        for cell in cells:
            if not run.has(cell.name):
                self._study(run, cell, model, bases)
        made = [cell for cell in cells if _file(run, cell).is_file()]
        return ShiftGrid(
            title=title, about=about,
            cells=tuple(from_jsonable(CellResult, load_json(_file(run, cell), dict)) for cell in made),
            left_out=tuple(said for cell in cells if cell not in made for said in run.load_step(cell.name).findings),
        )  # fmt: skip

    def _study(self, run: RunDir, cell: Cell, model: Model, bases: Mapping[str, Basis]) -> None:
        start = time.perf_counter()
        chosen = {site: basis for site, basis in bases.items() if not cell.sites or site in cell.sites}
        try:
            report = circuits.shift(model, chosen, cell.task, cell.judge, options=self._options(cell))
        except (DegenerateInputError, MismatchError) as error:  # such as a judge that finds no row it could use
            said = f"{cell.title} is left out: {error}"
            run.save_step(cell.name, Section(cell.title, (), (said,), headline=Headline(sentence=said)))
            return
        save_json(_file(run, cell), CellResult.of(cell, report, time.perf_counter() - start))
        run.save_step(cell.name, replace(report.section(), title=cell.title))

    def _options(self, cell: Cell) -> ShiftOptions:
        return ShiftOptions(
            methods=self.methods[0] if self.methods in (("all",), ("standard",)) else self.methods,
            probe_site=cell.probe_site, top_k=self.top_k, random_draws=self.random_draws, seed=self.seed,
            attribution_rows=self.attribution_rows,
        )  # fmt: skip

    def model_name(self) -> str:
        return self.model or sae_model(self.sae, self.runs_folder()) or "embedded"


def _file(run: RunDir, cell: Cell) -> Path:
    return run.artifacts / f"{cell.name}.json"


def with_fewer_balanced(task: ShiftTask, n: int) -> ShiftTask:
    """The task with `n` balanced rows at most, as many of each group."""
    balanced = task.balanced
    if balanced is None:
        return task
    each = max(1, n // len(task.groups()))
    return replace(task, balanced=_first_of_each(balanced, each))


def _first_of_each(rows: LabelledTexts, each: int) -> LabelledTexts:
    taken: dict[object, int] = {}
    chosen = []
    for row, group in enumerate(rows.groups):
        taken[group] = taken.get(group, 0) + 1
        if taken[group] <= each:
            chosen.append(row)
    return rows.rows(chosen)
