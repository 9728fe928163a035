"""The local replacement model of one prompt, read backward: what each source adds to each target."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution_graphs.coders import Coder, Placed, WrittenSite, encoded
from circuits.attribution_graphs.sublayers import WHO, Back, followed, mlp_stream
from workbench.core.errors import InvalidInputError
from workbench.core.precision import precise
from workbench.core.tokens import TokenBatch
from workbench.hooks.sites import Site
from workbench.models.frozennorm import FrozenAt, FrozenNorm
from workbench.models.model import Model

MLPs = Literal["half", "leaf"]
ROWS_AT_ONCE = 4096
"""Decoder rows that are gathered at once."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Columns:
    """Where each source stands in a row: features of all coders, errors of sites by position, tokens.

    Attributes:
        n_features: active features.
        sites: those with errors: sites with coders, and MLPs without one that are not followed.
        n_tokens: tokens of the prompt.
    """

    n_features: int
    sites: tuple[Site, ...]
    n_tokens: int

    @property
    def n(self) -> int:
        """Number of sources, the constant apart."""
        return self.tokens.stop

    def errors(self, site: Site) -> slice:
        """The columns of a site's errors."""
        start = self.n_features + self.sites.index(site) * self.n_tokens
        return slice(start, start + self.n_tokens)

    @property
    def tokens(self) -> slice:
        """The columns of the tokens."""
        start = self.n_features + len(self.sites) * self.n_tokens
        return slice(start, start + self.n_tokens)


@dataclass(frozen=True, eq=False, kw_only=True)
class Targets:
    """Vectors that are read at one site, each at one position.

    Attributes:
        site: where.
        vectors: what is read.
        pos: where.
        value: what is read there: the sum of all sources.
        coder: whose features they are; None for outputs.
        added: what norm and unembedding add behind the site.
    """

    site: Site
    vectors: Float[Tensor, "n d"]
    pos: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    coder: Coder | None = None
    added: Float[Tensor, " n"] | None = None

    def some(self, index: Int[Tensor, " k"]) -> Targets:
        """Some of them."""
        added = None if self.added is None else self.added[index]
        return replace(
            self, vectors=self.vectors[index], pos=self.pos[index], value=self.value[index], added=added
        )  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """What every source adds to some targets.

    Attributes:
        sources: a column per source.
        constant: what biases add.
    """

    sources: Float[Tensor, "n columns"]
    constant: Float[Tensor, " n"]


