"""Edges between the nodes of a circuit, as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.doctor.report import DoctorReport, Examinable, attrs_of
from circuits.graph.circuit import ERROR, Circuit
from circuits.graph.influence import Links, Roles, influences, pruned
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.html import Shown
from workbench.core.numbers import counted, percent

if TYPE_CHECKING:
    import pandas as pd


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class EdgeTable(OneLine):
    """Edges between the nodes of two sites.

    Attributes:
        upstream: nodes of the earlier site, `(n_up, 2)`: position (-1 for all) and feature.
        downstream: nodes of the later site, `(n_down, 2)`.
        effect: mean over pairs.
        se: standard error; NaN for one pair.
    """

    upstream: Int[Tensor, "n_up 2"]
    downstream: Int[Tensor, "n_down 2"]
    effect: Float[Tensor, "n_up n_down"]
    se: Float[Tensor, "n_up n_down"]


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Edges(Examinable, Shown):
    """Edges between the nodes of a circuit.

    Attributes:
        tables: by upstream and downstream site.
        n: number of pairs.
        metric: what the edges are on.
        has_positions: whether nodes have positions.
        made: how, in words.
        doctor: what the attribution doctor found, where it was attached.
    """

    tables: Mapping[tuple[str, str], EdgeTable]
    n: int
    metric: str
    has_positions: bool
    made: str
    doctor: DoctorReport | None = None

    def frame(self, *, threshold: float = 0.0) -> pd.DataFrame:
        """One row per edge whose effect is larger than `threshold`, the strongest first.

        Columns upstream_site, upstream_pos (where kept), upstream_feature, the same for downstream, effect, se; a
        feature is "error" for what a basis leaves unexplained.
        """
        import pandas as pd

        frames = []
        for (above, below), table in self.tables.items():
            up, down = (table.effect.abs() > threshold).nonzero(as_tuple=True)
            columns: dict[str, object] = {}
            for side, site, nodes in (
                ("upstream", above, table.upstream[up]), ("downstream", below, table.downstream[down]),
            ):  # fmt: skip
                columns[f"{side}_site"] = [site] * len(nodes)
                columns[f"{side}_pos"] = nodes[:, 0].cpu().numpy()
                names = ["error" if f == ERROR else f for f in nodes[:, 1].tolist()]
                columns[f"{side}_feature"] = pd.Series(names, dtype=object)
            columns |= {name: getattr(table, name)[up, down].cpu().numpy() for name in ("effect", "se")}
            frames.append(pd.DataFrame(columns))
        if not frames:
            raise InvalidInputError(
                "These edges are between no two sites, so there is no table. Give bases at two sites."
            )
        frame = pd.concat(frames, ignore_index=True)
        if not self.has_positions:
            frame = frame.drop(columns=["upstream_pos", "downstream_pos"])
        frame = frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)
        frame.attrs.update(attrs_of(self.doctor))
        return frame

    def prune(self, circuit: Circuit, nodes: float = 0.8, edges: float = 0.98) -> PrunedCircuit:
        """The nodes and edges of a circuit through which most of its effect on the metric leads.

        Influence leads back from the output: to nodes without edges by their own effects, since what else they do
        directly is not known, and from each node to those before it by their edges into it, all in absolute shares.

        Args:
            circuit: whose nodes the edges are between.
            nodes: share of the influence that the kept nodes hold.
            edges: share of the edges' scores that the kept edges hold.

        Raises:
            InvalidInputError: for a share outside of 0 to 1, or a circuit that lists no nodes.
            MismatchError: if none of the edges is between these nodes.
            DegenerateInputError: if there are neither edges nor effects.
        """
        names = list(circuit.nodes())
        links, own = self._links(names, circuit)
        n = len(names)
        is_output = np.arange(n + 1) == n
        roles = Roles(own=own, always=is_output, inner=np.zeros(n + 1, dtype=bool), sources=~is_output)
        kept = pruned(links, influences(links, links.shares(), own), roles, nodes, edges)
        held = {names[i] for i in np.flatnonzero(kept.nodes[:n])}
        between = {
            (names[a], names[b])
            for a, b in zip(links.source[kept.links], links.target[kept.links], strict=True)
            if b < n
        }
        tables = {key: _cut(table, key, between) for key, table in self.tables.items()}
        how = f"pruned to {percent(nodes)} of the influence and {percent(edges)} of the edges' scores"
        return PrunedCircuit(
            circuit=circuit.only(held, f"{circuit.made}; {how}"),
            edges=dataclasses.replace(self, tables=tables, made=f"{self.made}; {how}"),
        )

    def _links(self, names: list[tuple[str, int, int]], circuit: Circuit) -> tuple[Links, np.ndarray]:
        """Edges between some nodes, and links of those without any to the output, which is the last node."""
        place, level = {name: i for i, name in enumerate(names)}, {site: i for i, site in enumerate(circuit.sites)}
        found: list[tuple[int, int, float]] = []
        for (above, below), table in self.tables.items():
            ups = [place.get((above, *node)) for node in map(tuple, table.upstream.tolist())]
            downs = [place.get((below, *node)) for node in map(tuple, table.downstream.tolist())]
            rows, columns = table.effect.nonzero(as_tuple=True)
            for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
                a, b = ups[i], downs[j]
                if a is not None and b is not None:
                    found.append((a, b, abs(float(table.effect[i, j]))))
        if not found and len(self):
            raise MismatchError(
                "prune: none of the edges is between the nodes of this circuit. Give the edges of this one: "
                "circuits.edge_effects(..., circuit)."
            )
        leaves = {a for a, *_ in found}
        effects = [abs(effect) for site in circuit.sites.values() for effect in site.effect.tolist()]
        found += [(i, len(names), effect) for i, effect in enumerate(effects) if i not in leaves and effect > 0]
        if not found:
            raise DegenerateInputError("prune: there are no edges, and no effects of nodes. Make edges first.")
        source, target, size = (np.array(column) for column in zip(*found, strict=True))
        levels = np.array([*(level[site] for site, *_ in names), len(level)])
        own = np.zeros(len(names) + 1)
        own[-1] = 1.0
        return Links(source=source, target=target, size=size.astype(float), level=levels), own

    def __len__(self) -> int:
        return sum(int((table.effect != 0).sum()) for table in self.tables.values())

    def _shown_line(self) -> str:
        between = f"{counted(len(self), 'edges')} between {counted(len(self.tables), 'pairs')} of sites"
        return f"{between}, {self.metric}; attribution doctor: {self.verdict}"


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class PrunedCircuit(OneLine):
    """What `Edges.prune` leaves.

    Attributes:
        circuit: the nodes.
        edges: the edges between them; cut ones are 0.
    """

    circuit: Circuit
    edges: Edges


def _cut(
    table: EdgeTable, key: tuple[str, str], kept: set[tuple[tuple[str, int, int], tuple[str, int, int]]]
) -> EdgeTable:
    """A table with the edges alone that are kept."""
    above, below = key
    ups, downs = (
        [(site, int(pos), int(feature)) for pos, feature in nodes.tolist()]
        for site, nodes in ((above, table.upstream), (below, table.downstream))
    )
    mask = torch.zeros_like(table.effect, dtype=torch.bool)
    for i, j in table.effect.nonzero().tolist():
        mask[i, j] = (ups[i], downs[j]) in kept
    return dataclasses.replace(table, effect=table.effect * mask)
