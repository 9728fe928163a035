"""The study of a circuit: how few features carry a behaviour, beside neurons, random features and random edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuits.behaviours.accuracy import Accuracy, accuracy
from circuits.decomposition import bases as checked_bases
from circuits.decomposition import neurons
from circuits.edges.attribute import edge_effects
from circuits.edges.tables import Edges
from circuits.faithful.curves import ATTRIBUTION, RANDOM, faithfulness_curve
from circuits.faithful.edges import edge_faithfulness
from circuits.faithful.measure import Faithfulness
from circuits.graph.circuit import Circuit
from circuits.metrics import AnyMetric
from circuits.nodes.attribute import node_effects
from circuits.nodes.effects import GAP_WARNING, NodeEffects
from circuits.pairs import Pairs
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.errors import require
from workbench.core.jsontext import Json
from workbench.core.numbers import counted
from workbench.core.stats import Estimate, sample_ratio
from workbench.models.model import Model
from workbench.report.base import Metric, Report, Section
from workbench.report.blocks import Lines, Series, Table, Text
from workbench.report.headline import Headline, Says, beside

if TYPE_CHECKING:
    import pandas as pd

NEURONS = "neurons, largest effects"
ALL_EDGES, STRONG_EDGES, RANDOM_EDGES, NO_EDGES = "all edges", "strongest edges", "random edges", "no edges"
_RULES = {"circuit": "errors of the circuit", "all": "all errors", "none": "no error"}
_SHOWN_NODES = 50


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CircuitStudy(Report):
    """How few features carry a behaviour.

    Attributes:
        behaviour: what the pairs are.
        trained_on: on the pairs that the circuit was found with.
        tested_on: on the held-out pairs.
        effects: effects of the nodes of the bases.
        circuit: the circuit of `n` nodes.
        edges: its edges.
        curves: faithfulness by how nodes were chosen, rule for errors, and number of nodes.
        edge_checks: faithfulness of the circuit when its nodes see each other through some edges.
        n: number of nodes of the circuit that the headline is about.
    """

    behaviour: str
    trained_on: Accuracy
    tested_on: Accuracy
    effects: NodeEffects
    circuit: Circuit
    edges: Edges
    curves: Mapping[tuple[str, str, int], Faithfulness]
    edge_checks: Mapping[str, Faithfulness]
    n: int

    def frame(self) -> pd.DataFrame:
        """One row per circuit: nodes, errors, n, n_features, n_errors, F, low, high, n_pairs."""
        import pandas as pd

        rows = [
            (nodes, errors, n, f.n_features, f.n_errors, f.value.value, f.value.low, f.value.high, f.value.n)
            for (nodes, errors, n), f in self.curves.items()
        ]
        columns = ["nodes", "errors", "n", "n_features", "n_errors", "F", "low", "high", "n_pairs"]
        return pd.DataFrame(rows, columns=columns)

    def to_json(self) -> dict[str, Json]:
        """The rows of `frame`, and the faithfulness of edges."""
        rows: list[Json] = [{str(k): v for k, v in row.items()} for row in self.frame().to_dict("records")]
        edges: dict[str, Json] = {name: f.value.value for name, f in self.edge_checks.items()}
        return {"behaviour": self.behaviour, "curves": rows, "edges": edges, "gaps": dict(self.effects.gaps)}

    def headline(self) -> Headline:
        """F of the circuit without error nodes, beside as many random features."""
        says = Says(
            "The circuit's features carry the behaviour on words that it was not found with; random features don't.",
            "The circuit's features carry no more of the behaviour than random features do.",
            "The circuit's features carry less of the behaviour than random features do.",
        )
        return Headline.of(says, self._beside())

    def _beside(self) -> Table:
        own, other = (self.curves[nodes, "none", self.n] for nodes in (ATTRIBUTION, RANDOM))
        gain = (own.kept - other.kept).double().cpu().numpy()
        difference = sample_ratio(gain, (own.full - own.empty).double().cpu().numpy(), unit="pairs")
        return beside(f"F of {self.n} nodes, no error", (ATTRIBUTION, own.value), (RANDOM, other.value), difference)

    def findings(self) -> tuple[str, ...]:
        """What was found, in sentences."""
        found = []
        with_errors, without = (self.curves[ATTRIBUTION, rule, self.n].value for rule in ("circuit", "none"))
        n_errors = self.curves[ATTRIBUTION, "circuit", self.n].n_errors
        found.append(
            f"F of the {self.n} nodes is {with_errors} with their {counted(n_errors, 'error nodes')} and {without} "
            "without any: the difference is what the SAEs leave unexplained."
        )
        same = self._as_many_neurons(with_errors)
        if same is not None:
            found.append(f"Neurons of the same sites reach that F with {counted(same, 'nodes')}.")
        strong, drawn = (self.edge_checks[name].value for name in (STRONG_EDGES, RANDOM_EDGES))
        count = self.edge_checks[STRONG_EDGES].n_edges
        found.append(
            f"Through its {count} strongest edges alone the circuit keeps F {strong}, through as many random ones "
            f"{drawn}."
        )
        large = [name for name, gap in self.effects.gaps.items() if gap > GAP_WARNING]
        if large:
            found.append(f"Effects do not add up at {', '.join(large)}: the ranking there is rough.")
        return tuple(found)

    def _as_many_neurons(self, wanted: Estimate) -> int | None:
        """The least number of neurons on the curve whose F is at least that of the circuit."""
        enough = [n for (nodes, _, n), f in self.curves.items() if nodes == NEURONS and f.value.value >= wanted.value]
        return min(enough, default=None)

    def section(self) -> Section:
        """The report."""
        blocks = (
            self._picture(), self._beside(), self._table(), self._edges(), self._behaviour(), self._nodes(),
            Text(
                "F = (metric with the circuit - metric with every node ablated) / (metric of the model - metric with "
                "every node ablated), on held-out pairs. Ablated nodes are at their mean over the patch prompts at the "
                "same position. Controls keep the same error nodes as the circuit that they are compared with."
            ),
        )  # fmt: skip
        metrics: dict[str, Metric] = {}
        for (nodes, errors, n), found in self.curves.items():
            metrics[f"F.{nodes}.{errors}.{n}"] = found.value
        return Section(f"Circuit: {self.behaviour}", blocks, self.findings(), metrics, self.headline())

    def _picture(self) -> Lines:
        series = []
        for nodes, errors in dict.fromkeys((nodes, errors) for nodes, errors, _ in self.curves):
            if errors == "all" or (errors == "none" and nodes != ATTRIBUTION):
                continue
            points = sorted((n, f.value) for (a, b, n), f in self.curves.items() if (a, b) == (nodes, errors) and n)
            x = tuple(n for n, _ in points)
            y, low, high = zip(*((e.value, e.low, e.high) for _, e in points), strict=True)
            name = nodes if nodes == NEURONS else f"{nodes}, {_RULES[errors]}"
            series.append(Series(name, x, y, low, high))
        return Lines(
            "Faithfulness by number of nodes", tuple(series), x_label="nodes", y_label="F", log_x=True,
            caption="Bands are 95 % intervals over pairs.",
        )  # fmt: skip

    def _table(self) -> Table:
        rows = tuple(
            (nodes, _RULES[errors], n, f.n_features, f.n_errors, f.value)
            for (nodes, errors, n), f in sorted(self.curves.items(), key=lambda item: (item[0][2], item[0]))
        )
        columns = ("nodes", "errors", "n", "features", "error nodes", "F")
        return Table(columns, rows, "Faithfulness on held-out pairs")

    def _edges(self) -> Table:
        rows = tuple((name, f.n_edges, f.value) for name, f in self.edge_checks.items())
        return Table(("edges", "number", "F"), rows, f"The {self.n} nodes, seeing each other through some edges only")

    def _behaviour(self) -> Table:
        rows = tuple(
            (name, found.clean, found.patch, found.clean_difference)
            for name, found in (("found on", self.trained_on), ("tested on", self.tested_on))
        )
        columns = ("pairs", "right on clean prompts", "right on patch prompts", "logit difference, clean")
        return Table(columns, rows, "How well the model does what is explained")

    def _nodes(self) -> Table:
        frame = self.circuit.frame().head(_SHOWN_NODES)
        columns = zip(frame.site, frame.feature, frame.effect, frame.se, strict=True)
        rows = tuple((f"{site}/{f}", e, s) for site, f, e, s in columns)
        return Table(
            ("node", "effect", "standard error"), rows, f"The strongest of the circuit's {self.circuit.n} nodes"
        )


@checked
def circuit_study(
    model: Model,
    bases: Mapping[str, AnySAE],
    train: Pairs,
    test: Pairs,
    metric: AnyMetric,
    *,
    behaviour: str = "pairs",
    counts: Sequence[int] = (10, 50, 200, 1000),
    n: int = 200,
    steps: int = 10,
    free_layers: int = 0,
    seed: int = 0,
) -> CircuitStudy:
    """Finds a circuit on some pairs and measures on others how much of the behaviour it carries.

    Args:
        model: the model.
        bases: SAEs by site.
        train: pairs that the circuit is found with.
        test: held-out pairs of one length.
        metric: what is explained.
        behaviour: what the pairs are, for people.
        counts: numbers of nodes of the curve.
        n: nodes of the circuit that edges are computed for; one of `counts`.
        steps: of the integrated gradients.
        free_layers: sites below this layer are not ablated.
        seed: decides random features and edges.

    Raises:
        InvalidInputError: if `n` is not one of `counts`.
    """
    require(n in counts, f"n={n}", f"it must be one of counts={tuple(counts)}")
    placed = checked_bases(model, bases)
    effects = node_effects(model, placed, train, metric, steps=steps)
    given = {"counts": counts, "free_layers": free_layers, "seed": seed}
    curves = faithfulness_curve(model, placed, effects, test, metric, **given)  # type: ignore[arg-type]
    found = {(p.nodes, p.found.errors, p.n): p.found for p in curves.points}
    own = neurons(model, list(placed))
    plain = node_effects(model, own, train, metric, steps=steps)
    given |= {"controls": False, "errors": ("circuit",)}
    others = faithfulness_curve(model, own, plain, test, metric, **given)  # type: ignore[arg-type]
    found |= {(NEURONS, p.found.errors, p.n): p.found for p in others.points}
    circuit = effects.circuit(n=n)
    edges = edge_effects(model, placed, train, metric, circuit)
    tenth = len(edges) // 10
    checks = {
        name: edge_faithfulness(model, placed, circuit, edges, test, metric, n=count, random_seed=drawn)
        for name, count, drawn in (
            (ALL_EDGES, None, None), (STRONG_EDGES, tenth, None), (RANDOM_EDGES, tenth, seed), (NO_EDGES, 0, None),
        )
    }  # fmt: skip
    return CircuitStudy(
        behaviour=behaviour, trained_on=accuracy(model, train), tested_on=accuracy(model, test), effects=effects,
        circuit=circuit, edges=edges, curves=found, edge_checks=checks, n=n,
    )  # fmt: skip
