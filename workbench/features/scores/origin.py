"""The origin of a table or a set of cards: whose features it describes."""

from __future__ import annotations

from collections.abc import Mapping

from workbench.bases.sae import AnySAE, as_basis
from workbench.core.errors import MismatchError, told_apart
from workbench.hooks.sites import Site
from workbench.models.model import Model

_COMPARED = ("model_fingerprint", "site", "d_sae", "sae")


def origin(model: Model, sae: AnySAE, site: Site | str | None) -> dict[str, object]:
    """The model, site and SAE of scores or cards, which are saved with them."""
    basis = as_basis(sae)
    return {
        "model": model.name, "model_fingerprint": model.fingerprint, "site": None if site is None else str(site),
        "d_sae": basis.d_sae, "sae": basis.fingerprint,
    }  # fmt: skip


def _name(origin: Mapping[str, object]) -> str | None:
    return None if origin.get("model") is None else str(origin["model"])


def require_same_origin(what: str, given: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Refuses scores or cards of other features; what either origin does not record is not compared.

    Args:
        what: begins the message, such as "This feature table".
        given: its origin.
        wanted: the origin that it must have.

    Raises:
        MismatchError: naming what differs.
    """
    differ = [key for key in _COMPARED
              if None not in (given.get(key), wanted.get(key)) and given[key] != wanted[key]]  # fmt: skip
    wrong = [f"{key} {given[key]} (here {wanted[key]})" for key in differ if key != "model_fingerprint"]
    if "model_fingerprint" in differ:
        theirs, ours = told_apart(*((_name(one), str(one["model_fingerprint"])) for one in (given, wanted)))
        wrong.insert(0, f"model {theirs} (here {ours})")
    if wrong:
        raise MismatchError(
            f"{what} belongs to other features, of {given.get('model')} at {given.get('site')}: {', '.join(wrong)}. "
            "Name those of this SAE, or make a table with `workbench features score`."
        )
