"""The bases that have a name; a new one is one file with a decorated function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from workbench.bases.base import Basis
from workbench.bases.fits import ModelLike, placed_at
from workbench.core.errors import InvalidInputError
from workbench.core.registry import Registry
from workbench.hooks.sites import Site

BASES: Registry[Callable[..., Basis]] = Registry("basis", "workbench.bases.kinds")
"""Functions `(model, site, **options) -> Basis` by the name that `wb.basis` takes.

A file of `workbench/bases/kinds` is found by itself; one elsewhere has to be imported.

>>> import torch
>>> from workbench.bases.base import Dictionary
>>> @BASES.register("signs")
... def signs(model: ModelLike, site: Site) -> Dictionary:
...     '''Each coordinate twice: where it is positive and where it is negative.'''
...     both = torch.cat([torch.eye(model.width(site)), -torch.eye(model.width(site))])
...     return Dictionary.of(lambda x: (x @ both.T).relu(), both, name="signs")
>>> BASES.remove("signs").__name__
'signs'
"""


def build_basis(name: str, model: ModelLike, site: str | Site, **options: Any) -> Basis:
    """The basis of this name at a site of a model.

    Args:
        name: a registered name.
        model: the model.
        site: the site.
        **options: of this kind of basis.

    Raises:
        UnknownNameError: if there is no such basis.
        InvalidInputError: for options that the kind does not have, or that are missing.
    """
    builder, where = BASES[name], model.resolve(site)
    signature = inspect.signature(builder)
    try:
        signature.bind(model, where, **options)
    except TypeError as error:
        takes = ", ".join(list(signature.parameters)[2:]) or "no options"
        raise InvalidInputError(f"basis({name!r}, model, {str(where)!r}): {error}. It takes {takes}.") from None
    basis = builder(model, where, **options)
    return placed_at(basis, model, basis.site or where)
