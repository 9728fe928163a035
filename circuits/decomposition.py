"""Bases at sites of a model: whether each belongs there, and whether a metric can see its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from circuits.saes.folder import saes_in
from workbench.bases.base import Basis
from workbench.bases.fits import placed_at
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, MismatchError
from workbench.models.model import Model
from workbench.saes.basis import basis


@checked
def bases(model: Model, given: Mapping[str, AnySAE | str | Path] | str | Path) -> dict[str, Basis]:
    """A basis per site, by the site's own name, in the order of a forward pass.

    Args:
        model: the model.
        given: per site an SAE, another basis, a path or the name of a basis, as for `workbench.basis`; or a folder
            of one SAE per site, as `train_saes` writes it.

    Raises:
        DegenerateInputError: if there is none.
        InvalidInputError: for what is not an SAE.
        MismatchError: if an SAE was made for another model or site, is a transcoder, or two are for one site.
        WidthError: if an SAE has another width than its site.
        MissingFileError: if the folder has no index, or an SAE of it is gone.
    """
    if isinstance(given, str | Path):
        given = saes_in(given)
    if not given:
        raise DegenerateInputError("bases={}: no SAE was given. Give one per site, such as {'resid_post.15': sae}.")
    placed: dict[str, Basis] = {}
    for site, what in sorted(given.items(), key=lambda item: model.resolve(item[0]).order):
        name = str(model.resolve(site))
        if name in placed:
            raise MismatchError(
                f"bases={{...}}: {site} is the site {name}, which has an SAE already. Give one of them."
            )
        found = as_basis(what) if not isinstance(what, str | Path) else basis(what, model, site)
        found.refuse_transcoder("A basis of features")
        placed[name] = placed_at(found, model, site)
    return placed


@checked
def neurons(model: Model, sites: Sequence[str]) -> dict[str, Basis]:
    """The coordinates of each site as its features: the control that SAEs have to beat."""
    return bases(model, dict.fromkeys(sites, "neurons"))


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
