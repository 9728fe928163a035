"""The edges of some pairs: gradients of later nodes, taken back to earlier sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.decomposition import Place
from circuits.graph.circuit import ERROR
from circuits.nodes.runs import AttributionOptions, clean_slopes, runs_of
from circuits.nodes.setting import Setting, SiteState
from workbench.core.precision import precise
from workbench.models.segment import Segment, Stretch
from workbench.models.stretches import stretches

Left = Literal["clean", "ig"]
_ADDS = 1e-4
"""How exactly the stream must be a sum for the closed form, relative to its norm, in fp32; more in half precision."""


class EdgeNodes:
    """The nodes of one site that take part, as arrays on the device."""

    def __init__(self, place: Place, pos: Tensor, feature: Tensor) -> None:
        self.place, self.pos, self.feature = place, pos, feature
        self.features, index = torch.unique(feature[feature != ERROR], return_inverse=True)
        self.index = torch.full_like(feature, -1)
        self.index[feature != ERROR] = index
        self.rows = place.basis.rows(self.features)

    def __len__(self) -> int:
        return len(self.feature)

    @property
    def pairs(self) -> Int[Tensor, "n 2"]:
        """Position and feature of each."""
        return torch.stack([self.pos, self.feature], dim=1)

    def collect(self, per_feature: Tensor, error: Tensor) -> Float[Tensor, "k n"]:
        """Values per position and feature, `(k, pos, f)`, and per position for the error, for each node."""
        every = torch.cat([per_feature, error[..., None]], dim=-1)
        column = torch.where(self.index < 0, per_feature.shape[-1], self.index)
        summed, where = every.sum(1), self.pos.clamp_min(0)
        return torch.where(self.pos < 0, summed[:, column], every[:, where, column])


@dataclass(frozen=True, eq=False)
class Cotangents:
    """For later nodes in some pairs, what is multiplied with a change of the site's input.

    Attributes:
        row: of the chunk.
        node: number of the later node.
        read: `(k, pos, d_in)`, where the basis reads.
        written: `(k, pos, d)`, where it writes; None if that is the same site, and then part of `read`.
    """

    row: Int[Tensor, " k"]
    node: Int[Tensor, " k"]
    read: Float[Tensor, "k pos d_in"]
    written: Float[Tensor, "k pos d"] | None


def _summands(down: str) -> list[str]:
    """What a site of the stream is the sum of: the stream before, and what attention and MLP of its layer write."""
    layer = int(down.rpartition(".")[2])
    return ["embed" if layer == 0 else f"resid_post.{layer - 1}", f"attn_out.{layer}", f"mlp_out.{layer}"]


Pull = Callable[[Cotangents], Tensor]
"""From cotangents to the gradient at an earlier site, `(k, pos, d)`."""


class Chunk:
    """Some pairs: their states, gradients and runs of blocks."""

    def __init__(
        self, setting: Setting, states: Mapping[str, SiteState], rows: Int[Tensor, " rows"],
        options: AttributionOptions, left: Left, threshold: float | None,
        links: Mapping[str, Mapping[str, Sequence[str]]],
    ) -> None:  # fmt: skip
        self._s, self._states, self._rows, self._o = setting, states, rows, options
        self._keep, self._threshold = setting.keep[rows], threshold
        batch = setting.batch(rows)
        names = setting.model.sites().names
        streams = [place.site for place in setting.places if place.site.startswith("resid_post.")]
        parts = [part for site in streams for part in _summands(site) if part in names]
        self._clean = setting.model.capture(batch, list(dict.fromkeys([*setting.sites, *parts])))
        self._batch, self._sums = batch, dict[str, bool]()
        self._changes = dict[str, tuple[Tensor, Tensor]]()
        integrated = setting.places if left == "ig" or threshold is not None else []
        mean = {
            place.site: run.slope(states[place.site].change)
            for place, run in runs_of(setting, integrated, rows, options)
        }
        self._slopes = mean if left == "ig" else clean_slopes(setting, rows)
        self._own = mean
        self._segments = self._recorded(links)

    def _spread(self, x: Tensor) -> Tensor:
        """Values of the kept tokens, `(tokens, ...)`, at their places: `(rows, pos, ...)`."""
        out = x.new_zeros(*self._keep.shape, *x.shape[1:])
        out[self._keep] = x
        return out

    def at(self, site: str) -> Float[Tensor, "rows pos d"]:
        """Clean activations at a site."""
        return precise(self._clean.flat(site))

    def edges(
        self, ups: Sequence[EdgeNodes], down: EdgeNodes
    ) -> Iterator[tuple[str, Float[Tensor, "rows n_up n_down"]]]:
        """Edges of every row into one site, from each of some earlier sites."""
        found = [Found(self, up, down) for up in ups]
        for cotangents in self._cotangents(down):
            for some in found:
                if len(cotangents.row) and len(some.up):
                    some.add(cotangents)
        return ((some.up.place.site, some.out) for some in found)

    def changes(self, nodes: EdgeNodes) -> tuple[Float[Tensor, "rows pos f"], Float[Tensor, "rows pos d"]]:
        """By how much the coefficients of some nodes' features change, and by how much the error."""
        if nodes.place.site not in self._changes:
            self._changes[nodes.place.site] = self._changes_of(nodes)
        return self._changes[nodes.place.site]

    def _changes_of(self, nodes: EdgeNodes) -> tuple[Tensor, Tensor]:
        state = self._states[nodes.place.site]
        moves = state.moves(nodes.place.basis, slice(None))
        error = self._spread(state.change - moves @ nodes.place.basis.rows().to(moves))
        keeps = self._s.baseline == "zero_keep_error"
        return self._spread(moves[:, nodes.features]), torch.zeros_like(error) if keeps else error

    def _cotangents(self, nodes: EdgeNodes) -> Iterator[Cotangents]:
        """The cotangents of all nodes of a site in all rows, a few at a time, those that are zero left out."""
        place = nodes.place
        slope = self._spread(self._slopes[place.site])
        read, own = self.at(place.read).detach(), place.read == place.site
        n_rows, n_pos = self._keep.shape
        positions = torch.arange(n_pos, device=slope.device)
        at = (nodes.pos[:, None] < 0) | (nodes.pos[:, None] == positions)  # (nodes, pos)
        # Features: the gradient of each coefficient, weighted with what the metric says of it, at every position.
        left = slope @ nodes.rows.to(slope).T  # (rows, pos, f)
        if self._threshold is not None:
            left = left * self._above(nodes)
        weights = torch.zeros(n_rows, n_pos, len(nodes), dtype=slope.dtype, device=slope.device)
        real = nodes.feature != ERROR
        weights[..., real] = left[..., nodes.index[real]]
        weights = weights * at.T
        row, node = (weights != 0).any(1).nonzero(as_tuple=True)
        for r, n in zip(row.split(self._o.batch_size), node.split(self._o.batch_size), strict=True):
            if not len(r):  # a site of errors alone
                continue
            into = self._coefficient_gradients(nodes, read, weights, r, n)
            yield Cotangents(r, n, into, None if own else slope.new_zeros(len(r), n_pos, place.basis.d_out))
        if not bool(real.all()):
            yield from self._error_cotangents(nodes, slope, read, at, own=own)

    def _above(self, nodes: EdgeNodes) -> Tensor:
        """Where each feature's own effect is larger than the threshold, in each row and at each position."""
        place, state = nodes.place, self._states[nodes.place.site]
        moves = self._spread(state.moves(place.basis, slice(None))[:, nodes.features])
        own = self._spread(self._own[place.site]) @ nodes.rows.to(moves).T
        return (own * moves).abs() > (self._threshold or 0.0)

    def _coefficient_gradients(
        self, nodes: EdgeNodes, read: Tensor, weights: Tensor, row: Tensor, node: Tensor
    ) -> Float[Tensor, "k pos d_in"]:
        """`sum over positions of weight * d coefficient / d read`; a position at a time depends on itself alone."""
        features, column = torch.unique(nodes.feature[node], return_inverse=True)
        leaf = read[row].clone().requires_grad_(True)
        with torch.enable_grad():
            found = nodes.place.basis.coefficients(leaf, features)  # (k, pos, f)
            picked = found.gather(2, column[:, None, None].expand(-1, found.shape[1], 1))[..., 0]
            total = (picked * weights[row, :, node].to(picked)).sum()
        return torch.autograd.grad(total, leaf)[0]

    def _error_cotangents(
        self, nodes: EdgeNodes, slope: Tensor, read: Tensor, at: Tensor, *, own: bool
    ) -> Iterator[Cotangents]:
        """Of the error node: what is no feature, `x - contribution(read)`, changes with both."""
        which = (nodes.feature == ERROR).nonzero()[:, 0]
        every = torch.cartesian_prod(torch.arange(len(slope), device=slope.device), which)
        above = torch.ones(slope.shape[:2], dtype=torch.bool, device=slope.device)
        if self._threshold is not None:
            effect = (self._spread(self._own[nodes.place.site]) * self.changes(nodes)[1]).sum(-1)
            above = effect.abs() > self._threshold
        for row, node in (part.unbind(1) for part in every.split(self._o.batch_size)):
            weights = slope[row] * (at[node] & above[row])[..., None]
            leaf = read[row].clone().requires_grad_(True)
            with torch.enable_grad():
                written = nodes.place.basis.contribution(leaf)
                back = torch.autograd.grad((written * weights.to(written)).sum(), leaf)[0]
            yield Cotangents(row, node, weights - back if own else -back, None if own else weights)

    def _recorded(self, links: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[tuple[str, str], Segment]:
        """For every earlier and later site whose edges need a run of blocks, where that run starts; of one pass."""
        model, places = self._s.model, {place.site: place for place in self._s.places}
        reaches, wanted = model.site_map.reaches, dict[tuple[str, str], Stretch]()
        for site, above in links.items():
            down = places[site]
            for up, held in above.items():
                if down.read == site and self._only_adds(up, site, held):
                    continue
                ends = [end for end in dict.fromkeys((down.read, site)) if reaches(up, end)]
                between = [h for h in held if any(model.resolve(h).precedes(model.resolve(end)) for end in ends)]
                wanted[up, site] = (up, ends, between)
        return dict(zip(wanted, stretches(model, self._batch, list(wanted.values())), strict=True))

    def puller(self, up: Place, down: Place) -> Pull:
        """Takes cotangents to an earlier site: through the stream as they are, otherwise back through a block."""
        segment = self._segments.get((up.site, down.site))
        if segment is None:
            return lambda cotangents: cotangents.read
        ends = [end for end in dict.fromkeys((down.read, down.site)) if self._s.model.site_map.reaches(up.site, end)]

        def pull(cotangents: Cotangents) -> Tensor:
            leaf = segment.x[cotangents.row].clone().detach().requires_grad_(True)
            with torch.enable_grad():
                reached = segment.run(leaf, rows=cotangents.row)
                parts = []
                for end in ends:
                    weight = cotangents.read if end == down.read else cotangents.written
                    assert weight is not None
                    parts.append((precise(reached.acts.flat(end)) * weight).sum())
            return precise(torch.autograd.grad(torch.stack(parts).sum(), leaf)[0])

        return pull

    def _only_adds(self, up: str, down: str, held: Sequence[str]) -> bool:
        """Whether the later site is the earlier one plus what is held: then a change passes as it is."""
        if not down.startswith("resid_post."):
            return False
        before, attn, mlp = _summands(down)
        passed = {before: [attn, mlp], attn: [mlp] if self._s.model.site_map.reaches(attn, mlp) else [], mlp: []}
        return up in passed and all(site in held for site in passed[up]) and self._is_sum(down)

    def _is_sum(self, down: str) -> bool:
        """Whether the stream really is the sum of what comes in and what its block writes, in this model."""
        if down not in self._sums:
            summands = _summands(down)
            if any(site not in self._clean for site in summands):
                return False
            mask = self._batch.mask
            after, *parts = (self.at(site)[mask] for site in (down, *summands))
            eps = max(_ADDS, 10 * torch.finfo(self._s.model.dtype).eps)
            self._sums[down] = float((torch.stack(parts).sum(0) - after).norm() / after.norm()) <= eps
        return self._sums[down]


class Found:
    """Edges between two sites in some pairs, as they are found."""

    def __init__(self, chunk: Chunk, up: EdgeNodes, down: EdgeNodes) -> None:
        self.up = up
        self._change, self._error = chunk.changes(up)
        self._pull = chunk.puller(up.place, down.place)
        self.out: Float[Tensor, "rows n_up n_down"] = self._change.new_zeros(len(self._change), len(up), len(down))

    def add(self, cotangents: Cotangents) -> None:
        """The edges into some nodes in some rows."""
        slope, row = self._pull(cotangents), cotangents.row
        per_feature = (slope @ self.up.rows.to(slope).T) * self._change[row]
        self.out[row, :, cotangents.node] = self.up.collect(per_feature, (slope * self._error[row]).sum(-1))
