"""Faithfulness of edges: every node of a circuit sees only the nodes that an edge leads from.

With all edges between the circuit's nodes this is the faithfulness of the circuit itself; with none, every node does
what it does when all others are ablated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.decomposition import Place, reads_of
from circuits.edges.attribute import direct_pairs, direct_to
from circuits.edges.tables import Edges
from circuits.faithful.ablation import error_moved
from circuits.faithful.measure import Bench, BenchOptions, Faithfulness
from circuits.graph.circuit import ERROR, Circuit
from circuits.metrics import AnyMetric, value
from circuits.pairs import Pairs
from workbench.bases.sae import AnySAE
from workbench.core import progress
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.precision import precise
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model
from workbench.models.stretches import stretches


@checked
def edge_faithfulness(
    model: Model,
    bases: Mapping[str, AnySAE],
    circuit: Circuit,
    edges: Edges,
    pairs: Pairs,
    metric: AnyMetric,
    *,
    n: int | None = None,
    threshold: float | None = None,
    random_seed: int | None = None,
    ablation: Literal["mean", "resample"] = "mean",
    reference: Pairs | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Faithfulness:
    """How much of the metric is left when the circuit's nodes see each other through some edges only.

    Nodes are computed in the order of a forward pass. The input of each is made of the earlier nodes that an edge leads
    from; everything else in it is at its reference. The metric sees all nodes that reach it directly.

    Args:
        model: the model.
        bases: the bases that the circuit was made with.
        circuit: the nodes.
        edges: their edges, on other pairs.
        pairs: held-out pairs of one length.
        metric: what is read.
        n: how many edges, the strongest; None with `threshold=None` takes every edge between nodes of the circuit,
            those without effect too.
        threshold: edges whose effect is larger.
        random_seed: takes as many edges at random instead: the control.
        ablation: as in `faithfulness`.
        reference: as in `faithfulness`.
        batch_size: rows per run of a block.
        seed: which prompts "resample" takes.

    Raises:
        MismatchError: if edges, circuit and bases do not belong together.
        InvalidInputError: if both `n` and `threshold` are given, or the circuit is everything.
    """
    if n is not None and threshold is not None:
        raise InvalidInputError("edge_faithfulness: give n= or threshold=, not both.")
    options = BenchOptions(ablation, "circuit", False, 0, batch_size, seed)
    bench = Bench(model, bases, pairs, metric, reference or pairs, options)
    bench.require_same(circuit)
    list(circuit.nodes())  # refuses a circuit of everything
    kept, count = _kept_edges(circuit, edges, n, threshold, random_seed)
    parts = torch.arange(len(pairs), device=model.device).split(batch_size)
    with torch.no_grad():
        found = [
            _Walk(bench, circuit, kept, rows, batch_size).metric()
            for rows in progress.track(parts, description="faithfulness of edges", unit="batches")
        ]
    return replace(bench.found(torch.cat(found), circuit), n_edges=count)


Keys = dict[tuple[str, str], Bool[Tensor, "n_up n_down"]]


def _kept_edges(
    circuit: Circuit, edges: Edges, n: int | None, threshold: float | None, random_seed: int | None
) -> tuple[Keys, int]:
    """Which edges are kept, by sites and the numbers of the circuit's nodes; and how many."""
    order = {name: list(zip(s.pos.tolist(), s.feature.tolist(), strict=True)) for name, s in circuit.sites.items()}
    sizes: dict[tuple[str, str], Tensor] = {}
    for key, table in edges.tables.items():
        for name, nodes in zip(key, (table.upstream, table.downstream), strict=True):
            if [tuple(node) for node in nodes.tolist()] != order.get(name):
                raise MismatchError(
                    f"edge_faithfulness: the edges at {name} are between other nodes than the circuit has. Make them "
                    "with edge_effects(..., circuit)."
                )
        sizes[key] = table.effect.abs().cpu()
    flat = torch.cat([size.flatten() for size in sizes.values()]) if sizes else torch.zeros(0)
    if n is None and threshold is None:
        chosen = torch.ones_like(flat, dtype=torch.bool)
    elif n is not None:
        best = flat.argsort(descending=True, stable=True)[:n]
        chosen = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, best, value=True)
    else:
        chosen = flat > float(threshold or 0.0)
    count = int(chosen.sum())
    if random_seed is not None:
        drawn = torch.randperm(len(flat), generator=torch.Generator().manual_seed(random_seed))[:count]
        chosen = torch.zeros_like(chosen).index_fill_(0, drawn, value=True)
    parts = chosen.split([size.numel() for size in sizes.values()])
    return {key: part.view_as(size) for (key, size), part in zip(sizes.items(), parts, strict=True)}, count