class Replacement:
    """One prompt with its patterns, norms, gates and active features; every target is a sum over sources."""

    def __init__(self, model: Model, given: Sequence[Placed], batch: TokenBatch, *, mlps: MLPs, first: bool) -> None:
        self.model, self.batch, self.mlps, self.first = model, batch, mlps, first
        self.acts = captured(model, batch, given, mlps)
        self.n_tokens = batch.ids.shape[1]
        self.coders, self.written = encoded(given, self.acts, first=first)
        final = Site("resid_post", model.n_layers - 1)
        self.final = FrozenNorm.of(model.site_map["final_norm"].module, self.acts[final]).at(self.acts[final])
        maps = needed(model, given, mlps)
        self.attention, self.mlp, self.norms = followed(model, maps.attention, maps.mlp, maps.inputs, self.acts)
        leaves = [] if mlps == "half" else [Site("mlp_out", layer) for layer in maps.leaves]
        sites = sorted({*self.written, *leaves}, key=lambda site: site.order)
        n_features = sum(map(len, self.coders))
        self.columns = Columns(n_features=n_features, sites=tuple(sites), n_tokens=self.n_tokens)

    def features(self, coder: Coder, index: Int[Tensor, " n"]) -> Targets:
        """Some active features of a coder as targets: what their encoders read, without the encoder's own bias."""
        index = index.to(coder.pos.device)
        pos = coder.pos[index]
        x = precise(self.acts[coder.read])[pos]
        vectors = coder.basis.reading(x, coder.feature[index]).to(x)
        return Targets(site=coder.read, vectors=vectors, pos=pos, value=(vectors * x).sum(1), coder=coder)

    def outputs(self, directions: Float[Tensor, "n d_model"], added: Float[Tensor, " n"]) -> Targets:
        """Directions behind the final norm at the last token as targets.

        Args:
            directions: such as columns of the unembedding.
            added: what is added to each behind the norm.
        """
        last = self.n_tokens - 1
        at = FrozenAt(self.final.of, self.final.scale[last:])
        site = Site("resid_post", self.model.n_layers - 1)
        x = precise(self.acts[site])[last:]
        directions = directions.to(x)
        vectors = at.back(directions[:, None])[:, 0]
        added = added.to(x) + directions @ self.final.of.bias
        pos = torch.full((len(directions),), last, device=x.device)
        return Targets(site=site, vectors=vectors, pos=pos, value=(vectors @ x[0]) + added, added=added)

    @torch.no_grad()
    def rows(self, targets: Targets) -> Rows:
        """What every source adds to each target, exactly; sources behind a target or to its right add nothing."""
        n, width = len(targets.pos), int(targets.pos.max()) + 1
        found = Rows(
            sources=targets.value.new_zeros(n, self.columns.n),
            constant=targets.value.new_zeros(n) if targets.added is None else targets.added.clone(),
        )
        g = targets.vectors.new_zeros(n, width, targets.vectors.shape[1])
        g[torch.arange(n), targets.pos] = targets.vectors
        own = targets.coder is not None and not targets.coder.transcodes
        pending = {targets.site: g}
        while pending:
            site = max(pending, key=lambda site: site.order)
            g = pending.pop(site)
            if site in self.written and not (own and site == targets.site):
                parts = self._take(self.written[site], g, found)
            else:
                parts = self._through(site, g, found)
            for there, part in parts:
                pending[there] = pending[there] + part if there in pending else part
        return found

    def _take(self, written: WrittenSite, g: Tensor, found: Rows) -> Iterator[tuple[Site, Tensor]]:
        """Notes what features, errors and constants of a site add; goes on through linear paths."""
        n = g.shape[1]
        for coder in written.coders:
            self._features(coder, written.site, g, found.sources)
        found.sources[:, self.columns.errors(written.site)][:, :n] = torch.einsum("bpd,pd->bp", g, written.error[:n])
        found.constant.add_(torch.einsum("bpd,pd->b", g, written.constant[:n]))
        for site, matrix in written.skips:
            passed = g @ matrix
            if not self.first:
                passed[:, 0] = 0
            yield site, passed

    def _features(self, coder: Coder, site: Site, g: Tensor, sources: Tensor) -> None:
        n = g.shape[1]
        ends = torch.searchsorted(coder.pos, torch.arange(n + 1, device=coder.pos.device)).tolist()
        out = sources[:, coder.start : coder.start + len(coder)]
        for part in _spans(ends):
            rows = coder.rows(site, coder.feature[ends[part[0]] : ends[part[-1] + 1]]).to(g)
            begin = ends[part[0]]
            for pos in part:
                here = slice(ends[pos], ends[pos + 1])
                if here.stop > here.start:
                    out[:, here] += g[:, pos] @ rows[here.start - begin : here.stop - begin].T * coder.value[here]

    def _through(self, site: Site, g: Tensor, found: Rows) -> Iterable[tuple[Site, Tensor]]:
        """Goes on through what computes a site."""
        layer = site.layer or 0
        match site.kind:
            case "resid_post" if self.model.site_map.is_parallel:
                return [(Site(kind, layer), g) for kind in ("mlp_out", "attn_out", "resid_pre")]
            case "resid_post":
                return [(Site("mlp_out", layer), g), (Site("resid_mid", layer), g)]
            case "resid_mid":
                return [(Site("attn_out", layer), g), (Site("resid_pre", layer), g)]
            case "resid_pre" if layer > 0:
                return [(Site("resid_post", layer - 1), g)]
            case "resid_pre":
                x = precise(self.acts[site])[: g.shape[1]]
                found.sources[:, self.columns.tokens][:, : g.shape[1]] = torch.einsum("bpd,pd->bp", g, x)
                return []
            case "mlp_out" if layer not in self.mlp:
                return self._leaf(site, g, found)
        there, back = self._maps(site)
        passed, added = back(g)
        found.constant.add_(added)
        return [(there, passed)]

    def _maps(self, site: Site) -> tuple[Site, Callable[[Tensor], Back]]:
        """Where a site is computed from, and the way back."""
        layer = site.layer or 0
        match site.kind:
            case "attn_out":
                return Site("z", layer), self.attention[layer].output.back
            case "z":
                return Site("resid_pre", layer), self.attention[layer].back
            case "mlp_out":
                return Site("mlp_post", layer), self.mlp[layer].output.back
            case "mlp_post":
                return mlp_stream(self.model, layer), self.mlp[layer].back
            case "mlp_in":
                return mlp_stream(self.model, layer), functools.partial(_before, self.norms[layer])
        raise InvalidInputError(f"{WHO}: nothing leads back from {site}.")

    def _leaf(self, site: Site, g: Tensor, found: Rows) -> list[tuple[Site, Tensor]]:
        """An MLP that is not followed: what it writes is an error, or a constant where it holds coders."""
        each = torch.einsum("bpd,pd->bp", g, precise(self.acts[site])[: g.shape[1]])
        if not self.first:
            found.constant.add_(each[:, 0])
            each[:, 0] = 0
        if site in self.written:
            found.constant.add_(each.sum(1))
        else:
            found.sources[:, self.columns.errors(site)][:, : g.shape[1]] = each
        return []


