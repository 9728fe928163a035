"""What a circuit carries on held-out pairs, beside as many other features, as a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from circuits.faithful.curves import FaithfulnessCurve
from circuits.faithful.measure import Faithfulness
from workbench.core.display import OneLine
from workbench.core.numbers import counted
from workbench.core.stats import Estimate, sample_mean, sample_ratio
from workbench.report.base import Bars, Headline, Lines, Metric, Report, Says, Section, Series, Table, beside

if TYPE_CHECKING:
    import pandas as pd

CIRCUIT, RANDOM, COMPLEMENT = "circuit", "random features", "without the circuit"
TOP_ACTIVATION = "features that write most"
NO_ERRORS, ALL_ERRORS = "circuit, errors removed", "circuit, all errors kept"
_SAYS = Says(
    "The circuit carries more of the behaviour than as many random features.",
    "The circuit carries no more of the behaviour than as many random features.",
    "Random features carry more of the behaviour than the circuit.",
)


@dataclass(frozen=True, kw_only=True)
class CurveRow(OneLine):
    """One circuit of a curve over numbers of nodes.

    Attributes:
        nodes: how its features were chosen.
        errors: which error nodes are kept.
        n: how many nodes were asked for.
        n_features: features that were kept.
        n_errors: error nodes that were kept.
        value: F.
    """

    nodes: str
    errors: str
    n: int
    n_features: int
    n_errors: int
    value: Estimate


def curve_rows(curve: FaithfulnessCurve) -> list[CurveRow]:
    """The points of a curve, without their pairs."""
    return [
        CurveRow(
            nodes=point.nodes, errors=point.found.errors, n=point.n, n_features=point.found.n_features,
            n_errors=point.found.n_errors, value=point.found.value,
        )
        for point in curve.points
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluatedCircuit(Report):
    """Faithfulness of a circuit, with and without errors, of what is left without it, and of other features.

    Attributes:
        arms: by name; `CIRCUIT` is the circuit itself.
        random: circuits of as many random features that are active, with the same error nodes.
        n_nodes: of the circuit.
        curve: circuits of other sizes from the same effects.
    """

    how_to_make: ClassVar[str] = "EvaluatedCircuit(arms={'circuit': faithfulness(...)}, random=(...), n_nodes=...)."
    arms: dict[str, Faithfulness]
    random: tuple[Faithfulness, ...]
    n_nodes: int
    curve: tuple[CurveRow, ...] = ()

    def _ratio(self, kept: Tensor) -> Estimate:
        whole = self.arms[CIRCUIT].full - self.arms[CIRCUIT].empty
        return sample_ratio(kept.double().cpu().numpy(), whole.double().cpu().numpy(), unit="pairs")

    def _random(self) -> Tensor:
        return torch.stack([found.kept for found in self.random]).mean(0)

    def _beside(self) -> Table:
        circuit, other = self.arms[CIRCUIT], self._random()
        return beside(
            "faithfulness F", (CIRCUIT, circuit.value), (RANDOM, self._ratio(other - circuit.empty)),
            self._ratio(circuit.kept - other),
        )  # fmt: skip

    def headline(self) -> Headline:
        """F of the circuit beside that of random nodes, with their paired difference."""
        return Headline.of(_SAYS, self._beside())

    def findings(self) -> tuple[str, ...]:
        """F of each arm."""
        own = self.arms[CIRCUIT]
        said = [
            f"F of the circuit ({counted(self.n_nodes, 'nodes')}) on held-out pairs: {own.value}; nodes outside it are "
            f"put to their {own.ablation if own.ablation != 'resample' else 'value in another prompt'}."
        ]
        said += [
            f"{name[0].upper()}{name[1:]}: F {' '.join(arm.value.shown())}."
            for name, arm in self.arms.items() if name != CIRCUIT
        ]  # fmt: skip
        ends = [sample_mean(x.double().cpu().numpy(), unit="pairs") for x in (own.full, own.empty)]
        full, empty = (" ".join(end.shown(sign=True)) for end in ends)
        return (*said, f"The metric is {full} in the model as it is, {empty} with every node ablated.")

    def _rows(self) -> list[tuple[str, Estimate, int, int]]:
        rows = [(name, arm.value, arm.n_features, arm.n_errors) for name, arm in self.arms.items()]
        first = self.random[0]
        random = self._ratio(self._random() - self.arms[CIRCUIT].empty)
        return [*rows, (f"{RANDOM}, mean of {len(self.random)} draws", random, first.n_features, first.n_errors)]

    def section(self) -> Section:
        """A bar and a row per arm."""
        rows = self._rows()
        bars = Bars(
            "Faithfulness", tuple(row[0] for row in rows), tuple(row[1] for row in rows), "F", reference=1.0,
            caption="1: as much of the metric as the whole model; 0: as much as with every node ablated.",
        )  # fmt: skip
        curve = Table.of(
            self.curve,
            {
                "features chosen by": "nodes", "error nodes": "errors", "n": "n", "F": "value",
                "features": "n_features", "errors kept": "n_errors",
            },
            "Faithfulness by number of nodes.",
        )  # fmt: skip
        table = Table(
            ("nodes kept", "F", "features", "errors"), tuple(rows),
            "Faithfulness of each set of nodes. Features and errors count each position.",
        )  # fmt: skip
        metrics: dict[str, Metric] = {name.replace(" ", "_").replace(",", ""): value for name, value, _, _ in rows}
        blocks = (self._lines(), bars, table, curve) if self.curve else (bars, table)
        return Section("Faithfulness", (*blocks, self._beside()), self.findings(), metrics, self.headline())

    def _lines(self) -> Lines:
        series = []
        for nodes in dict.fromkeys(row.nodes for row in self.curve):
            own = sorted((r for r in self.curve if (r.nodes, r.errors) == (nodes, "circuit")), key=lambda row: row.n)
            parts = ([getattr(row.value, end) for row in own] for end in ("value", "low", "high"))
            series.append(Series(nodes, tuple(row.n for row in own), *(tuple(part) for part in parts)))
        return Lines(
            "Faithfulness by number of nodes", tuple(series), "nodes", "F",
            caption="Error nodes are those of the circuit. Bands are 95 % intervals over pairs.",
        )  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """One row per arm: F with its interval, features, errors, pairs."""
        import pandas as pd

        columns = ["nodes", "F", "low", "high", "n_features", "n_errors", "n_pairs"]
        rows = [(name, f.value, f.low, f.high, features, errors, f.n) for name, f, features, errors in self._rows()]
        return pd.DataFrame(rows, columns=columns)
