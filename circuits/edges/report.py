"""Edges of a circuit as a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from circuits.doctor.report import marked
from circuits.edges.tables import Edges
from circuits.graph.names import ERROR, node_name
from circuits.graph.picture import effect_estimate, standard_errors
from workbench.core.numbers import counted
from workbench.core.stats import Estimate
from workbench.report.base import Bars, Headline, Metric, Report, Says, Section, Table, beside

if TYPE_CHECKING:
    import pandas as pd

_BARS, _ROWS = 20, 200
_SAYS = Says(
    "More edges are different from zero than chance gives.",
    "No more edges are different from zero than chance gives.",
    "No more edges are different from zero than chance gives.",
)


@dataclass(frozen=True, kw_only=True)
class FoundEdges(Report):
    """The edges of a circuit."""

    how_to_make: ClassVar[str] = "FoundEdges(edges=circuits.edge_effects(...))."
    edges: Edges

    def _strongest(self) -> list[tuple[str, Estimate]]:
        found = []
        for row in self.edges.frame().head(_ROWS).to_dict("records"):
            names = [
                node_name(
                    str(row[f"{side}_site"]), int(row.get(f"{side}_pos", -1)),
                    ERROR if row[f"{side}_feature"] == "error" else int(row[f"{side}_feature"]),
                )
                for side in ("upstream", "downstream")
            ]  # fmt: skip
            estimate = effect_estimate(float(row["effect"]), float(row["se"]), self.edges.n)
            found.append((" → ".join(names), estimate))
        return found

    def _clear(self) -> int:
        frame = self.edges.frame()
        return int((frame["effect"].abs() > standard_errors(self.edges.n) * frame["se"]).to_numpy().sum())

    def _counts(self) -> Table:
        """By chance, one in twenty intervals of Student's t excludes zero; one pair has no interval."""
        share = 0.05 if self.edges.n > 1 else 0.0
        return beside(
            "edges whose interval excludes zero",
            ("found", self._clear()),
            ("expected by chance", round(share * len(self.edges))),
        )

    def headline(self) -> Headline:
        """How many edges are different from zero, beside how many chance gives."""
        return Headline.of(_SAYS, self._counts())

    def findings(self) -> tuple[str, ...]:
        """How many edges, and the strongest one."""
        said = [f"{counted(len(self.edges), 'edges')} over {counted(self.edges.n, 'pairs')}; {self.edges.made}."]
        said.append(f"Attribution doctor: {self.edges.verdict}.")
        strongest = self._strongest()
        if strongest:
            name, effect = strongest[0]
            said.append(f"Strongest: {name}, {' '.join(effect.shown(sign=True))}.")
        return tuple(said)

    def section(self) -> Section:
        """Bars and a table of the strongest edges."""
        rows = self._strongest()
        bars = Bars(
            marked("Strongest edges", self.edges.doctor), tuple(name for name, _ in rows[:_BARS]),
            tuple(e for _, e in rows[:_BARS]), "effect",
            reference=0.0, caption="What the earlier node does to the metric through the later one alone.",
        )  # fmt: skip
        table = Table(("edge", "effect"), tuple(rows), "The strongest edges. artifacts/edges.csv has all.")
        metrics: dict[str, Metric] = {"edges": len(self.edges), "edges_different_from_zero": self._clear()}
        return Section("Edges of the circuit", (bars, table, self._counts()), self.findings(), metrics, self.headline())

    def frame(self) -> pd.DataFrame:
        """All edges, as `Edges.frame` has them."""
        return self.edges.frame()