def _before(norm: FrozenAt, g: Tensor) -> Back:
    """Through a norm alone."""
    return norm.first(g.shape[1]).back(g), (g @ norm.of.bias).sum(1)


def _spans(ends: Sequence[int]) -> Iterator[range]:
    """Neighbouring positions whose features are gathered together."""
    start = 0
    for pos in range(1, len(ends)):
        if pos == len(ends) - 1 or ends[pos + 1] - ends[start] > ROWS_AT_ONCE:
            yield range(start, pos)
            start = pos


@dataclass(frozen=True)
class Needed:
    """Layers whose attention and MLPs are followed, MLPs without a coder, and MLPs whose input a coder reads."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    leaves: tuple[int, ...]
    inputs: tuple[int, ...]


def needed(model: Model, given: Sequence[Placed], mlps: MLPs) -> Needed:
    """Which sublayers gradients pass through: those above the lowest point where a coder takes everything up."""
    taken = {site for place in given for site in (place.site, *place.later)}
    read = {place.read for place in given}
    layers = range(model.n_layers)
    attention = tuple(i for i in layers if Site("attn_out", i) not in taken or Site("attn_out", i) in read or
                      Site("z", i) in read)  # fmt: skip
    followed = tuple(i for i in layers if Site("mlp_out", i) not in taken or Site("mlp_out", i) in read or
                     Site("mlp_post", i) in read)  # fmt: skip
    inside = tuple(i for i in followed if mlps == "half" or Site("mlp_post", i) in read)
    leaves = tuple(i for i in layers if Site("mlp_out", i) not in taken)
    return Needed(attention, inside, leaves, tuple(i for i in layers if Site("mlp_in", i) in read))


def captured(model: Model, batch: TokenBatch, given: Sequence[Placed], mlps: MLPs) -> dict[Site, Tensor]:
    """Activations of the prompt wherever the replacement model needs them."""
    maps = needed(model, given, mlps)
    wanted: set[Site] = {
        *(Site("resid_pre", i) for i in range(model.n_layers)), Site("resid_post", model.n_layers - 1),
        *(site for place in given for site in (place.read, place.site, *place.later)),
        *(Site(kind, i) for i in maps.attention for kind in ("pattern", "z", "attn_out")),
        *(Site(kind, i) for i in maps.mlp for kind in ("mlp_pre", "mlp_post", "mlp_out")),
        *(mlp_stream(model, i) for i in (*maps.mlp, *maps.inputs)), *(Site("mlp_out", i) for i in maps.leaves),
    }  # fmt: skip
    acts = model.capture(batch, list(wanted))
    return {site: acts[site][0] if site.kind == "pattern" else acts.flat(site)[0] for site in wanted}
