"""Whether a basis belongs to a model and a site."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from workbench.bases.base import Basis
from workbench.bases.sitenames import site_of
from workbench.core.errors import MismatchError, WidthError
from workbench.hooks.sites import Site, SiteMap


@runtime_checkable
class ModelLike(Protocol):
    """What a basis needs of a `Model`, which is a layer above."""

    hf: Any  # the Hugging Face model
    name: str
    site_map: SiteMap

    @functools.cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that tell this model from others."""
        ...

    def resolve(self, site: str | Site) -> Site:
        """The site of this name."""
        ...

    def width(self, site: str | Site) -> int:
        """Size of one token's vector at a site."""
        ...


def read_site(basis: Basis) -> Site:
    """The site that a basis reads.

    Raises:
        MismatchError: if it names none.
        UnknownSiteError: if it names something that is not a site.
    """
    if basis.site is None:
        raise MismatchError(
            "This SAE does not say which site it reads (metadata.hook_name). Name the site yourself, as "
            "load_sae(..., site='resid_post.15')."
        )
    return site_of(basis.site)


def placed_at(basis: Basis, model: ModelLike, site: str | Site | None = None) -> Basis:
    """The basis with the site of this model that it reads, if it belongs there.

    One without fingerprint (from elsewhere) is judged by its site and its width alone.

    Args:
        basis: any basis.
        model: the model.
        site: where it is to read; None takes the site that it names.

    Raises:
        MismatchError: if it was made for another model or site, or names no site and none is given.
        WidthError: if its width is not that of the site.
        UnknownSiteError: if the model does not have the site.
    """
    where = model.resolve(read_site(basis) if site is None else site_of(site) if isinstance(site, str) else site)
    if basis.site is not None and model.resolve(own := site_of(basis.site)) != where:
        raise MismatchError(f"This SAE was trained at {own}, not at {where}. Pass it under its own site.")
    if basis.model_fingerprint not in (None, model.fingerprint):
        raise MismatchError(
            f"The SAE for {where} was trained on model {basis.model_fingerprint}; this is {model.name}, "
            f"{model.fingerprint}. Load the model that it was trained on, or train one on this model."
        )
    if basis.d_in != model.width(where):
        raise WidthError(
            f"The SAE for {where} reads d_in={basis.d_in}, so it has width {basis.d_in}; {where} of {model.name} has "
            f"width {model.width(where)}. Give an SAE of this site."
        )
    out = basis.site_out if basis.transcodes else str(where)
    return replace(basis, site=str(where), site_out=out, model_fingerprint=model.fingerprint)


def bases_at(model: ModelLike, bases: Mapping[str, Basis]) -> dict[str, Basis]:
    """Bases by the names of their sites, in the order of a forward pass, each checked by `placed_at`.

    Raises:
        MismatchError: if one was made for another model or site, or two are for one site.
    """
    placed: dict[str, Basis] = {}
    for site, basis in sorted(bases.items(), key=lambda item: model.resolve(item[0]).order):
        name = str(model.resolve(site))
        if name in placed:
            raise MismatchError(
                f"bases={{...}}: {site} is the site {name}, which has an SAE already. Give one of them."
            )
        placed[name] = placed_at(basis, model, site)
    return placed
