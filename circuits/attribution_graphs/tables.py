"""Nodes and links of an attribution graph: how much of the output they explain, and what pruning leaves."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from circuits.attribution_graphs.outputs import Output, Outputs
from circuits.graph.influence import Links, influences
from circuits.graph.names import ERROR, node_name
from workbench.core.display import OneLine
from workbench.core.html import Shown
from workbench.core.numbers import counted, percent

if TYPE_CHECKING:
    import pandas as pd

    from circuits.attribution_graphs.replacement import Replacement

Kind = Literal["feature", "error", "token", "logit", "constant", "rest"]
KINDS: tuple[Kind, ...] = ("feature", "error", "token", "logit", "constant", "rest")
FEATURE, ERRORS, TOKEN, LOGIT, CONSTANT, REST = range(len(KINDS))
EMBED, LOGITS = "embed", "logits"
"""Sites under which tokens and outputs are named."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GraphNodes(OneLine):
    """The nodes, as columns.

    Attributes:
        kind: index into `KINDS`.
        site: where each is, by name; "" for constant and rest.
        pos: position in the prompt; -1 for constant and rest.
        feature: number of the feature; -1 of an error; id of a token or an output.
        activation: coefficient of a feature: by how many of its decoder rows it moves what is written; NaN for others.
        level: a link leads to a higher one.
    """

    kind: Int[np.ndarray, " nodes"]
    site: np.ndarray
    pos: Int[np.ndarray, " nodes"]
    feature: Int[np.ndarray, " nodes"]
    activation: Float[np.ndarray, " nodes"]
    level: Int[np.ndarray, " nodes"]

    def __len__(self) -> int:
        return len(self.kind)

    def only(self, index: Int[np.ndarray, " some"]) -> GraphNodes:
        """Some of them."""
        return GraphNodes(**{name: column[index] for name, column in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class GraphScores(OneLine):
    """How much of the influence on the outputs a graph explains.

    Attributes:
        replacement: influence of tokens as a share of that of all that ends a path: tokens, errors, constant and rest.
        completeness: mean over targets, weighted with their influence, of the share of what enters them that comes from
            features and tokens.
        reference_replacement: as circuit-tracer has it: constant and rest left out.
        reference_completeness: as circuit-tracer has it: constant and rest left out, and tokens and errors counted as
            fully explained, so that a graph of errors alone has 0.5.
        n: targets.
    """

    replacement: float
    completeness: float
    reference_replacement: float
    reference_completeness: float
    n: int


@dataclass(frozen=True, eq=False)
class Origin:
    """What a graph was read from: the replacement model of the prompt, and what is explained."""

    run: Replacement
    outputs: Outputs


@dataclass(frozen=True, eq=False, kw_only=True)
class NodesAndLinks(Shown):
    """What an attribution graph holds.

    `weight` of a link: what its source adds to its target with attention patterns, norms and all other activations held
    fast. The links into a node, those from `constant` and `rest` included, add up to what it reads; of an output to its
    logit minus the mean logit.

    Attributes:
        nodes: features, errors, tokens, outputs; the last two are constant and rest.
        source: node that each link leaves.
        target: node that it enters.
        weight: signed.
        size: absolute weight; of `rest` the absolute sum of all that it stands for.
        outputs: what is explained.
        tokens: of the prompt.
        gap: largest difference between what a target reads and the sum of its links, as a share of their absolute sum.
        made: how, in words.
        identity: of model and bases.
        origin: what it was read from; None for a graph from elsewhere.
    """

    nodes: GraphNodes
    source: Int[np.ndarray, " links"]
    target: Int[np.ndarray, " links"]
    weight: Float[np.ndarray, " links"]
    size: Float[np.ndarray, " links"]
    outputs: tuple[Output, ...]
    tokens: tuple[str, ...]
    gap: float
    made: str
    identity: tuple[tuple[str, str], ...] = ()
    origin: Origin | None = field(default=None, repr=False)

    @functools.cached_property
    def links(self) -> Links:
        """The links as pruning and influence read them."""
        return Links(source=self.source, target=self.target, size=self.size, level=self.nodes.level)

    @functools.cached_property
    def influence(self) -> Float[np.ndarray, " nodes"]:
        """Of each node: share of the outputs that leads back to it through all paths; of outputs 0."""
        return influences(self.links, self.links.shares(), self.own)

    @functools.cached_property
    def own(self) -> Float[np.ndarray, " nodes"]:
        """Weight of each output; 0 for other nodes."""
        found = np.zeros(len(self.nodes))
        found[self.of_kind(LOGIT)] = [output.weight for output in self.outputs]
        return found

    def of_kind(self, *kinds: int) -> Bool[np.ndarray, " nodes"]:
        """Which nodes are of some kinds."""
        return np.isin(self.nodes.kind, kinds)

    @property
    def n_features(self) -> int:
        """Number of features, each position counted."""
        return int(self.of_kind(FEATURE).sum())

    @property
    def n_links(self) -> int:
        """Number of links between nodes, those from constant and rest not counted."""
        return int((~self.of_kind(CONSTANT, REST))[self.source].sum())

    def scores(self) -> GraphScores:
        """How much of the influence the graph explains; constant and rest count as unexplained."""
        kind, share = self.nodes.kind, self.links.shares()
        ends = [float(self.influence[kind == one].sum()) for one in (TOKEN, ERRORS, CONSTANT, REST)]
        explained = np.isin(kind[self.source], (FEATURE, TOKEN))
        inputs = np.bincount(self.target, share * explained, len(kind))
        targets = np.isin(kind, (FEATURE, LOGIT))
        weight = (self.influence + self.own) * targets
        replacement, completeness = self._reference()
        return GraphScores(
            replacement=_ratio(ends[0], sum(ends)), completeness=_ratio(float((inputs * weight).sum()), weight.sum()),
            reference_replacement=replacement, reference_completeness=completeness, n=int(targets.sum()),
        )  # fmt: skip

    def _reference(self) -> tuple[float, float]:
        """Replacement and completeness of circuit-tracer."""
        kind = self.nodes.kind
        links = self.links.only(~self.of_kind(CONSTANT, REST)[self.source])
        share = links.shares()
        found = influences(links, share, self.own)
        from_errors = np.bincount(links.target, share * (kind[links.source] == ERRORS), len(kind))
        weight = found + self.own
        token, error = (float(found[kind == one].sum()) for one in (TOKEN, ERRORS))
        return _ratio(token, token + error), _ratio(float(((1 - from_errors) * weight).sum()), weight.sum())

    def frame(self) -> pd.DataFrame:
        """One row per node: kind, site, pos, feature ("error" for an error), activation, influence, label."""
        import pandas as pd

        n = self.nodes
        features = ["error" if kind == ERRORS else f for kind, f in zip(n.kind, n.feature.tolist(), strict=True)]
        frame = pd.DataFrame(
            {
                "kind": [KINDS[kind] for kind in n.kind], "site": n.site, "pos": n.pos,
                "feature": pd.Series(features, dtype=object), "activation": n.activation, "influence": self.influence,
                "label": self.labels(),
            }
        )  # fmt: skip
        return frame.sort_values("influence", ascending=False, kind="stable", ignore_index=True)

    def labels(self) -> list[str]:
        """What people call each node: tokens and outputs by their text."""
        outputs, found = iter(self.outputs), []
        for kind, pos in zip(self.nodes.kind, self.nodes.pos, strict=True):
            match kind:
                case 2:
                    found.append(self.tokens[pos])
                case 3:
                    found.append(next(outputs).label)
                case _:
                    found.append("")
        return found

    def edges_frame(self) -> pd.DataFrame:
        """One row per link, the largest share first.

        Columns upstream_site, upstream_pos, upstream_feature, the same for downstream, weight, share of what enters the
        target; constant and rest have no site.
        """
        import pandas as pd

        n, columns = self.nodes, {}
        names = [KINDS[kind] if kind in (ERRORS, CONSTANT, REST) else f for kind, f in zip(n.kind, n.feature.tolist(),
                                                                                       strict=True)]  # fmt: skip
        shown = np.array(names, dtype=object)
        for side, ends in (("upstream", self.source), ("downstream", self.target)):
            columns[f"{side}_site"] = n.site[ends]
            columns[f"{side}_pos"] = n.pos[ends]
            columns[f"{side}_feature"] = shown[ends]
        frame = pd.DataFrame({**columns, "weight": self.weight, "share": self.links.shares()})
        return frame.sort_values("share", ascending=False, kind="stable", ignore_index=True)

    def names(self) -> list[str]:
        """Each node as site, position and feature."""
        return [
            KINDS[kind] if kind in (CONSTANT, REST) else node_name(site, pos, ERROR if kind == ERRORS else feature)
            for kind, site, pos, feature in zip(
                self.nodes.kind, self.nodes.site, self.nodes.pos.tolist(), self.nodes.feature.tolist(), strict=True
            )
        ]

    def _shown_line(self) -> str:
        scores = self.scores()
        return (
            f"{counted(self.n_features, 'features')} and {counted(self.n_links, 'links')} for "
            f"{said(self.outputs)}; completeness {percent(scores.completeness)}, replacement "
            f"{percent(scores.replacement)}"
        )


def said(outputs: Sequence[Output]) -> str:
    """The outputs in a few words."""
    first = ", ".join(f"“{output.label}”" for output in outputs[:3])
    return first + (f" and {len(outputs) - 3} more" if len(outputs) > 3 else "")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
