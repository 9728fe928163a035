"""Dictionaries as parts of the replacement model: active features, what each reads and writes, what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution_graphs.sublayers import WHO, Acts
from circuits.decomposition import bases, places
from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.core.precision import precise
from workbench.hooks.sites import Site
from workbench.models.model import Model

STREAM = ("resid_pre", "resid_mid", "resid_post")


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class CrossLayerTranscoder(OneLine):
    """Transcoders that write at the MLPs of their own and of later layers.

    Attributes:
        layers: per layer a transcoder, with what its features write in their own layer and that layer's bias.
        later: decoder rows `(d_sae, d_model)` by the layer that reads and the later layer that is written.
    """

    layers: Mapping[int, Basis]
    later: Mapping[tuple[int, int], Float[Tensor, "d_sae d_model"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for (reads, writes), rows in self.later.items():
            if reads not in self.layers or writes not in self.layers or writes <= reads:
                raise InvalidInputError(
                    f"CrossLayerTranscoder(later={{({reads}, {writes}): ...}}): its layers are "
                    f"{', '.join(map(str, sorted(self.layers)))}. Name one of them and a later one."
                )
            if len(rows) != self.layers[reads].d_sae:
                raise ShapeError(
                    f"CrossLayerTranscoder(later={{({reads}, {writes}): {tuple(rows.shape)}}}): layer {reads} has "
                    f"{self.layers[reads].d_sae} features. Give a row per feature."
                )


Coders = Mapping[str, AnySAE] | CrossLayerTranscoder
"""What takes coders takes bases by site, or a cross-layer transcoder."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Coder:
    """A dictionary with its active features at one prompt, position by position.

    Attributes:
        basis: what encodes.
        site: where its features are named: the first site that they write.
        read: where it encodes.
        later: decoder rows at the other sites that it writes.
        pos: of each active feature, ascending.
        feature: number of each.
        value: coefficient of each: by how many of its rows it moves what is written.
        start: number of its first feature among those of all coders.
    """

    basis: Basis
    site: Site
    read: Site
    later: Mapping[Site, Tensor]
    pos: Int[Tensor, " active"]
    feature: Int[Tensor, " active"]
    value: Float[Tensor, " active"]
    start: int

    def __len__(self) -> int:
        return len(self.pos)

    @property
    def transcodes(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.site != self.read

    def rows(self, site: Site, features: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """What one unit of each feature writes at a site."""
        if site == self.site:
            return self.basis.rows(features)
        rows = self.later[site]
        return precise(rows[features.to(rows.device)])

    def contribution(self, site: Site, n_tokens: int) -> Float[Tensor, "pos d"]:
        """What all active features write at a site."""
        found = self.value.new_zeros(n_tokens, self.basis.d_out)
        for part in torch.arange(len(self)).split(4096):
            written = self.rows(site, self.feature[part]).to(found) * self.value[part, None]
            found.index_add_(0, self.pos[part], written)
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class WrittenSite:
    """A site whose activation is a sum of what features write, a constant, a linear path and an error.

    Attributes:
        site: the site.
        coders: those that write there.
        constant: what is there without features, error and linear path.
        error: what is left, exactly; zero where all of it counts as constant.
        skips: where each linear path begins, and its matrix.
    """

    site: Site
    coders: tuple[Coder, ...]
    constant: Float[Tensor, "pos d"]
    error: Float[Tensor, "pos d"]
    skips: tuple[tuple[Site, Float[Tensor, "d_out d_in"]], ...] = ()


@dataclass(frozen=True, eq=False)
class Placed:
    """A basis with where it reads and writes, before a prompt."""

    basis: Basis
    site: Site
    read: Site
    later: Mapping[Site, Tensor] = field(default_factory=dict)


def placed(model: Model, coders: Coders) -> list[Placed]:
    """The coders, checked, in the order of a forward pass by what they read.

    Raises:
        MismatchError: if one was made for another model or site.
        InvalidInputError: for one that reads or writes where nothing can be followed.
    """
    later: Mapping[tuple[int, int], Tensor] = {}
    if isinstance(coders, CrossLayerTranscoder):
        later, coders = coders.later, {str(basis.site_out): basis for basis in coders.layers.values()}
    found = []
    for place in places(model, bases(model, coders)):
        site, read = model.resolve(place.site), model.resolve(place.read)
        _require_followed(site, read)
        rows = {Site(site.kind, there): rows for (here, there), rows in later.items() if here == read.layer}
        found.append(Placed(place.basis, site, read, rows))
    return sorted(found, key=lambda coder: coder.read.order)


_WRITTEN = (*STREAM, "attn_out", "mlp_out", "z", "mlp_post")
_READ = (*_WRITTEN, "mlp_in")


def _require_followed(site: Site, read: Site) -> None:
    for where, known, does in ((site, _WRITTEN, "write"), (read, _READ, "read")):
        if where.kind not in known or where.head is not None:
            raise InvalidInputError(
                f"{WHO}(coders={{{str(site)!r}: ...}}): no path through {where} is followed. Give coders that {does} "
                f"at {', '.join(known)}."
            )


def encoded(given: Sequence[Placed], acts: Acts, *, first: bool) -> tuple[list[Coder], dict[Site, WrittenSite]]:
    """The active features at one prompt, and what each written site is the sum of.

    Args:
        given: the coders.
        acts: activations where they read and write.
        first: whether the features and errors of the first token are nodes; otherwise all that is there is a constant.
    """
    coders, start = [], 0
    for place in given:
        coder = _active(place, acts[place.read], start, first=first)
        coders.append(coder)
        start += len(coder)
    sites = sorted({site for place in given for site in (place.site, *place.later)}, key=lambda site: site.order)
    return coders, {site: _written(site, coders, acts, first=first) for site in sites}


def _active(place: Placed, x: Tensor, start: int, *, first: bool) -> Coder:
    parts = []
    for rows, found in place.basis.chunks(precise(x)):
        values = place.basis.rescaled(found, precise(x[rows]))
        pos, feature = values.nonzero(as_tuple=True)
        parts.append((pos + rows.start, feature, values[pos, feature]))
    pos, feature, value = (torch.cat(column) for column in zip(*parts, strict=True))
    if not first:
        kept = pos > 0
        pos, feature, value = pos[kept], feature[kept], value[kept]
    return Coder(
        basis=place.basis, site=place.site, read=place.read, later=place.later, pos=pos, feature=feature, value=value,
        start=start,
    )  # fmt: skip


def _written(site: Site, coders: Sequence[Coder], acts: Acts, *, first: bool) -> WrittenSite:
    x = precise(acts[site])
    constant, path, skips = torch.zeros_like(x), torch.zeros_like(x), []
    writing = tuple(coder for coder in coders if site == coder.site or site in coder.later)
    for coder in writing:
        if site != coder.site:
            continue
        read = precise(acts[coder.read])
        whole = coder.basis.constant(read).to(x)
        if (matrix := coder.basis.skip) is not None:
            skips.append((coder.read, matrix.to(x)))
            skipped = read @ matrix.to(x).T
            whole, path = whole - skipped, path + skipped
        constant = constant + whole
    error = x - constant - path - sum((c.contribution(site, len(x)) for c in writing), torch.zeros_like(x))
    if not first:
        constant[0], error[0] = x[0], 0
    return WrittenSite(site=site, coders=writing, constant=constant, error=error, skips=tuple(skips))
