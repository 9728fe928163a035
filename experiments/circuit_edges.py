"""The edges of a circuit, and what it carries, as commands on a run that found it; and its page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from circuits.edges.parts import all_edges, keep_edges
from circuits.edges.report import FoundEdges
from circuits.faithful.controls import random_circuit, top_activation_circuit
from circuits.faithful.curves import FaithfulnessCurve, faithfulness_curve
from circuits.faithful.measure import Errors, Faithfulness, faithfulness
from circuits.faithful.parts import once
from circuits.faithful.report import (
    ALL_ERRORS,
    CIRCUIT,
    COMPLEMENT,
    NO_ERRORS,
    RANDOM,
    TOP_ACTIVATION,
    CurveRow,
    EvaluatedCircuit,
    curve_rows,
)
from circuits.graph.circuit import Circuit, load_circuit
from circuits.nodes.effects import NodeEffects
from circuits.nodes.parts import effects_in
from experiments.circuit_find import (
    DOCTOR,
    EDGES,
    FIND,
    FOUND_FILE,
    PAGE,
    FoundRun,
    OfCircuit,
    found_run,
    newest_of,
    size_of,
    slices,
    title_of,
)
from experiments.circuit_tables import PARTS, opened
from workbench.cli.base import BaseCommand, typed
from workbench.cli.places import named_run
from workbench.cli.study import Begin
from workbench.core import progress
from workbench.core.errors import InvalidInputError, MissingFileError
from workbench.core.records import save_json

if TYPE_CHECKING:
    from circuits.edges.tables import Edges
    from circuits.pairs import Pairs
    from workbench.models.model import Model

EDGES_FILE = "edges.csv"
"""All edges, among the artifacts of a run of `workbench circuit edges`."""


@dataclass(frozen=True, kw_only=True)
class CircuitEdges(OfCircuit[FoundEdges]):
    """Find the edges between the nodes of a circuit.

    Adds them to its page.

    Example: workbench circuit edges latest
    """

    run_name = EDGES
    step = "edges"

    which: tyro.conf.Positional[Path]
    """Run of `workbench circuit find`: its folder, a part of its name, or latest."""
    left: Literal["clean", "ig"] = "clean"
    """Gradient at the later node: at the clean state, or its mean on the way to the patched one."""
    rows: int = dataclasses.field(default=16, metadata={"config": False})
    """Pairs per part; a stopped run loses one part at most."""

    def measure(self, begin: Begin) -> FoundEdges:
        found = found_run(self.which, self.runs_folder())
        if self.rows < 1:
            raise InvalidInputError(f"--rows {self.rows}: it is at least 1.")
        if len([site for site in found.circuit.sites.values() if len(site)]) < 2:
            raise InvalidInputError(
                f"{found.path}: the circuit has nodes at one site, and edges lead from one to another. Find a circuit "
                "at several --sites."
            )
        model = self.load_as(found)
        pairs = found.study.chosen_pairs(model)
        run = begin(model)
        with opened(run, pairs, found.path) as keep:
            for name, part in slices(pairs, self.rows):
                if not keep.has(name):
                    keep_edges(keep, name, self._edges(found, model, part))
            edges = all_edges(keep)
        save_json(run.artifacts / FOUND_FILE, {"run": found.path.name})
        edges.frame().to_csv(run.artifacts / EDGES_FILE, index=False)
        effects = effects_in(found.path / "artifacts" / PARTS)
        found.circuit.to_html(
            run.artifacts / PAGE, edges, pairs=pairs, effects=effects, cards=found.study.cards(found.circuit),
            title=title_of(found.study),
        )  # fmt: skip
        return FoundEdges(edges=edges)

    def _edges(self, found: FoundRun, model: Model, pairs: Pairs) -> Edges:
        from circuits.edges.attribute import edge_effects

        study = found.study
        return edge_effects(
            model, study.make_bases(model), pairs, study.measured(), found.circuit, left=self.left, steps=study.steps,
            rule=study.rule,
        )  # fmt: skip

    def details(self, report: FoundEdges, folder: Path) -> list[str]:
        return [f"All edges: {folder / 'artifacts' / EDGES_FILE}; picture: {folder / 'artifacts' / PAGE}"]

    def summary(self, report: FoundEdges, folder: Path) -> Mapping[str, object]:
        where = folder / "artifacts"
        return {**super().summary(report, folder), "edges": where / EDGES_FILE, "page": where / PAGE}

    def following(self, report: FoundEdges, folder: Path) -> str:
        return typed("circuit", "show", folder, "--open")


@dataclass(frozen=True)
class NodeSet:
    """Nodes whose faithfulness is measured.

    Attributes:
        circuit: the nodes.
        errors: which error nodes are kept.
        complement: keep all but the nodes instead.
    """

    circuit: Circuit
    errors: Errors = "circuit"
    complement: bool = False


@dataclass(frozen=True, kw_only=True)
class CircuitEval(OfCircuit[EvaluatedCircuit]):
    """Measure how much a circuit carries on held-out pairs.

    With and without errors, beside as many other features, and over numbers of nodes.

    Example: workbench circuit eval latest
    """

    run_name = "circuit-eval"
    step = "faithfulness"

    which: tyro.conf.Positional[Path]
    """Run of `workbench circuit find`: its folder, a part of its name, or latest."""
    pairs: Path | None = None
    """File of held-out pairs; by default the test words of the run's behaviour."""
    limit: int = 40
    """Pairs at most."""
    ablation: Literal["mean", "zero", "resample"] = "mean"
    """What nodes outside are put to."""
    counts: tuple[int, ...] = (10, 25, 50, 100, 200)
    """Numbers of nodes of further circuits from the same effects."""
    draws: int = 3
    """Draws of random features."""

    def held_out(self, found: FoundRun, model: Model) -> Pairs:
        """The pairs, of one length: that of the circuit if it has positions.

        Raises:
            InvalidInputError: if the run read its pairs from a file and no other one was given.
        """
        study = found.study
        if self.pairs is None and not study.task:
            raise InvalidInputError(
                f"{found.path} found the circuit on {study.pairs}. Give other pairs: --pairs HELD-OUT.jsonl."
            )
        own = dataclasses.replace(
            study, split="test", limit=self.limit, pairs=self.pairs, task="" if self.pairs else study.task
        )
        return own.read_pairs(model).of_one_length(found.circuit.n_tokens)

    def measure(self, begin: Begin) -> EvaluatedCircuit:
        if self.draws < 1 or min(self.counts, default=1) < 1:
            raise InvalidInputError(f"--draws {self.draws}, --counts {self.counts}: each is at least 1.")
        found = found_run(self.which, self.runs_folder())
        effects = effects_in(found.path / "artifacts" / PARTS)
        model = self.load_as(found)
        pairs = self.held_out(found, model)
        run = begin(model)
        bases = found.study.make_bases(model)
        sets = self._sets(found.circuit, effects, top_activation_circuit(model, bases, pairs, found.circuit))

        def measure(chosen: NodeSet) -> Faithfulness:
            return faithfulness(
                model, bases, chosen.circuit, pairs, found.study.measured(), ablation=self.ablation,
                errors=chosen.errors, complement=chosen.complement, seed=self.seed,
            )  # fmt: skip

        def curve(n: int) -> FaithfulnessCurve:
            return faithfulness_curve(
                model, bases, effects, pairs, found.study.measured(), counts=(n,), draws=self.draws,
                ablation=self.ablation, seed=self.seed,
            )  # fmt: skip

        with (
            opened(run, pairs, found.path) as keep,
            progress.task(total=len(sets) + len(self.counts), description="circuits", unit="circuits") as task,
        ):
            arms: dict[str, Faithfulness] = {}
            for name, chosen in sets.items():
                arms[name] = once(keep, name, lambda chosen=chosen: measure(chosen))
                task.advance(1)
            rows: list[CurveRow] = []
            for n in self.counts:
                rows += keep.once(f"curve-{n}", list[CurveRow], lambda n=n: curve_rows(curve(n)))
                task.advance(1)
        drawn = tuple(arms.pop(name) for name in sets if name.startswith(RANDOM))
        return EvaluatedCircuit(arms=arms, random=drawn, n_nodes=found.circuit.n, curve=tuple(rows))

    def _sets(self, circuit: Circuit, effects: NodeEffects, most: Circuit) -> dict[str, NodeSet]:
        draws = range(self.draws)
        random = {f"{RANDOM} {i}": NodeSet(random_circuit(effects, circuit, self.seed + i)) for i in draws}
        return {
            CIRCUIT: NodeSet(circuit), NO_ERRORS: NodeSet(circuit, "none"), ALL_ERRORS: NodeSet(circuit, "all"),
            COMPLEMENT: NodeSet(circuit, complement=True), TOP_ACTIVATION: NodeSet(most), **random,
        }  # fmt: skip

    def summary(self, report: EvaluatedCircuit, folder: Path) -> Mapping[str, object]:
        return {
            **super().summary(report, folder),
            "faithfulness": report.frame().to_dict("records"),
            "curve": report.curve,
        }

    def following(self, report: EvaluatedCircuit, folder: Path) -> str:
        return typed("report", folder, "--open")


