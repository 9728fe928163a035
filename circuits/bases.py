"""SAEs at their sites: whether each belongs to the model and the site, and whether the metric can see its features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.bases.saecode import Basis
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, ShapeError
from workbench.hooks.sites import Site
from workbench.models.model import Model


def bases_at(model: Model, saes: Mapping[str, Any]) -> dict[str, Basis]:
    """A basis per site, by the site's own name, in the order of a forward pass.

    Args:
        model: the model.
        saes: an SAE per site.

    Raises:
        DegenerateInputError: if there is none.
        InvalidInputError: for what is not an SAE.
        MismatchError: if an SAE was made for another model or site, is a transcoder, or two are for one site.
        ShapeError: if an SAE has another width than its site.
    """
    if not saes:
        raise DegenerateInputError("bases={}: no SAE was given. Give one per site, such as {'resid_post.15': sae}.")
    bases: dict[str, Basis] = {}
    for site, sae in sorted(saes.items(), key=lambda item: model.resolve(item[0]).order):
        name = str(model.resolve(site))
        if name in bases:
            raise MismatchError(
                f"bases={{...}}: {site} is the site {name}, which has an SAE already. Give one of them."
            )
        bases[name] = _checked(model, name, sae)
    return bases


def _checked(model: Model, site: str, sae: Any) -> Basis:
    if not all(hasattr(sae, name) for name in ("encode", "decode", "W_dec", "b_dec", "cfg")):
        raise InvalidInputError(
            f"{site}: {type(sae).__name__} is not an SAE: it needs encode, decode, W_dec, b_dec and cfg. Load one with "
            "load_sae."
        )
    basis = Basis(sae)
    if basis.width != model.width(site):
        raise ShapeError(f"The SAE for {site} has width {basis.width}; the site has {model.width(site)}.")
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
    made_for, made_with = getattr(metadata, "hook_name", None), getattr(metadata, "model_fingerprint", None)
    if made_for and Site.parse(made_for) != Site.parse(site):
        raise MismatchError(
            f"This SAE was trained at {Site.parse(made_for)}, not at {site}. Pass it under its own site."
        )
    if made_with and made_with != model.fingerprint:
        raise MismatchError(
            f"The SAE for {site} was trained on model {made_with}; this is {model.name}, {model.fingerprint}. "
            "Load the model that it was trained on, or train one on this model."
        )
    return basis


def refuse_unreached(model: Model, sites: Mapping[str, Basis], read: str, reader: str) -> None:
    """Refuses SAEs whose features cannot change what is read.

    Args:
        model: the model.
        sites: a basis per site.
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
