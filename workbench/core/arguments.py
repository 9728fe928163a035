"""Arguments of the public surface, checked against their annotations: wrong ones are refused in words.

One decorator, `checked`, in place of a check by hand in every function. It looks at the kind of a value (a number, a
text, a tensor, a list of these); which numbers and shapes make sense is left to the function.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import AbstractArray
from torch import Tensor

from workbench.core.errors import InvalidInputError, did_you_mean

T = TypeVar("T")
Check = Callable[[object], object]
"""Gives the value as the function is to see it, or `_WRONG`."""

_WRONG = object()


class _Model(typing.Protocol):
    hf: object


_BY_NAME = {"model": _Model}
"""What parameters of these names hold where they are declared as Any, since other libraries' objects fit as well."""
_LISTS = (Sequence, Iterable, typing.get_origin(typing.Collection[int]), list, tuple, set, frozenset)


def shown(value: object) -> str:
    """A value in an error: short, and a tensor by its shape and type.

    >>> shown(torch.zeros(2, 3)), shown("hot"), shown([1, 2])
    ('tensor of shape (2, 3), torch.float32', "'hot'", '[1, 2]')
    """
    if isinstance(value, Tensor):
        kinds = {"sparse": value.layout != torch.strided, "meta": value.is_meta, "quantised": value.is_quantized}
        kind = "".join(f"{name} " for name, applies in kinds.items() if applies)
        return f"{kind}tensor of shape {tuple(value.shape)}, {value.dtype}"
    return reprlib.repr(value)


def checked(target: T) -> T:
    """Checks the arguments of a function, or of the constructor and the public methods of a class, at every call.

    Numpy numbers and 0-d tensors become Python numbers, lists become tuples where those are declared. True is no
    number, and a text is no list of texts. What is not declared, or can't be resolved, is not checked; missing and
    unknown arguments are left to Python.

    Raises:
        InvalidInputError: when a wrong argument is given.
    """
    if not isinstance(target, type):
        return typing.cast("T", _checked(typing.cast("Callable[..., object]", target), target.__name__))  # type: ignore[attr-defined]
    for name, member in list(vars(target).items()):
        if name.startswith("_") and name != "__init__":
            continue
        label = target.__name__ if name == "__init__" else name
        if isinstance(member, (classmethod, staticmethod)):
            setattr(target, name, type(member)(_checked(member.__func__, f"{target.__name__}.{label}")))
        elif isinstance(member, types.FunctionType):
            setattr(target, name, _checked(member, label))
    return target


def _checked(fn: Callable[..., object], label: str) -> Callable[..., object]:
    signature = inspect.signature(fn)
    checks: dict[str, tuple[Check, object]] | None = None

    @functools.wraps(fn)
    def call(*args: object, **kwargs: object) -> object:
        nonlocal checks
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return fn(*args, **kwargs)
        if checks is None:
            checks = _checks_of(fn, signature)
        for name, value in given.arguments.items():
            if name in checks:
                check, annotation = checks[name]
                new = check(value)
                if new is _WRONG:
                    raise InvalidInputError(f"{label}({name}={shown(value)}): {_advice(annotation, value)}")
                given.arguments[name] = new
        return fn(*given.args, **given.kwargs)

    return call


