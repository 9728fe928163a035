"""A circuit as a report: its strongest nodes, beside how far their effects are from adding up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from circuits.doctor.report import marked
from circuits.graph.circuit import ARRAYS, Circuit, node_name
from circuits.graph.picture import effect_estimate
from circuits.nodes.effects import GAP_WARNING
from workbench.core.numbers import counted, number, percent
from workbench.core.stats import Estimate
from workbench.report.base import Bars, Headline, Metric, Report, Says, Section, Table, beside

if TYPE_CHECKING:
    import pandas as pd

_BARS = 20
_SAYS = Says(
    "At every site the effects of the nodes add up to what patching the whole site does.",
    "No gap was measured.",
    "At some sites the effects of the nodes do not add up to what patching the whole site does.",
)


@dataclass(frozen=True, kw_only=True)
class FoundCircuit(Report):
    """A circuit with the gaps of the effects that it was chosen by.

    Attributes:
        circuit: the nodes.
        gaps: per site, how far all effects are from adding up, as a share.
        n: number of pairs.
        metric: what the effects are on.
        note: what was left out when the pairs were made.
    """

    how_to_make: ClassVar[str] = "FoundCircuit(circuit=..., gaps=effects.gaps, n=effects.n, metric=effects.metric)."
    circuit: Circuit
    gaps: Mapping[str, float]
    n: int
    metric: str
    note: str = ""

    def headline(self) -> Headline:
        """The largest gap beside the limit."""
        return Headline.of(_SAYS, self._largest(), "at most")

    def _largest(self) -> Table:
        site = max(self.gaps, key=lambda name: self.gaps[name])
        return beside("completeness gap", (f"largest, {site}", self.gaps[site]), ("limit", GAP_WARNING))

    def findings(self) -> tuple[str, ...]:
        """Size of the circuit, its strongest node, sites with a large gap."""
        c, names = self.circuit, self._nodes()
        said = [
            f"{counted(c.n, 'nodes')}: {counted(c.n_features, 'features')} and {counted(c.n_errors, 'errors')}, chosen "
            f"on {counted(self.n, 'pairs')} ({self.metric})."
        ]
        if names:
            said.append(f"Strongest: {names[0][0]}, {' '.join(names[0][1].shown(sign=True))}.")
        large = [f"{name} ({percent(gap)})" for name, gap in self.gaps.items() if gap > GAP_WARNING]
        if large:
            said.append(
                f"Gap above {percent(GAP_WARNING)}: {', '.join(large)}. Use more --steps; effects there are rough."
            )
        if c.n_errors:
            said.append("Errors are nodes here: measure the circuit with and without them.")
        said.append(f"Attribution doctor: {c.verdict}.")
        return (*said, self.note.strip()) if self.note.strip() else tuple(said)

    def _nodes(self) -> list[tuple[str, Estimate]]:
        found = []
        for site, nodes in self.circuit.sites.items():
            for pos, feature, effect, se, n in zip(*(getattr(nodes, field).tolist() for field in ARRAYS), strict=True):
                found.append((node_name(site, pos, feature), effect_estimate(effect, se, n)))
        return sorted(found, key=lambda node: -abs(node[1].value))

    def section(self) -> Section:
        """Bars of the strongest nodes, a table of all, a table of gaps."""
        nodes = self._nodes()
        bars = Bars(
            marked("Strongest nodes", self.circuit.doctor), tuple(name for name, _ in nodes[:_BARS]),
            tuple(e for _, e in nodes[:_BARS]), "effect",
            reference=0.0, caption="Above 0: patching the node raises the metric, so it supports the clean answer.",
        )  # fmt: skip
        table = Table(("node", "effect"), tuple(nodes), "Nodes of the circuit. The strongest first.")
        gaps = Table(("site", "gap"), tuple(self.gaps.items()), "Completeness gap of each site.")
        c = self.circuit
        metrics: dict[str, Metric] = {"features": c.n_features, "errors": c.n_errors}
        metrics |= {f"gap.{site}": gap for site, gap in self.gaps.items()}
        return Section("Circuit", (bars, table, gaps, self._largest()), self.findings(), metrics, self.headline())

    def frame(self) -> pd.DataFrame:
        """The nodes, as `Circuit.frame` has them."""
        return self.circuit.frame()

    def _shown_line(self) -> str:
        return f"{counted(self.circuit.n, 'nodes')}, largest gap {number(max(self.gaps.values()))}"
