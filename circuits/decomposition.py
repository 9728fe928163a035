"""Bases at sites of a model: whether each belongs there, what nodes they make, and whether a metric can see them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.saes.folder import saes_in
from workbench.bases.base import Basis
from workbench.bases.fits import placed_at
from workbench.bases.registry import build_basis
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, MismatchError
from workbench.models.model import Model
from workbench.saes.basis import basis


@checked
def bases(model: Model, given: Mapping[str, AnySAE | str | Path] | str | Path) -> dict[str, Basis]:
    """A basis per site, by the name of the site where it writes, in the order of a forward pass.

    Args:
        model: the model.
        given: per site an SAE, a transcoder, another basis, a path or the name of a basis, as for `workbench.basis`; or
            a folder of one SAE per site, as `train_saes` writes it. A transcoder may be named by either of its sites.

    Raises:
        DegenerateInputError: if there is none.
        InvalidInputError: for what is not an SAE.
        MismatchError: if an SAE was made for another model or site, or two are for one site.
        WidthError: if an SAE has another width than its site.
        MissingFileError: if the folder has no index, or an SAE of it is gone.
    """
    if isinstance(given, str | Path):
        given = saes_in(given)
    if not given:
        raise DegenerateInputError("bases={}: no SAE was given. Give one per site, such as {'resid_post.15': sae}.")
    placed: dict[str, Basis] = {}
    for site, what in given.items():
        found = as_basis(what) if not isinstance(what, str | Path) else basis(what, model, site)
        found = _placed(found, model, site)
        name = str(model.resolve(str(found.site_out)))
        if name in placed:
            raise MismatchError(
                f"bases={{...}}: {site} is the site {name}, which has an SAE already. Give one of them."
            )
        placed[name] = found
    return dict(sorted(placed.items(), key=lambda item: model.resolve(item[0]).order))


def _placed(found: Basis, model: Model, site: str) -> Basis:
    if not found.transcodes:
        return placed_at(found, model, site)
    placed = placed_at(found, model)
    if placed.site_out is None:
        raise MismatchError(
            f"bases={{{site!r}: ...}}: this transcoder does not say where it writes (metadata.hook_name_out). Load it "
            "with load_sae(..., site_out=...)."
        )
    own = [model.resolve(str(place)) for place in (placed.site, placed.site_out)]
    if model.resolve(site) not in own:
        raise MismatchError(
            f"bases={{{site!r}: ...}}: this transcoder reads {own[0]} and writes {own[1]}. Pass it under one of these."
        )
    return placed


@checked
def neurons(model: Model, sites: Sequence[str]) -> dict[str, Basis]:
    """The coordinates of each site as its features: the control that SAEs have to beat."""
    return bases(model, dict.fromkeys(sites, "neurons"))


@checked
def mlp_hidden(model: Model, layers: Sequence[int] | None = None) -> dict[str, Basis]:
    """The hidden neurons of each MLP, by what they write at `mlp_out`: the control that is hardest to beat.

    Args:
        model: the model.
        layers: which ones; None takes all.
    """
    layers = range(model.site_map.n_layers) if layers is None else layers
    return bases(model, {f"mlp_out.{layer}": "mlp_hidden" for layer in layers})


@checked
def heads(model: Model, layers: Sequence[int] | None = None) -> dict[str, Basis]:
    """The channels of the heads, by what they write at `attn_out`: `d_head` features per head, head by head.

    A whole head is no feature, since it writes in another direction at each token.

    Args:
        model: the model.
        layers: which ones; None takes all.
    """
    layers = range(model.site_map.n_layers) if layers is None else layers
    return bases(model, {f"attn_out.{layer}": "head_channels" for layer in layers})


@checked
def random(model: Model, sites: Sequence[str], d_sae: int, k: int, seed: int = 0) -> dict[str, Basis]:
    """Random unit directions, of which each token uses the k that it is most along."""
    return {
        str(model.resolve(site)): build_basis("random", model, site, d_sae=d_sae, k=k, seed=seed + i)
        for i, site in enumerate(sorted(sites, key=lambda site: model.resolve(site).order))
    }


@checked
def pca(model: Model, sites: Sequence[str], texts: Iterable[str], k: int | None = None) -> dict[str, Basis]:
    """The principal components of each site on some texts, padding and the first token of each text left out.

    Args:
        model: the model.
        sites: where.
        texts: read in one pass.
        k: how many components; None takes all.
    """
    kept: dict[str, list[Tensor]] = {site: [] for site in sites}
    for batch, acts in model.stream(texts, list(sites)):
        ordinary = batch.mask & (batch.positions > 0)
        for site in sites:
            kept[site].append(acts.flat(site)[ordinary].float())
    return bases(model, {site: build_basis("pca", model, site, x=torch.cat(x), k=k) for site, x in kept.items()})


@dataclass(frozen=True)
class Place:
    """A basis with the sites where it reads and writes, which are one unless it transcodes.

    Attributes:
        site: where it writes, and where its nodes are patched.
        read: where it reads.
        basis: the basis.
    """

    site: str
    read: str
    basis: Basis

    def change(
        self, x: Float[Tensor, "n d"], features: Float[Tensor, "n d_in"], *, error: bool
    ) -> Float[Tensor, "n d"]:
        """By what `x` changes when all features, and with `error` the error too, are set to zero.

        Args:
            x: activations where the basis writes.
            features: activations where it reads.
            error: whether the error goes as well.
        """
        return self.basis.constant(features) - x if error else -self.basis.contribution(features)


def places(model: Model, given: Mapping[str, Basis]) -> list[Place]:
    """The bases with their sites, in the order of a forward pass."""
    return [
        Place(site, str(model.resolve(str(basis.site))) if basis.transcodes else site, basis)
        for site, basis in given.items()
    ]


def reads_of(given: Iterable[Place]) -> list[str]:
    """Every site that the bases read or write, each once."""
    return list(dict.fromkeys(site for place in given for site in (place.read, place.site)))


def refuse_unreached(model: Model, sites: Iterable[str], read: str, reader: str) -> None:
    """Refuses SAEs whose features cannot change what is read.

    Args:
        model: the model.
        sites: of the bases.
        read: the site that is read.
        reader: who reads it, to begin the message.

    Raises:
        MismatchError: if nothing leads from a site to the one that is read.
    """
    for site in sites:
        if not model.site_map.reaches(site, read):
            here, there = model.resolve(site), model.resolve(read)
            why = "below" if there.order < here.order else "beside"
            raise MismatchError(
                f"{reader} reads {there}, {why} the SAE at {here}: no feature can reach it. Read at {here}, or at the "
                "resid_post of its layer or of a later one."
            )