def _checks_of(fn: Callable[..., object], signature: inspect.Signature) -> dict[str, tuple[Check, object]]:
    names = getattr(inspect.unwrap(fn), "__globals__", {})
    found: dict[str, tuple[Check, object]] = {}
    for name, parameter in signature.parameters.items():
        annotation = _resolved(parameter.annotation, names)
        if annotation in (Any, object) and name in _BY_NAME:
            annotation = _BY_NAME[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            annotation = tuple[annotation, ...]
        check = _of_filters(annotation, names) if parameter.kind is parameter.VAR_KEYWORD else _check_of(annotation)
        if check is not None:
            found[name] = check, annotation
    return found


def _resolved(annotation: object, names: Mapping[str, object]) -> object:
    """The annotation behind a string; Any where its names exist for the type checker only."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"x": annotation}), dict(names))["x"]
    except (NameError, AttributeError, TypeError):
        return Any


def _of_filters(annotation: object, names: Mapping[str, object]) -> Check | None:
    """The check of keyword arguments that are declared as `Unpack[SomeTypedDict]`."""
    declared = typing.get_args(annotation)
    if not declared or not typing.is_typeddict(declared[0]):
        return None
    checks = {name: _check_of(_resolved(part, names)) for name, part in typing.get_type_hints(declared[0]).items()}

    def check(values: object) -> object:
        given = typing.cast("dict[str, object]", values)
        new = {name: (checks.get(name) or _same)(value) for name, value in given.items()}
        return _WRONG if any(value is _WRONG for value in new.values()) else new

    return check


def _same(value: object) -> object:
    return value


def _check_of(annotation: object) -> Check | None:
    """The check of one annotation; None if every value passes."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or origin is typing.Annotated:
        return _check_of(parts[0]) if parts else None
    if origin in (typing.Union, types.UnionType):
        has_path = any(isinstance(part, type) and issubclass(part, PurePath) for part in parts)
        return _any_of([_path if has_path and part is str else _check_of(part) for part in parts])
    if origin is Literal:
        return lambda value: value if any(type(value) is type(one) and value == one for one in parts) else _WRONG
    if annotation in (None, type(None)):
        return _is(type(None))
    simple = {bool: _flag, int: whole, float: real, Tensor: _tensor}
    if annotation in simple:
        return simple[annotation]
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return functools.partial(_array, kind=annotation)
    kind = origin or annotation
    if kind in _LISTS:
        return _list_of(kind, parts)
    if kind is Callable:
        return lambda value: value if callable(value) else _WRONG
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return lambda value: _WRONG if isinstance(value, str) else _path(value)
    if isinstance(kind, type) and getattr(kind, "_is_protocol", False):
        return _like(kind)
    # Arrays of numpy are made of anything that holds numbers.
    return _is(kind) if isinstance(kind, type) and kind is not object and kind.__module__ != "numpy" else None


def _like(kind: type) -> Check:
    """The check of a protocol: every public member is there."""
    wanted = [name for name in (*vars(kind), *getattr(kind, "__annotations__", {})) if not name.startswith("_")]
    return lambda value: value if all(hasattr(value, name) for name in wanted) else _WRONG


def _path(value: object) -> object:
    """A path that an operating system can take: no half characters, no zero byte."""
    if not isinstance(value, (str, os.PathLike)):
        return _WRONG
    try:
        text = os.fspath(value)
        return value if isinstance(text, str) and b"\0" not in os.fsencode(text) else _WRONG
    except (TypeError, UnicodeEncodeError):
        return _WRONG


def _is(kind: type) -> Check:
    return lambda value: value if isinstance(value, kind) else _WRONG


def _flag(value: object) -> object:
    return bool(value) if type(value).__name__ in ("bool", "bool_") and not isinstance(value, Tensor) else _WRONG


def whole(value: object) -> object:
    """A whole number as an int."""
    if isinstance(value, Tensor):
        plain = value.ndim == 0 and not value.is_meta and not value.is_floating_point() and not value.is_complex()
        value = value.item() if plain else None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return _WRONG
    number = int(value)
    return number if -(2**63) <= number < 2**63 else _WRONG


def real(value: object) -> object:
    """A number that is not nan, as an int or a float."""
    if isinstance(value, Tensor):
        # What is trained stays a tensor.
        value = value.item() if value.ndim == 0 and not value.is_meta and not value.requires_grad else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return _WRONG
    try:
        number = float(value)
    except OverflowError:
        return _WRONG
    if math.isnan(number):
        return _WRONG
    return value if isinstance(value, int) and abs(number) < 2**63 else number


def _tensor(value: object) -> object:
    """A tensor whose numbers can be read: not sparse, nested or quantised, and not on the meta device."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
        return _WRONG
    return value if not value.is_meta and not value.is_quantized else _WRONG


def _array(value: object, kind: type[AbstractArray]) -> object:
    if not isinstance(value, Tensor) or _tensor(value) is _WRONG or value.is_complex():
        return _WRONG
    for is_one, word in ((value.dtype == torch.bool, "bool"), (value.is_floating_point(), "float")):
        if is_one:
            return value if any(word in name for name in kind.dtypes) else _WRONG
    # Whole numbers do for real ones.
    return value if any("int" in name or "float" in name for name in kind.dtypes) else _WRONG


def _any_of(checks: Sequence[Check | None]) -> Check | None:
    known = [check for check in checks if check is not None]
    if len(known) < len(checks):
        return None

    def check(value: object) -> object:
        found = [new for one in known if (new := one(value)) is not _WRONG]
        # A tensor of several numbers stays a tensor where a number is declared as well.
        number = next((new for new in found if isinstance(value, Tensor) and not isinstance(new, Tensor)), None)
        return number if number is not None else next((new for new in found if new is value), [*found, _WRONG][0])

    return check


def _list_of(kind: object, parts: tuple[object, ...]) -> Check:
    of_each = kind is not tuple or parts[1:] == (...,)
    element = _check_of(parts[0]) if parts and of_each else None
    unordered = kind in (Sequence, list, tuple)

    def check(value: object) -> object:
        if isinstance(value, (Tensor, np.ndarray)):
            unreadable = isinstance(value, Tensor) and _tensor(value) is _WRONG
            if unreadable or parts[:1] not in ((int,), (float,)) or value.ndim != 1:
                return _WRONG
            value = value.tolist()
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            return _WRONG
        if unordered and not isinstance(value, Sequence):
            return _WRONG
        if element is not None and isinstance(value, (list, tuple)):
            new = [element(part) for part in value]
            if any(part is _WRONG for part in new):
                return _WRONG
            if any(a is not b for a, b in zip(new, value, strict=True)):
                value = type(value)(new) if type(value) in (list, tuple) else new
        return tuple(value) if kind is tuple and isinstance(value, list) else value

    return check


def _advice(annotation: object, value: object) -> str:
    """What the value is and what to give instead."""
    words = list(dict.fromkeys(_words(annotation)))
    known = [part for part in _literals(annotation) if isinstance(part, str)]
    close = f" {did_you_mean(value, known)}" if isinstance(value, str) and known else ""
    got = "nan" if isinstance(value, float) and math.isnan(value) else type(value).__name__
    if isinstance(value, str) and any(word.startswith("a list of") for word in words):
        got = "one text"
    return f"got {got}; give {' or '.join(words)}.{close}"


def _literals(annotation: object) -> list[object]:
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [one for part in typing.get_args(annotation) for one in _literals(part)]


def _words(annotation: object) -> list[str]:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return [word for part in parts for word in _words(part)]
    if origin is Literal:
        return [repr(part) for part in parts]
    plain = {
        int: "a whole number of at most 64 bits", float: "a number that is not nan", str: "a text",
        bool: "True or False", type(None): "None", Tensor: "a dense tensor", Any: "any value",
    }  # fmt: skip
    if annotation in plain:
        return [plain[annotation]]
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        numbers_of = "booleans" if annotation.dtypes[0] == "bool" else "real numbers"
        if not any("float" in name for name in annotation.dtypes) and annotation.dtypes[0] != "bool":
            numbers_of = "whole numbers"
        return [f"a dense tensor of {numbers_of} ({annotation.dim_str.strip() or 'one number'})"]
    kind = origin or annotation
    if kind in _LISTS:
        inner = " or ".join(dict.fromkeys(_words(parts[0]))) if parts else "values"
        return [f"a list of values, each {inner}"]
    if kind is Callable:
        return ["a function"]
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return ["a dict"]
    name = getattr(kind, "__name__", str(kind)).strip("_").removesuffix("Like")
    return [f"{'an' if name[0] in 'AEIO' or name.startswith('SAE') else 'a'} {name}"]
