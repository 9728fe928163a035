"""`basis`: an SAE, a path or a name as a basis of a model's site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.bases.base import Basis
from workbench.bases.fits import placed_at
from workbench.bases.registry import BASES, build_basis
from workbench.bases.sae import SAELike, as_basis
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, UnknownNameError, did_you_mean
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.saes.formats.load import load_sae


@checked
def basis(
    sae_or_path_or_name: SAELike | Basis | str | Path,
    model: Model | None = None,
    site: str | Site | None = None,
    **options: Any,
) -> Basis:
    """Activations of a site as a sum of what features write.

    Args:
        sae_or_path_or_name: an SAE or transcoder in the sae_lens form; where `load_sae` finds one; or the name of a
            basis: "neurons", "mlp_hidden", "heads", "head_channels", "pca", "random", or one that `BASES` registers. A
            basis is returned as it is, after the checks.
        model: whose activations; needed by name, otherwise what it was made for is checked.
        site: where it reads; an SAE knows its own.
        **options: of a basis by name, such as `x=` and `k=` for "pca", `d_sae=`, `k=` and `seed=` for "random".

    Raises:
        UnknownNameError: if there is neither a basis nor a file of this name.
        MismatchError: for an SAE of another model or site.
        WidthError: for an SAE of another width than its site.
        InvalidInputError: for what is no SAE, a temporal SAE, or options that the kind does not have.
    """
    what = sae_or_path_or_name
    if isinstance(what, str) and what in BASES:
        if model is None or site is None:
            raise InvalidInputError(
                f"basis({what!r}): its directions are those of a model at a site. Give both, as basis({what!r}, model, "
                "'resid_post.3')."
            )
        return build_basis(what, model, site, **options)
    if options:
        raise InvalidInputError(
            f"basis({next(iter(options))}=...): options are for bases by name ({', '.join(BASES)}). Give those "
            "of an SAE to load_sae, and its result here."
        )
    if isinstance(what, str) and "/" not in what and not Path(what).exists():
        raise UnknownNameError(
            f"basis({what!r}): there is no basis, folder or file of this name. {did_you_mean(what, BASES)} An "
            "SAE is given as itself, as its folder, or as release/sae_id of sae_lens."
        )
    found = as_basis(load_sae(what) if isinstance(what, (str, Path)) else what)
    if model is None and site is not None:
        raise InvalidInputError(f"basis(..., site={str(site)!r}): a site is one of a model. Give the model as well.")
    return found if model is None else placed_at(found, model, site)
