"""The nodes of a circuit as a command, and the run folder that further commands on circuits read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from circuits.graph.circuit import Circuit, ErrorRule, Sign, load_circuit
from circuits.graph.report import FoundCircuit
from circuits.nodes.runs import Method, Rule
from experiments.circuit_bases import BasesOptions
from experiments.circuit_tables import PairsStudy, opened
from workbench.cli.base import LoadsModel, typed
from workbench.cli.places import named_run
from workbench.cli.study import Begin, R, RunFolderStudy
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted

if TYPE_CHECKING:
    from circuits.metrics import AnswerMetric
    from circuits.nodes.effects import NodeEffects
    from circuits.pairs import Pairs
    from workbench.bases.base import Basis
    from workbench.models.model import Model
    from workbench.runs.run import RunDir

FIND, EDGES, DOCTOR = "circuit-find", "circuit-edges", "circuit-doctor"
"""Names of the runs of `workbench circuit find`, `circuit edges` and `circuit doctor`."""
FOUND_FILE = "found.json"
"""Among the artifacts of the latter two: which run found the circuit."""
CIRCUIT, PAGE = "circuit", "circuit.html"
"""Among the artifacts of a run: folder of the circuit, and its page."""


@dataclass(frozen=True, kw_only=True)
class BasesStudy(BasesOptions, PairsStudy[R]):
    """A study of pairs of prompts and of bases at some sites."""


@dataclass(frozen=True, kw_only=True)
class CircuitFind(BasesStudy[FoundCircuit]):
    """Find the features that carry a behaviour.

    Saves the circuit and its page.

    Example: workbench circuit find --task sva_nounpp --bases my-saes --n 100
    """

    run_name = FIND
    step = "circuit"

    split: Literal["train", "test"] = "train"
    """Words that the pairs of a behaviour are made of."""
    limit: int = 100
    """Pairs at most."""
    n: int = 100
    """Nodes of the circuit."""
    sign: Sign = "both"
    """Keep nodes that support the clean answer (positive), oppose it, or both."""
    errors: ErrorRule = "ranked"
    """Errors as nodes: ranked with features, all, resid or none."""
    positions: bool = False
    """Keep positions apart; takes pairs of the commonest length."""
    metric: Literal["logit_difference", "log_probability", "negative_logit", "kl"] = "logit_difference"
    """What is explained."""
    method: Method = "ig"
    """How effects are estimated: ig, atp or exact."""
    steps: int = 10
    """Points of the integral."""
    rule: Rule = "midpoint"
    """Where they are."""
    rows: int = field(default=16, metadata={"config": False})
    """Pairs per part; a stopped run loses one part at most."""

    def measured(self) -> AnswerMetric:
        """The metric."""
        from circuits.metrics import AnswerMetric

        return AnswerMetric(self.metric)

    def chosen_pairs(self, model: Model) -> Pairs:
        """The pairs that the circuit is found on."""
        pairs = self.read_pairs(model)
        return pairs.of_one_length() if self.positions else pairs

    def measure(self, begin: Begin) -> FoundCircuit:
        if self.n < 1 or self.rows < 1 or self.steps < 1:
            raise InvalidInputError(f"--n {self.n}, --rows {self.rows}, --steps {self.steps}: each is at least 1.")
        model = self.load_model()
        bases, pairs = self.make_bases(model), self.chosen_pairs(model)
        run = begin(model)
        effects = self._effects(run, model, bases, pairs)
        circuit = effects.circuit(n=self.n, sign=self.sign, errors=self.errors)
        circuit.save(run.artifacts / CIRCUIT)
        circuit.to_html(
            run.artifacts / PAGE, pairs=pairs, effects=effects, cards=self.cards(circuit), title=title_of(self)
        )
        return FoundCircuit(circuit=circuit, gaps=effects.gaps, n=effects.n, metric=effects.metric, note=pairs.note)

    def _effects(self, run: RunDir, model: Model, bases: dict[str, Basis], pairs: Pairs) -> NodeEffects:
        from circuits.nodes.attribute import node_effects
        from circuits.nodes.parts import all_effects, keep_effects

        with opened(run, pairs) as keep:
            for name, part in slices(pairs, self.rows):
                if not keep.has(name):
                    effects = node_effects(
                        model, bases, part, self.measured(), method=self.method, steps=self.steps, rule=self.rule,
                        aggregation="none" if self.positions else "sum",
                    )  # fmt: skip
                    keep_effects(keep, name, effects)
            return all_effects(keep)

    def details(self, report: FoundCircuit, folder: Path) -> list[str]:
        return [f"Picture: {folder / 'artifacts' / PAGE}"]

    def summary(self, report: FoundCircuit, folder: Path) -> dict[str, object]:
        return {
            **super().summary(report, folder), "circuit": folder / "artifacts" / CIRCUIT,
            "page": folder / "artifacts" / PAGE, "nodes": report.frame().to_dict("records"),
        }  # fmt: skip

    def following(self, report: FoundCircuit, folder: Path) -> str:
        return typed("circuit", "doctor", folder)


def title_of(study: CircuitFind) -> str:
    """Of the page of its circuit."""
    return f"Circuit of {study.task or study.pairs}"


def slices(pairs: Pairs, rows: int) -> Iterator[tuple[str, Pairs]]:
    """Some pairs at a time, each part with its name."""
    for start in range(0, len(pairs), rows):
        yield f"pairs-{start:06d}-{min(start + rows, len(pairs)):06d}", pairs[start : start + rows]


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """A finished run of `workbench circuit find`.

    Attributes:
        path: the run folder.
        study: its configuration.
        dtype: of the weights that it used.
        circuit: what it found, with the verdict of the newest `workbench circuit doctor` on it.
    """

    path: Path
    study: CircuitFind
    dtype: str
    circuit: Circuit


def found_run(asked: Path, root: Path) -> FoundRun:
    """The run that a path or a name stands for.

    Raises:
        MissingFileError: if there is none.
        InvalidInputError: if it is not finished, or of another command.
    """
    from workbench.core.records import from_jsonable
    from workbench.runs.run import RunDir

    run = RunDir.open(named_run(asked, FIND, root))
    if run.env.get("name") != FIND:
        raise InvalidInputError(f"{run.path} is a run of {run.env.get('name')}. Give one of `workbench circuit find`.")
    if not run.finished:
        raise InvalidInputError(
            f"{run.path} is not finished. Give the same `workbench circuit find` again, which continues it."
        )
    models = run.env.get("models") or [{}]
    dtype = str(models[0].get("dtype", "auto")).removeprefix("torch.")
    return FoundRun(
        path=run.path, study=from_jsonable(CircuitFind, run.config), dtype=dtype,
        circuit=load_circuit(run.artifacts / CIRCUIT) if (doctor := newest_of(run.path, DOCTOR)) is None
        else load_circuit(doctor / "artifacts" / CIRCUIT),
    )  # fmt: skip


def newest_of(found: Path, *names: str) -> Path | None:
    """The newest finished run of these names that is about the circuit of this run; None if there is none."""
    from workbench.core.records import load_json
    from workbench.runs.run import list_runs

    for info in list_runs(found.parent):
        if info.name in names and info.status == "finished":
            about = load_json(info.path / "artifacts" / FOUND_FILE, dict)
            if about.get("run") == found.name:
                return info.path
    return None


@dataclass(frozen=True, kw_only=True)
class OfCircuit(RunFolderStudy[R], LoadsModel):
    """A study of a circuit that was found before; model, bases and metric are those of its run."""

    def model_name(self) -> str:
        """That of the run."""
        raise InvalidInputError(f"{type(self).__name__}: the model is that of the run; call load_as(found).")

    def load_as(self, found: FoundRun) -> Model:
        """The model of the run, in its precision unless another one is asked for."""
        from workbench.models.loading import load_model

        dtype = found.dtype if self.dtype == "auto" else self.dtype
        return load_model(found.study.model, dtype=dtype, device=self.device, check=True)


def size_of(circuit: Circuit) -> str:
    """How many nodes of each kind."""
    return f"{counted(circuit.n_features, 'features')} and {counted(circuit.n_errors, 'errors')}"