@dataclass(frozen=True, kw_only=True)
class CircuitShow(BaseCommand):
    """Say where the page of a circuit is, and open it.

    That with edges or the doctor's verdict, whichever is newest.

    Example: workbench circuit show latest --open
    """

    which: tyro.conf.Positional[Path]
    """Run of `workbench circuit find` or `circuit edges`: its folder, a part of its name, or latest."""
    folder: Path = Path("runs")
    """Where to look for a name."""
    open: bool = False
    """Open it in the browser."""

    def run(self) -> None:
        """Finds the page."""
        run = self._run_folder()
        page = (newest_of(run, EDGES, DOCTOR) or run) / "artifacts" / PAGE
        if not page.is_file():
            raise MissingFileError(
                f"{run} has no {PAGE}: it is not finished, or of another command. Give a finished run of `workbench "
                "circuit find` or `circuit edges`."
            )
        if self.open:
            import webbrowser

            webbrowser.open(page.resolve().as_uri())
        saved = run / "artifacts" / "circuit"
        said = [f"{size_of(load_circuit(saved))}."] if saved.is_dir() else []
        following = None if self.open else typed("circuit", "show", self.which, "--open")
        self.emit({"page": page, "run": run}, [*said, f"Page: {page}"], following)

    def _run_folder(self) -> Path:
        try:
            return named_run(self.which, FIND, self.folder)
        except MissingFileError as error:
            try:
                return named_run(self.which, EDGES, self.folder)
            except MissingFileError:
                raise error from None
