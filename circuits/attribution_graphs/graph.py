"""The attribution graph of one prompt, as `attribution_graph` returns it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circuits.attribution_graphs.files import static_picture, write_graph_json, write_graph_page
from circuits.attribution_graphs.tables import CONSTANT, ERRORS, FEATURE, LOGIT, REST, TOKEN, NodesAndLinks
from circuits.attribution_graphs.validation import Validation, validated
from circuits.graph.influence import Kept, Roles, pruned
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import percent

if TYPE_CHECKING:
    from markupsafe import Markup


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class AttributionGraph(NodesAndLinks):
    """What made the outputs of one prompt likely, as direct effects between nodes.

    `weight` of a link: what its source adds to its target with attention patterns, norms and all other activations held
    fast. The links into a node, those from `constant` and `rest` included, add up to what it reads; of an output to its
    logit minus the mean logit.
    """

    def prune(self, nodes: float = 0.8, edges: float = 0.98) -> AttributionGraph:
        """The nodes and links that hold most influence; what is cut goes into `rest`, so that targets still add up.

        Args:
            nodes: share of the influence that the kept nodes hold; tokens and outputs are kept in any case.
            edges: share of the links' scores that the kept links hold.

        Raises:
            InvalidInputError: for a share outside of 0 to 1.
        """
        kept = self._kept(nodes, edges)
        extra = self.of_kind(CONSTANT, REST)
        keep = kept.nodes | extra
        links = kept.links | extra[self.source] & keep[self.target]
        rest = len(self.nodes) - 1
        weight, size = self.weight.copy(), self.size.copy()
        cut = ~links & keep[self.target]
        more = np.bincount(self.target[cut], self.weight[cut], len(keep))
        more_size = np.bincount(self.target[cut], self.size[cut], len(keep))
        into = self.source == rest
        weight[into] += more[self.target[into]]
        size[into] += more_size[self.target[into]]
        place = np.cumsum(keep) - 1
        return dataclasses.replace(
            self, nodes=self.nodes.only(np.flatnonzero(keep)), source=place[self.source[links]],
            target=place[self.target[links]], weight=weight[links], size=size[links],
            made=f"{self.made}; pruned to {percent(nodes)} of the influence and {percent(edges)} of the links' scores",
        )  # fmt: skip

    def _kept(self, nodes: float, edges: float) -> Kept:
        extra = self.of_kind(CONSTANT, REST)
        inner = ~extra[self.source]
        roles = Roles(
            own=self.own, always=self.of_kind(TOKEN, LOGIT), inner=self.of_kind(FEATURE), sources=self.of_kind(ERRORS)
        )
        kept = pruned(self.links.only(inner), np.where(extra, 0.0, self.influence), roles, nodes, edges)
        links = np.zeros(len(self.source), dtype=bool)
        links[np.flatnonzero(inner)[kept.links]] = True
        return Kept(nodes=kept.nodes, links=links)

    def validate(self, n: int = 50, *, seed: int = 0) -> Validation:
        """Whether the links are what the model does, and whether influence predicts what ablation does.

        See `Validation` for both tests. Both run the model itself.

        Args:
            n: features that are tested in each way, the most influential ones and others.
            seed: of the choice, and of the random directions beside them.

        Raises:
            InvalidInputError: for a graph that was not made by `attribution_graph`, or n below 4.
            DegenerateInputError: for a graph without enough features.
        """
        if self.origin is None:
            raise InvalidInputError("validate: this graph does not know its model. Make it with attribution_graph.")
        return validated(self, self.origin, n, seed)

    def to_html(self, path: str | Path, *, title: str = "Attribution graph") -> Path:
        """Writes the picture of the graph: one file that needs no network; prune it first.

        Raises:
            DegenerateInputError: if it has no nodes.
        """
        return write_graph_page(self, Path(path), title)

    def to_json(self, path: str | Path, *, slug: str = "graph", scan: str = "") -> Path:
        """Writes the graph JSON that circuit-tracer's and Neuronpedia's viewers read; prune it first.

        `circuits.load_graph_json` reads features, errors and the links between them back.

        Args:
            path: the file.
            slug: name of the graph: letters, digits, ".", "_" and "-".
            scan: model or set of dictionaries in which a viewer looks features up.

        Raises:
            InvalidInputError: for a slug or scan with other characters.
        """
        return write_graph_json(self, Path(path), slug, scan)

    def _shown_parts(self) -> Iterable[Markup]:
        yield static_picture(self)
        yield from super()._shown_parts()