@dataclass(frozen=True, eq=False)
class _State:
    """By how much the nodes of one site differ from their reference in some pairs.

    Attributes:
        parts: of each feature node its coefficient, zero where it has no place: `(rows, nodes, pos)`; zero for errors.
        error: the vector of each error node: `(rows, errors, pos, d)`.
    """

    parts: Float[Tensor, "rows nodes pos"]
    error: Float[Tensor, "rows errors pos d"]


class _Walk:
    """A run of some pairs through the nodes of a circuit, site by site."""

    def __init__(self, bench: Bench, circuit: Circuit, kept: Keys, rows: Int[Tensor, " rows"], size: int) -> None:
        self._b, self._kept, self._sites, self._rows, self._size = bench, kept, circuit.sites, rows, size
        clean = bench.pairs.clean
        self._batch = TokenBatch(clean.ids[rows], clean.mask[rows])
        self._clean = bench.model.capture(self._batch, reads_of(bench.places))
        self._references = {place.site: bench.reference(place.site, rows) for place in bench.places}
        self._places = {place.site: place for place in bench.places}
        self._states: dict[str, _State] = {}

    def metric(self) -> Float[Tensor, " rows"]:
        """The metric of every pair."""
        model, read = self._b.model, self._b.metric.site
        direct = direct_pairs(model, self._b.places)
        wanted = {
            place.site: self._stretch(place, list(direct[place.site]))
            for place in self._b.places if direct[place.site] and self._n(place.site)
        }  # fmt: skip
        self._segments = dict(zip(wanted, stretches(model, self._batch, list(wanted.values())), strict=True))
        for place in self._b.places:
            self._states[place.site] = self._state(place, list(direct[place.site]))
        above = list(direct_to(model, list(self._places), [read]))
        inputs = [(up, self._input(up, torch.ones(self._n(up), 1, dtype=torch.bool))[:, 0]) for up in above]
        segment = model.segment(self._batch, above[0], read, hold=above[1:])
        rows = torch.arange(len(self._rows), device=self._rows.device)
        reached = segment.run(inputs[0][1], rows=rows, held=dict(inputs[1:]))
        return value(self._b.metric, reached, self._rows)

    def _n(self, site: str) -> int:
        return len(self._sites[site])

    def _input(self, up: str, seen: Bool[Tensor, "nodes k"]) -> Float[Tensor, "rows k pos d"]:
        """What an earlier site holds for somebody who sees some of its nodes, in every pair."""
        state, nodes, basis = self._states[up], self._sites[up], self._places[up].basis
        reference = self._references[up].x
        assert reference is not None
        seen = seen.to(reference.device)
        is_error = (nodes.feature == ERROR).to(seen.device)
        written = basis.rows(nodes.feature.clamp_min(0)).to(state.parts)
        parts = torch.einsum("rnp,nk,nd->rkpd", state.parts, seen.to(state.parts), written)
        errors = torch.einsum("repd,ek->rkpd", state.error, seen[is_error].to(state.error))
        return reference[:, None] + parts + errors

    def _state(self, place: Place, above: Sequence[str]) -> _State:
        nodes, n_pos = self._sites[place.site], self._batch.ids.shape[1]
        device, reference = self._batch.ids.device, self._references[place.site]
        x, read = self._seen(place, above)  # (rows, kinds, pos, d), with the kind of each node
        kind = self._kinds(place, above)[1]
        feature, pos = nodes.feature.to(device), nodes.pos.to(device)
        at = (pos[:, None] < 0) | (pos[:, None] == torch.arange(n_pos, device=device))
        features, column = torch.unique(feature.clamp_min(0), return_inverse=True)
        ours = self._b.coefficients(place, features, reference)
        moved = place.basis.coefficients(read, features) - ours[:, None]  # (rows, kinds, pos, f)
        parts = moved[:, kind, :, column].permute(1, 0, 2) if len(nodes) else moved.new_zeros(len(self._rows), 0, n_pos)
        is_error = feature == ERROR
        parts = parts * (at & ~is_error[:, None])
        empty = reference.x
        assert empty is not None and reference.written is not None
        error = torch.zeros_like(x)
        if bool(is_error.any()):
            error = error_moved(place.basis, x, read, empty[:, None], reference.written[:, None])
        return _State(parts, error[:, kind[is_error]] * at[is_error][..., None])

    def _kinds(self, place: Place, above: Sequence[str]) -> tuple[dict[str, Tensor], Int[Tensor, " nodes"]]:
        """Nodes that see the same: per earlier site what each kind sees, and the kind of every node."""
        n = self._n(place.site)
        if not above or not n:
            return {}, torch.zeros(n, dtype=torch.long, device=self._rows.device)
        masks = [self._kept.get((up, place.site), torch.zeros(self._n(up), n, dtype=torch.bool)) for up in above]
        # a row of zeros, since columns of nothing can't be told apart
        every = torch.cat([torch.zeros(1, n, dtype=torch.bool), *masks])
        kinds, kind = torch.unique(every, dim=1, return_inverse=True)
        kinds = kinds[1:]
        return dict(zip(above, kinds.split([len(m) for m in masks]), strict=True)), kind.to(self._rows.device)

    def _stretch(self, place: Place, above: Sequence[str]) -> tuple[str, list[str], list[str]]:
        """From the first of the earlier sites to what the site and its basis hold; the other earlier ones are given."""
        model, (start, *others) = self._b.model, above
        reaches, resolve = model.site_map.reaches, model.resolve
        ends = [end for end in dict.fromkeys((place.site, place.read)) if any(reaches(up, end) for up in above)]
        last = resolve(max(ends, key=lambda end: resolve(end).order))
        return start, ends, [up for up in others if resolve(up).precedes(last)]

    def _seen(self, place: Place, above: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the site and what its basis reads hold for every kind of node: `(rows, kinds, pos, width)`."""
        kinds, _ = self._kinds(place, above)
        if not kinds:
            return tuple(precise(self._clean.flat(site))[:, None] for site in (place.site, place.read))  # type: ignore[return-value]
        n_rows, (start, ends, others) = len(self._rows), self._stretch(place, above)
        segment = self._segments[place.site]
        found: dict[str, list[Tensor]] = {end: [] for end in ends}
        n_kinds = next(iter(kinds.values())).shape[1]
        rows = torch.arange(n_rows, device=self._rows.device)
        for some in torch.arange(n_kinds).split(max(1, self._size // n_rows)):
            inputs = {up: self._input(up, kinds[up][:, some]).flatten(0, 1) for up in (start, *others)}
            at = rows.repeat_interleave(len(some))
            reached = segment.run(inputs.pop(start), rows=at, held=inputs)
            for end in ends:
                found[end].append(precise(reached.acts.flat(end)).unflatten(0, (n_rows, -1)))
        both = {end: torch.cat(parts, 1) for end, parts in found.items()}
        return both[place.site], both.get(place.read, both[place.site])
