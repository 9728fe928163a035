"""An attribution graph as a report: what it explains, beside a graph of random dictionaries and beside ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from circuits.attribution_graphs.graph import AttributionGraph
from circuits.attribution_graphs.tables import FEATURE, said
from circuits.attribution_graphs.validation import Validation
from workbench.core.numbers import counted, number, percent, rounding_error
from workbench.report.base import Bars, Headline, Metric, Report, Says, Section, Table, beside

if TYPE_CHECKING:
    import pandas as pd

_BARS, _ROWS = 20, 100
_SAYS = Says(
    "Removing the features of the graph moves its outputs more than removing random directions of the same length.",
    "Removing the features of the graph moves its outputs no more than removing random directions of the same length.",
    "Removing the features of the graph moves its outputs less than removing random directions of the same length.",
    "No feature was removed: the graph is not compared with what the model does.",
)


@dataclass(frozen=True, kw_only=True)
class FoundGraph(Report):
    """An attribution graph with its controls.

    Attributes:
        graph: the whole graph.
        pruned: what pruning leaves.
        control: the graph of random dictionaries; None if none was made.
        validation: both tests against the model; None if they were left out.
    """

    how_to_make: ClassVar[str] = "FoundGraph(graph=graph, pruned=graph.prune(), control=None, validation=None)."
    graph: AttributionGraph
    pruned: AttributionGraph
    control: AttributionGraph | None = None
    validation: Validation | None = None

    def headline(self) -> Headline:
        """The effect of removing features beside that of random directions."""
        return Headline.of(_SAYS, self._beside())

    def _beside(self) -> Table:
        measure, v = "change of the outputs, in logits", self.validation
        if v is None:
            return beside(measure, ("features of the graph", None), None)
        return beside(
            measure, ("features of the graph", v.effect), ("random directions", v.control_effect), v.difference
        )

    def findings(self) -> tuple[str, ...]:
        """Sizes, scores beside the control, tests."""
        graph, scores = self.graph, self.graph.scores()
        found = [
            f"{said(graph.outputs)} behind “{''.join(graph.tokens)}”: {counted(graph.n_features, 'features')}, "
            f"{counted(graph.n_links, 'links')}; pruned to {counted(self.pruned.n_features, 'features')} and "
            f"{counted(self.pruned.n_links, 'links')}.",
            f"Links into each target add up to what it reads, but for {rounding_error(graph.gap)} (relative).",
        ]
        if self.control is not None:
            chance = self.control.scores()
            found.append(
                f"Completeness {percent(scores.completeness)} (random dictionaries {percent(chance.completeness)}), "
                f"replacement {percent(scores.replacement)} ({percent(chance.replacement)})."
            )
        if self.validation is not None:
            v = self.validation
            found.append(
                f"With everything else held fast, {counted(v.n_links, 'links')} are off by "
                f"{rounding_error(v.row_error)} (relative)."
            )
            found.append(
                f"Influence and the size of the effect of removing a feature correlate by {v.influence}; for random "
                f"directions in the same places by {v.control}."
            )
        return tuple(found)

    def section(self) -> Section:
        """Bars of the most influential nodes, a table of scores, a table of nodes."""
        frame = self.graph.frame()
        names = [
            label.strip() or f"{site} {feature}" if site else kind
            for label, site, feature, kind in zip(frame.label, frame.site, frame.feature, frame.kind, strict=True)
        ]
        rows = tuple(zip(names, frame.pos.tolist(), frame.kind, frame.influence.tolist(), strict=True))[:_ROWS]
        shown = tuple(f"{name} @{pos}" if pos >= 0 else name for name, pos, *_ in rows[:_BARS])
        bars = Bars(
            "Nodes with the most influence", shown,
            tuple(float(value) for *_, value in rows[:_BARS]), "influence", 0.0,
            "Share of the outputs that leads back to the node through all paths.",
        )  # fmt: skip
        nodes = Table(("node", "position", "kind", "influence"), rows, "Nodes. artifacts/nodes.csv has all.")
        return Section(
            "Attribution graph", (bars, self._beside(), self._scores(), nodes), self.findings(), self._metrics(),
            self.headline(),
        )  # fmt: skip

    def _scores(self) -> Table:
        names = ("completeness", "replacement", "reference_completeness", "reference_replacement")
        graphs = {"graph": self.graph, "pruned": self.pruned} | (
            {} if self.control is None else {"random dictionaries": self.control}
        )
        columns = [[float(getattr(graph.scores(), name)) for name in names] for graph in graphs.values()]
        rows = tuple((name.replace("_", " "), *(column[i] for column in columns)) for i, name in enumerate(names))
        return Table(
            ("score", *graphs), rows,
            "Scores. Constant and rest count as unexplained; the reference leaves them out and counts tokens and "
            "errors as explained.",
        )  # fmt: skip

    def _metrics(self) -> dict[str, Metric]:
        scores = self.graph.scores()
        found: dict[str, Metric] = {
            "features": self.graph.n_features, "links": self.graph.n_links, "completeness": scores.completeness,
            "replacement": scores.replacement, "gap": self.graph.gap,
        }  # fmt: skip
        if self.validation is not None:
            found |= {"row_error": self.validation.row_error, "influence": self.validation.influence}
        return found

    def frame(self) -> pd.DataFrame:
        """The nodes, as `AttributionGraph.frame` has them."""
        return self.graph.frame()

    def _shown_line(self) -> str:
        features = int(self.graph.of_kind(FEATURE).sum())
        return f"{counted(features, 'features')}, completeness {number(self.graph.scores().completeness)}"
