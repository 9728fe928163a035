"""Faithfulness against the number of nodes, beside circuits that were chosen without the metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuits.faithful.controls import random_circuit, top_activation_circuit
from circuits.faithful.measure import Ablation, Bench, BenchOptions, Errors, Faithfulness
from circuits.metrics import AnyMetric
from circuits.nodes.effects import NodeEffects
from circuits.pairs import Pairs
from workbench.bases.sae import AnySAE
from workbench.core import progress
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, require
from workbench.core.html import Shown
from workbench.core.numbers import counted
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd

ATTRIBUTION, RANDOM, TOP_ACTIVATION = "largest effects", "random features", "largest activations"
COUNTS = (10, 25, 50, 100, 200, 500)


@dataclass(frozen=True, eq=False)
class CurvePoint:
    """One circuit of a curve.

    Attributes:
        nodes: how its features were chosen.
        n: how many nodes were asked for.
        found: its faithfulness.
    """

    nodes: str
    n: int
    found: Faithfulness


@checked
@dataclass(frozen=True, eq=False)
class FaithfulnessCurve(Shown):
    """Faithfulness of circuits of several sizes.

    Attributes:
        points: one per way to choose nodes, rule for error nodes, and number of nodes.
    """

    points: tuple[CurvePoint, ...]

    def frame(self) -> pd.DataFrame:
        """One row per circuit: nodes, errors, n, n_features, n_errors, F, low, high, n_pairs."""
        import pandas as pd

        columns = ["nodes", "errors", "n", "n_features", "n_errors", "F", "low", "high", "n_pairs"]
        rows = [
            (
                p.nodes, p.found.errors, p.n, p.found.n_features, p.found.n_errors, p.found.value.value,
                p.found.value.low, p.found.value.high, p.found.value.n,
            )
            for p in self.points
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    def at(self, n: int, nodes: str = ATTRIBUTION, errors: Errors = "circuit") -> Faithfulness:
        """The faithfulness of one circuit.

        Raises:
            InvalidInputError: if the curve does not have it.
        """
        for point in self.points:
            if (point.nodes, point.found.errors, point.n) == (nodes, errors, n):
                return point.found
        known = sorted({(p.nodes, p.found.errors, p.n) for p in self.points})
        raise InvalidInputError(
            f"at({n}, nodes={nodes!r}, errors={errors!r}): the curve has {counted(len(known), 'points')}, such as "
            f"{', '.join(map(str, known[:3]))}. Ask for one of its counts."
        )

    def _shown_line(self) -> str:
        sizes = [point.n for point in self.points]
        return f"{counted(len(self.points), 'circuits')} of {min(sizes)} to {max(sizes)} nodes"


@checked
def faithfulness_curve(
    model: Model,
    bases: Mapping[str, AnySAE],
    effects: NodeEffects,
    pairs: Pairs,
    metric: AnyMetric,
    *,
    counts: Sequence[int] = COUNTS,
    errors: Sequence[Errors] = ("circuit", "all", "none"),
    controls: bool = True,
    draws: int = 3,
    ablation: Ablation = "mean",
    complement: bool = False,
    reference: Pairs | None = None,
    free_layers: int = 0,
    batch_size: int = 64,
    seed: int = 0,
) -> FaithfulnessCurve:
    """Faithfulness of the circuits of largest effects, and of as many random and most active features.

    Controls keep the same error nodes as the circuit that they are compared with, so what differs is which features
    were chosen. The most active features are those of the held-out pairs, which favours this control.

    Args:
        model: the model.
        bases: the bases that the effects were made with.
        effects: effects on other pairs, which the circuits are chosen by.
        pairs: held-out pairs.
        metric: what is read.
        counts: numbers of nodes.
        errors: rules for error nodes, as in `faithfulness`.
        controls: whether random and most active features are measured as well.
        draws: of random features; their metrics are averaged.
        ablation: as in `faithfulness`.
        complement: as in `faithfulness`.
        reference: as in `faithfulness`.
        free_layers: as in `faithfulness`.
        batch_size: as in `faithfulness`.
        seed: decides the random features.

    Raises:
        MismatchError: as in `faithfulness`.
        InvalidInputError: as in `faithfulness`.
    """
    require(bool(counts) and bool(errors), f"counts={counts}, errors={errors}", "give at least one of each")
    require(draws >= 1, f"draws={draws}", "it must be at least 1")
    options = BenchOptions(ablation, "circuit", complement, free_layers, batch_size, seed)
    bench = Bench(model, bases, pairs, metric, reference or pairs, options)
    ways = (ATTRIBUTION, RANDOM, TOP_ACTIVATION) if controls else (ATTRIBUTION,)
    points = []
    with progress.task(total=len(counts) * len(ways), description="faithfulness", unit="circuits") as task:
        for n in counts:
            circuit = effects.circuit(n=n)
            chosen = {ATTRIBUTION: [circuit]}
            if controls:
                chosen[RANDOM] = [random_circuit(effects, circuit, seed + i) for i in range(draws)]
                chosen[TOP_ACTIVATION] = [top_activation_circuit(model, bases, pairs, circuit)]
            for nodes, alike in chosen.items():
                points += [CurvePoint(nodes, n, bench.with_errors(rule).measure(*alike)) for rule in errors]
                task.advance(1)
    return FaithfulnessCurve(tuple(points))
