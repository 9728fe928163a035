"""Whose features a table or a set of cards describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.bases.sae import AnySAE, as_basis
from workbench.core.errors import MismatchError
from workbench.hooks.sites import Site
from workbench.models.model import Model

_COMPARED = ("model_fingerprint", "site", "d_sae", "sae")


def origin(model: Model, sae: AnySAE, site: Site | str | None) -> dict[str, Any]:
    """What is written beside scores and cards, so that nobody takes them for those of another SAE, model or site."""
    basis = as_basis(sae)
    return {
        "model": model.name, "model_fingerprint": model.fingerprint, "site": None if site is None else str(site),
        "d_sae": basis.d_sae, "sae": basis.fingerprint,
    }  # fmt: skip


def require_same_origin(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses scores or cards of other features; what either side does not say is not compared.

    Args:
        what: begins the message, such as "This feature table".
        found: how they were made.
        wanted: an `origin`, or how what they are to go with was made.

    Raises:
        MismatchError: naming what differs.
    """
    wrong = [f"{key} {found[key]} (here {wanted[key]})" for key in _COMPARED
             if None not in (found.get(key), wanted.get(key)) and found[key] != wanted[key]]  # fmt: skip
    if wrong:
        raise MismatchError(
            f"{what} belongs to other features, of {found.get('model')} at {found.get('site')}: {', '.join(wrong)}. "
            "Name those of this SAE, or make a table with `workbench features score`."
        )
