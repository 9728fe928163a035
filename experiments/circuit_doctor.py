"""The attribution doctor as a command, on the effects that a circuit was chosen by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from circuits.doctor.doctor import DoctorOptions, examination, together
from circuits.doctor.nodes import NodeCase
from circuits.doctor.report import NAMES, DoctorReport
from circuits.edges.parts import edges_in
from circuits.nodes.parts import effects_in
from experiments.circuit_find import (
    CIRCUIT,
    DOCTOR,
    EDGES,
    FOUND_FILE,
    PAGE,
    FoundRun,
    OfCircuit,
    found_run,
    newest_of,
    title_of,
)
from experiments.circuit_tables import PARTS, opened
from workbench.cli.base import typed
from workbench.cli.study import Begin
from workbench.core import progress
from workbench.core.errors import InvalidInputError
from workbench.core.records import save_json

if TYPE_CHECKING:
    from circuits.pairs import Pairs
    from workbench.models.model import Model
    from workbench.runs.run import RunDir

_UNITS = (*((k,) for k in range(1, 7)), (7, 8), (9,), (10,), (11,))
"""Checks that are measured together, and kept."""


@dataclass(frozen=True, kw_only=True)
class CircuitDoctor(OfCircuit[DoctorReport]):
    """Check the effects that a circuit was chosen by.

    Eleven checks; what fails is written across its page.

    Example: workbench circuit doctor latest
    """

    run_name = DOCTOR
    step = "doctor"
    keeps_json = True

    which: tyro.conf.Positional[Path]
    """Run of `workbench circuit find`: its folder, a part of its name, or latest."""
    inputs: int = 30
    """Pairs that are examined."""
    items: int = 50
    """Nodes per pair and site that are patched alone."""
    sites: int = 2
    """Sites that are examined, those of the largest effects."""
    steps: tuple[int, ...] = (8, 16, 32, 64)
    """Steps of the integral at which sums are compared."""
    checks: tuple[int, ...] = ()
    """Numbers of the checks, 1 to 11; by default all."""

    def measure(self, begin: Begin) -> DoctorReport:
        options = DoctorOptions(
            inputs=self.inputs, items=self.items, sites=self.sites, steps=self.steps, seed=self.seed
        )
        if unknown := sorted(set(self.checks) - NAMES.keys()):
            raise InvalidInputError(f"--checks {unknown[0]}: the checks are 1 to {len(NAMES)}.")
        found = found_run(self.which, self.runs_folder())
        effects = effects_in(found.path / "artifacts" / PARTS)
        model = self.load_as(found)
        pairs = found.study.chosen_pairs(model)
        run = begin(model)
        examine = examination(effects, self._case(found, model, pairs), options)
        wanted = [tuple(k for k in unit if not self.checks or k in self.checks) for unit in _UNITS]
        wanted = [unit for unit in wanted if unit]
        with opened(run, pairs, found.path) as keep:
            reports = [
                keep.once(f"check-{unit[0]:02d}", DoctorReport, lambda unit=unit: examine(unit))
                for unit in progress.track(wanted, description="checks", unit="checks")
            ]
        report = together(reports)
        self._save(run, found, report, pairs)
        return report

    def _case(self, found: FoundRun, model: Model, pairs: Pairs) -> NodeCase:
        study = found.study
        return NodeCase(
            model=model, bases=study.make_bases(model), examples=pairs.to(model.device), metric=study.measured(),
            method=study.method, steps=study.steps, rule=study.rule, seed=self.seed,
        )  # fmt: skip

    def _save(self, run: RunDir, found: FoundRun, report: DoctorReport, pairs: Pairs) -> None:
        """The circuit and its page with the verdict."""
        circuit = found.circuit.stamped(report)
        circuit.save(run.artifacts / CIRCUIT)
        save_json(run.artifacts / FOUND_FILE, {"run": found.path.name})
        with_edges = newest_of(found.path, EDGES)
        circuit.to_html(
            run.artifacts / PAGE, None if with_edges is None else edges_in(with_edges / "artifacts" / PARTS),
            pairs=pairs, effects=effects_in(found.path / "artifacts" / PARTS), cards=found.study.cards(circuit),
            title=title_of(found.study),
        )  # fmt: skip

    def details(self, report: DoctorReport, folder: Path) -> list[str]:
        return [f"Page with the verdict: {folder / 'artifacts' / PAGE}"]

    def summary(self, report: DoctorReport, folder: Path) -> Mapping[str, object]:
        where = folder / "artifacts"
        return {
            **super().summary(report, folder), "verdict": report.verdict, "failed": list(report.numbers),
            "checks": [dataclasses.asdict(check) | {"name": check.name} for check in report.checks],
            "circuit": where / CIRCUIT, "page": where / PAGE,
        }  # fmt: skip

    def following(self, report: DoctorReport, folder: Path) -> str:
        return typed("circuit", "edges", self.which)
