"""What the annotations of a function stand for, with the names that only type checkers import."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
import types
import typing
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_OURS = ("workbench", "circuits", "experiments")
"""Packages that may be imported to learn what a name is; of others, only what is loaded already is known."""


def annotations_of(fn: Callable[..., object], signature: inspect.Signature) -> dict[str, object]:
    """The annotation of each parameter; Any where there is none, or where it can't be resolved."""
    inner = inspect.unwrap(fn)
    names: Mapping[str, object] = getattr(inner, "__globals__", {})
    known = ChainMap(dict(names), typing.cast("dict[str, object]", _TypeOnly(inner.__module__)))
    return {name: _resolved(parameter.annotation, known) for name, parameter in signature.parameters.items()}


def fields_of(annotation: object) -> dict[str, object] | None:
    """The fields of a `TypedDict` that keyword arguments are declared as, by `Unpack`; None for other annotations."""
    declared = typing.get_args(annotation)
    if not declared or not typing.is_typeddict(declared[0]):
        return None
    return dict(typing.get_type_hints(declared[0]))


def _resolved(annotation: object, names: Mapping[str, object]) -> object:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    holder = types.SimpleNamespace(__annotations__={"x": annotation})
    try:
        return typing.get_type_hints(holder, {}, typing.cast("dict[str, object]", names))["x"]
    except (NameError, AttributeError, TypeError):
        return Any


class _ByName(type):
    """A class of a package that is not loaded: its instances are those of a class of this name."""

    def __instancecheck__(cls, value: object) -> bool:
        return any(kind.__name__ == cls.__name__ for kind in type(value).__mro__)


class _TypeOnly(Mapping[str, object]):
    """The names that a module imports under `if TYPE_CHECKING:`, imported when they are asked for."""

    def __init__(self, module: str) -> None:
        self._from = _type_only_imports(module)

    def __getitem__(self, name: str) -> object:
        module, attribute = self._from[name]
        if module.partition(".")[0] in _OURS:
            return getattr(importlib.import_module(module), attribute)
        loaded = sys.modules.get(module)
        if not attribute:
            return sys.modules[module]
        # A lazy package would load what it is asked for; whether a value is an instance is known by the name.
        return vars(loaded)[attribute] if attribute in vars(loaded or object) else _ByName(attribute, (), {})

    def __iter__(self) -> Iterator[str]:
        return iter(self._from)

    def __len__(self) -> int:
        return len(self._from)


@functools.cache
def _type_only_imports(module: str) -> dict[str, tuple[str, str]]:
    """The names that a module imports for type checkers alone: from which module, and what they are called there."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError):
        # A function typed into a session has no source.
        return {}
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    found: dict[str, tuple[str, str]] = {}
    for node in (node for block in blocks for node in block.body):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
    return found
