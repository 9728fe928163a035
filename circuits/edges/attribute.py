"""Edges: what one node does to the metric through another one, and not around it.

`edge(u -> d) = (gradient of the metric with respect to d) * (gradient of d with respect to u, sites between held) *
(change of u)`. Into the residual stream the second gradient is known in closed form, since the stream only adds; into
an MLP or attention it is the gradient of one block. Errors are nodes in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from circuits.decomposition import Place
from circuits.edges.chunks import Chunk, EdgeNodes, Left
from circuits.edges.tables import Edges, EdgeTable
from circuits.graph.circuit import ERROR, Circuit, SiteNodes
from circuits.metrics import AnyMetric, named
from circuits.nodes.runs import AttributionOptions, Rule
from circuits.nodes.setting import Baseline, Setting, States, setting_of
from circuits.pairs import Pairs
from workbench.bases.sae import AnySAE
from workbench.core import progress
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.numbers import setting
from workbench.models.model import Model

Semantics = Literal["paper", "reference"]
_CUTS = ("resid_post", "resid_pre", "resid_mid", "embed")
"""Sites through which all that was computed before passes."""


@checked
def edge_effects(
    model: Model,
    bases: Mapping[str, AnySAE],
    pairs: Pairs,
    metric: AnyMetric,
    circuit: Circuit,
    *,
    left: Left = "clean",
    semantics: Semantics = "paper",
    threshold: float = 0.0,
    steps: int = 10,
    rule: Rule = "midpoint",
    baseline: Baseline | None = None,
    batch_size: int = 64,
) -> Edges:
    """Effects of the direct edges between the nodes of a circuit.

    A direct edge leads from one site to the next ones: what passes through another site with a basis in between is that
    site's. Edges out of a node into all nodes that follow add up to its effect by attribution patching (with
    `left="clean"`, errors included).

    Args:
        model: the model.
        bases: the bases that the circuit was made with.
        pairs: the pairs.
        metric: what is explained.
        circuit: the nodes; the whole circuit takes every active feature.
        left: gradient of the metric with respect to the later node: at the clean state (the published formula), or its
            mean on the way to the patched state (the published code).
        semantics: "paper" takes the nodes of the circuit in every pair. "reference" takes, in each pair and at each
            position, the later nodes whose own effect there is larger than `threshold`, and every earlier node.
        threshold: for "reference".
        steps: of the integral, with `left="ig"` and for "reference".
        rule: of the integral.
        baseline: what patched nodes are; by default as in `node_effects`.
        batch_size: rows per run of a block.

    Raises:
        MismatchError: if the circuit was made with other bases or positions.
        InvalidInputError: for an unknown option.
    """
    if left not in ("clean", "ig") or semantics not in ("paper", "reference"):
        raise InvalidInputError(
            f"edge_effects(left={left!r}, semantics={semantics!r}): left is clean or ig; semantics paper or reference."
        )
    chosen = baseline or ("patch" if pairs.patch is not None else "zero_keep_error")
    options = AttributionOptions(
        method="ig" if left == "ig" or semantics == "reference" else "atp", steps=steps, rule=rule, baseline=chosen,
        batch_size=batch_size,
    )  # fmt: skip
    setting = setting_of(model, bases, pairs, metric, chosen)
    _require_same(setting, circuit)
    work = _Work(setting, options, circuit, left, threshold if semantics == "reference" else None)
    return work.edges()


def _require_same(setting: Setting, circuit: Circuit) -> None:
    own = {place.site: place.basis.fingerprint for place in setting.places}
    if dict(circuit.bases) != own or circuit.model_fingerprint != setting.model.fingerprint:
        raise MismatchError(
            f"edge_effects: the circuit was made with bases at {', '.join(circuit.bases)} of another model or with "
            f"other weights than those given, at {', '.join(own)}. Give the model and the bases that made it."
        )
    n = setting.clean.ids.shape[1]
    if circuit.n_tokens is not None and (circuit.n_tokens != n or len(set(setting.clean.lengths.tolist())) > 1):
        raise MismatchError(
            f"edge_effects: the circuit has positions of prompts with {circuit.n_tokens} tokens, and these have up to "
            f"{n}. Use pairs of that one length, or a circuit whose positions were put together."
        )


def direct_pairs(model: Model, places: Sequence[Place]) -> dict[str, dict[str, list[str]]]:
    """Upstream sites of each site, each with the sites between them, which are held."""
    return {
        down.site: direct_to(model, [up.site for up in places[:i]], (down.read, down.site))
        for i, down in enumerate(places)
    }


def direct_to(model: Model, earlier: Sequence[str], ends: Sequence[str]) -> dict[str, list[str]]:
    """The earlier sites with a path to an end around all others, each with the sites between, in forward order.

    A site on the residual stream ends all paths from before it.
    """
    reaches, above = model.site_map.reaches, {}
    for up in reversed(earlier):
        if any(reaches(up, end) for end in ends):
            above[up] = [site for site in above if reaches(up, site)]
            if model.resolve(up).kind in _CUTS:
                break
    return dict(reversed(above.items()))


class _Work:
    """The edges of one setting, some pairs at a time."""

    def __init__(
        self, setting: Setting, options: AttributionOptions, circuit: Circuit, left: Left, threshold: float | None
    ) -> None:
        self._s, self._o, self._threshold = setting, options, threshold
        self._left: Left = left
        self._states = States(setting, options.batch_size)
        self._direct = direct_pairs(setting.model, setting.places)
        self._has_positions = circuit.n_tokens is not None
        self._n_tokens = setting.clean.ids.shape[1]
        self._places = {place.site: place for place in setting.places}
        self._nodes = {place.site: self._chosen(place, circuit.sites[place.site]) for place in setting.places}

    def _chosen(self, place: Place, nodes: SiteNodes) -> EdgeNodes:
        device = self._s.keep.device
        if not nodes.every and self._threshold is None:
            return EdgeNodes(place, nodes.pos.to(device), nodes.feature.to(device))
        # Every node that is active in some pair.
        active: set[tuple[int, int]] = set()
        for rows in self._s.chunks(self._o.batch_size):
            state, keep = self._states.of(rows)[place.site], self._s.keep[rows]
            pos = keep.nonzero(as_tuple=True)[1]
            step = max(1, 2**22 // place.basis.d_sae)
            for start in range(0, len(pos), step):
                token, feature = state.moves(place.basis, slice(start, start + step)).nonzero(as_tuple=True)
                where = pos[token + start] if self._has_positions else torch.full_like(token, -1)
                active |= set(zip(where.tolist(), feature.tolist(), strict=True))
            errors = pos if self._has_positions else pos.new_tensor([-1])
            active |= {(p, ERROR) for p in errors.tolist()}
        table = torch.tensor(sorted(active), dtype=torch.long, device=device).reshape(-1, 2)
        return EdgeNodes(place, table[:, 0], table[:, 1])

    def edges(self) -> Edges:
        """All edges."""
        sums: dict[tuple[str, str], list[Tensor]] = {}
        chunks = self._s.chunks(self._o.batch_size)
        n_pairs = sum(len(above) for above in self._direct.values())
        wanted = {
            site: {up: held for up, held in above.items() if len(self._nodes[up])}
            for site, above in self._direct.items() if len(self._nodes[site])
        }  # fmt: skip
        with progress.task(total=len(chunks) * n_pairs, description="effects of edges", unit="pairs of sites") as task:
            for rows in chunks:
                chunk = Chunk(self._s, self._states.of(rows), rows, self._o, self._left, self._threshold, wanted)
                for site, above in self._direct.items():
                    if not len(self._nodes[site]) or not above:
                        task.advance(len(above))
                        continue
                    for earlier, values in chunk.edges([self._nodes[up] for up in above], self._nodes[site]):
                        self._add(sums, (earlier, site), values)
                        task.advance(1)
        tables = {key: self._table(key, *found) for key, found in sums.items()}
        made = f"{self._o.words}; left {self._left}; " + (
            "nodes of the circuit"
            if self._threshold is None
            else f"later nodes above {setting(self._threshold)} in each pair"
        )
        return Edges(
            tables=tables, n=len(self._s.clean), metric=named(self._s.metric), has_positions=self._has_positions,
            made=made,
        )  # fmt: skip

    def _add(self, sums: dict[tuple[str, str], list[Tensor]], key: tuple[str, str], values: Tensor) -> None:
        total, squares = sums.setdefault(key, [values.new_zeros(values.shape[1:]).double() for _ in range(2)])
        total += values.double().sum(0)
        squares += values.double().square().sum(0)

    def _table(self, key: tuple[str, str], total: Tensor, squares: Tensor) -> EdgeTable:
        n, (up, down) = len(self._s.clean), (self._nodes[site] for site in key)
        mean = total / n
        var = (squares - n * mean**2).clamp_min(0) / (n - 1) if n > 1 else torch.full_like(mean, float("nan"))
        return EdgeTable(upstream=up.pairs, downstream=down.pairs, effect=mean, se=(var / n).sqrt())
