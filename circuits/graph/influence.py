"""Influence of nodes on outputs through all paths of a graph, and pruning by it.

Each target divides its influence among what it is made of: `share = |link| / sum of |links into the target|`. With own
weights w of the outputs, `influence = w (N + N^2 + ...)` for the matrix N of shares; since links lead forward only, one
sweep over the levels of the graph adds up all powers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import setting

_BINS = 4096
"""Bins of the histogram that a threshold is found by; one of them is sorted."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Links(OneLine):
    """Links between the nodes of a graph.

    Attributes:
        source: node that a link leaves.
        target: node that it enters; of a higher level.
        size: absolute weight.
        level: of every node.
    """

    source: Int[np.ndarray, " links"]
    target: Int[np.ndarray, " links"]
    size: Float[np.ndarray, " links"]
    level: Int[np.ndarray, " nodes"]

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.level)

    def shares(self, total: Float[np.ndarray, " nodes"] | None = None) -> Float[np.ndarray, " links"]:
        """Each link as a share of what enters its target.

        Args:
            total: what enters each node, links that are not listed included; by default the sum of those that are.
        """
        if total is None:
            total = np.bincount(self.target, self.size, self.n_nodes)
        into = total[self.target]
        return np.divide(self.size, into, out=np.zeros_like(self.size), where=into > 0)

    def among(self, nodes: Bool[np.ndarray, " nodes"]) -> Bool[np.ndarray, " links"]:
        """Which links have both ends among some nodes."""
        return nodes[self.source] & nodes[self.target]

    def only(self, kept: Bool[np.ndarray, " links"]) -> Links:
        """Some of the links, between the same nodes."""
        return Links(source=self.source[kept], target=self.target[kept], size=self.size[kept], level=self.level)


def influences(
    links: Links, share: Float[np.ndarray, " links"], own: Float[np.ndarray, " nodes"]
) -> Float[np.ndarray, " nodes"]:
    """Influence of each node on the outputs, its own weight not counted.

    Args:
        links: the links.
        share: of each, see `Links.shares`.
        own: weight of each output; 0 for other nodes.
    """
    found = np.zeros(links.n_nodes)
    level = links.level[links.target]
    order = np.argsort(-level, kind="stable")
    ends = np.flatnonzero(np.diff(level[order])) + 1
    for group in np.split(order, ends):
        target = links.target[group]
        passed = share[group] * (found[target] + own[target])
        found += np.bincount(links.source[group], passed, links.n_nodes)
    return found


def threshold(scores: Float[np.ndarray, " n"], share: float) -> float:
    """The smallest score of the fewest large scores that hold a share of their sum.

    Found by a histogram of logarithms, of which one bin is sorted.

    >>> threshold(np.array([0.5, 0.3, 0.15, 0.05]), 0.8), threshold(np.array([0.5, 0.3, 0.15, 0.05]), 0.81)
    (0.3, 0.15)
    """
    positive = scores[scores > 0]
    if not len(positive):
        return 0.0
    logs = np.log2(positive)
    low, high = float(logs.min()), float(logs.max())
    place = np.minimum(((logs - low) * (_BINS / max(high - low, 1e-300))).astype(np.int64), _BINS - 1)
    above = np.cumsum(np.bincount(place, positive, _BINS)[::-1])
    wanted = share * float(above[-1]) * (1 - 1e-12)  # sums in another order differ in the last bits
    bin_ = int(np.searchsorted(above, wanted))
    before = float(above[bin_ - 1]) if bin_ else 0.0
    inside = np.sort(positive[place == _BINS - 1 - min(bin_, _BINS - 1)])[::-1]
    if not len(inside):
        return float(positive.min())
    at = int(np.searchsorted(before + np.cumsum(inside), wanted))
    return float(inside[min(at, len(inside) - 1)])


@dataclass(frozen=True, eq=False, kw_only=True)
class Kept(OneLine):
    """What pruning leaves: nodes and links, and the influence of each node within them."""

    nodes: Bool[np.ndarray, " nodes"]
    links: Bool[np.ndarray, " links"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Roles(OneLine):
    """What pruning has to know of the nodes.

    Attributes:
        own: weight of each output; 0 for other nodes.
        always: kept whatever their influence: outputs and tokens.
        inner: need links on both sides, as features do.
        sources: need a link out of them, as errors do.
    """

    own: Float[np.ndarray, " nodes"]
    always: Bool[np.ndarray, " nodes"]
    inner: Bool[np.ndarray, " nodes"]
    sources: Bool[np.ndarray, " nodes"]


@checked
def pruned(
    links: Links, influence: Float[np.ndarray, " nodes"], roles: Roles, nodes: float = 0.8, edges: float = 0.98
) -> Kept:
    """The nodes that hold a share of all influence, and the links between them that hold a share of theirs.

    Nodes are kept by influence. Among them each link is a share of what is left of its target; its score is that share
    times the influence and own weight of the target, and links are kept by score. Then nodes that lead nowhere go,
    until none is left.

    Args:
        links: all links that may be kept.
        influence: of each node, see `influences`.
        roles: of the nodes.
        nodes: share of the influence that the kept nodes hold.
        edges: share of the scores that the kept links hold.

    Raises:
        InvalidInputError: for a share outside of 0 to 1.

    Source: Ameisen et al. 2025, "Circuit tracing", and circuit-tracer's `prune_graph`.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 < share <= 1:
            raise InvalidInputError(f"prune({name}={setting(share)}): it is a share above 0, at most 1.")
    keep = roles.always | (influence >= threshold(influence, nodes)) & (influence > 0)
    inside = links.among(keep)
    some = links.only(inside)
    share = some.shares()
    score = share * (influences(some, share, roles.own) + roles.own)[some.target]
    kept = np.zeros(len(links.source), dtype=bool)
    kept[np.flatnonzero(inside)[(score >= threshold(score, edges)) & (score > 0)]] = True
    while True:
        leaves, enters = (np.zeros(links.n_nodes, dtype=bool) for _ in range(2))
        leaves[links.source[kept]], enters[links.target[kept]] = True, True
        dead = keep & (roles.inner & ~(leaves & enters) | roles.sources & ~leaves) & ~roles.always
        if not dead.any():
            return Kept(nodes=keep, links=kept)
        keep &= ~dead
        kept &= links.among(keep)
