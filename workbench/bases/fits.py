"""Whether a basis belongs to a model and a site."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE, as_basis
from workbench.bases.sitenames import site_of
from workbench.core.errors import MismatchError, WidthError, told_apart
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


def sae_site(sae: AnySAE) -> str:
    """The site that an SAE or another basis reads.

    Raises:
        MismatchError: if it names none.
        UnknownSiteError: if it names something that is not a site.
    """
    basis = as_basis(sae)
    if basis.site is None:
        raise MismatchError(
            "This SAE does not say which site it reads (metadata.hook_name). Name the site yourself, as "
            "load_sae(..., site='resid_post.15')."
        )
    return str(site_of(basis.site))


def placed_at(sae: AnySAE, model: ModelLike, site: str | Site | None = None) -> Basis:
    """An SAE as a basis with the site of this model that it reads, if it belongs there.

    One without fingerprint (from elsewhere) is judged by its site and its width alone.

    Args:
        sae: an SAE in the sae_lens form, or any basis.
        model: the model.
        site: where it is to read; None takes the site that it names.

    Raises:
        MismatchError: if it was made for another model or site, or names no site and none is given.
        WidthError: if its width is not that of the site.
        UnknownSiteError: if the model does not have the site.
    """
    basis = as_basis(sae)
    where = model.resolve(sae_site(basis) if site is None else site_of(site) if isinstance(site, str) else site)
    if basis.site is not None and model.resolve(own := site_of(basis.site)) != where:
        raise MismatchError(f"This SAE was trained at {own}, not at {where}. Pass it under its own site.")
    if basis.model_fingerprint not in (None, model.fingerprint):
        name = basis.metadata.get("model_name")
        made = str(name) if name else None, str(basis.model_fingerprint)
        theirs, ours = told_apart(made, (model.name, model.fingerprint))
        raise MismatchError(
            f"The SAE for {where} was trained on {theirs}; this is {ours}. Load the model that it was trained on, or "
            "train one on this model."
        )
    width = basis.d_in if basis.d_in != model.width(where) or basis.transcodes else basis.d_out
    if width != model.width(where):
        raise WidthError(
            f"The SAE for {where} reads d_in={basis.d_in} and writes d_out={basis.d_out}, so it has width {width}; "
            f"{where} of {model.name} has width {model.width(where)}. Give an SAE of this site."
        )
    out = basis.site_out if basis.transcodes else str(where)
    return replace(basis, site=str(where), site_out=out, model_fingerprint=model.fingerprint)
