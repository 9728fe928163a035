"""The bases that have a name; a new one is one file with a decorated function."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from workbench.bases.base import Basis
from workbench.bases.fits import ModelLike, placed_at
from workbench.core.errors import InvalidInputError, UnknownNameError, did_you_mean
from workbench.hooks.sites import Site

Builder = Callable[..., Basis]
"""From a model, a site of it and options to a basis."""

_BUILDERS: dict[str, Builder] = {}


def register_basis(name: str) -> Callable[[Builder], Builder]:
    """Registers a function `(model, site, **options) -> Basis` under a name for `wb.basis`.

    A file of `workbench/bases/kinds` is found by itself; one elsewhere has to be imported.

    Raises:
        InvalidInputError: if the name is taken.

    >>> import torch
    >>> from workbench.bases.base import Dictionary
    >>> @register_basis("signs")
    ... def signs(model, site):
    ...     '''Each coordinate twice: where it is positive and where it is negative.'''
    ...     both = torch.eye(model.width(site)).repeat(2, 1)
    ...     both[len(both) // 2 :] *= -1
    ...     return Dictionary.of(lambda x: (x @ both.T).relu(), both, name="signs")
    >>> "signs" in basis_names()
    True
    >>> _ = _BUILDERS.pop("signs")
    """

    def register(builder: Builder) -> Builder:
        if name in _BUILDERS:
            raise InvalidInputError(
                f"register_basis({name!r}): {_BUILDERS[name].__module__} has registered this name. Choose another."
            )
        _BUILDERS[name] = builder
        return builder

    return register


def basis_names() -> tuple[str, ...]:
    """The names that are registered, in alphabetical order."""
    _import_kinds()
    return tuple(sorted(_BUILDERS))


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
    if name not in basis_names():
        raise UnknownNameError(f"There is no basis {name!r}. {did_you_mean(name, basis_names())}")
    builder, where = _BUILDERS[name], model.resolve(site)
    signature = inspect.signature(builder)
    try:
        signature.bind(model, where, **options)
    except TypeError as error:
        takes = ", ".join(list(signature.parameters)[2:]) or "no options"
        raise InvalidInputError(f"basis({name!r}, model, {str(where)!r}): {error}. It takes {takes}.") from None
    basis = builder(model, where, **options)
    return placed_at(basis, model, basis.site or where)


@functools.cache
def _import_kinds() -> None:
    from workbench.bases import kinds

    for module in pkgutil.iter_modules(kinds.__path__):
        importlib.import_module(f"{kinds.__name__}.{module.name}")
