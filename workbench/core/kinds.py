"""Which values an annotation allows, and in words which it does not.

A check gives the value as the function is to see it: Numpy numbers as Python's, lists as tuples.
"""

from __future__ import annotations

import functools
import math
import numbers
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard, TypeVar

import numpy as np
from jaxtyping import AbstractArray

from workbench.core.errors import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

Check = Callable[[object], object]
"""Gives the value as the function is to see it, or `WRONG`."""

WRONG = object()
_LISTS = (Sequence, Iterable, typing.get_origin(typing.Collection[int]), list, tuple, set, frozenset)


def shown(value: object) -> str:
    """A value in an error: short, and a tensor by its shape and type.

    >>> import torch
    >>> shown(torch.zeros(2, 3)), shown("hot"), shown([1, 2])
    ('tensor of shape (2, 3), torch.float32', "'hot'", '[1, 2]')
    """
    if is_tensor(value):
        kinds = {"sparse": not _is_strided(value), "meta": value.is_meta, "quantised": value.is_quantized}
        kind = "".join(f"{name} " for name, applies in kinds.items() if applies)
        return f"{kind}tensor of shape {tuple(value.shape)}, {value.dtype}"
    return reprlib.repr(value)


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor, without an import of torch: where nobody has imported it, there are none."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def _is_tensor_type(annotation: object) -> bool:
    return "torch" in sys.modules and annotation is sys.modules["torch"].Tensor


def _is_strided(value: Tensor) -> bool:
    return str(value.layout) == "torch.strided"


def check_of(annotation: object) -> Check | None:
    """The check of one annotation; None if every value passes."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or origin is typing.Annotated:
        return check_of(parts[0]) if parts else None
    if isinstance(annotation, TypeVar):
        return check_of(annotation.__bound__ or Any)
    if origin in (typing.Union, types.UnionType):
        has_path = any(isinstance(part, type) and issubclass(part, PurePath) for part in parts)
        return _any_of([_path if has_path and part is str else check_of(part) for part in parts])
    if origin is Literal:
        return lambda value: value if any(type(value) is type(one) and value == one for one in parts) else WRONG
    if annotation in (None, type(None)):
        return _is(type(None))
    simple = {bool: _flag, int: whole, float: real}
    if annotation in simple:
        return simple[annotation]
    if _is_tensor_type(annotation):
        return _tensor
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return functools.partial(_numpy if annotation.array_type is np.ndarray else _array, kind=annotation)
    kind = origin or annotation
    if kind is tuple and parts and parts[-1] is not ...:
        return _fixed(parts)
    if kind in _LISTS:
        return _list_of(kind, parts)
    if isinstance(kind, type) and issubclass(kind, Mapping) and len(parts) == 2:
        return _dict_of(kind, parts)
    if kind is Callable:
        return lambda value: value if callable(value) else WRONG
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return lambda value: WRONG if isinstance(value, str) else _path(value)
    if isinstance(kind, type) and getattr(kind, "_is_protocol", False):
        return _like(kind)
    if kind is np.ndarray:
        return _numpy
    return _is(kind) if isinstance(kind, type) and kind is not object else None


class _NoMembers(Protocol):
    __annotations__: dict[str, object] = {}


def _like(kind: type) -> Check:
    """The check of a protocol: every public member is there."""
    members = {*vars(kind), *getattr(kind, "__annotations__", {})} - set(vars(_NoMembers))
    wanted = [name for name in sorted(members) if name.startswith("__") or not name.startswith("_")]
    return lambda value: value if all(hasattr(value, name) for name in wanted) else WRONG


def _path(value: object) -> object:
    """A path that an operating system can take: no half characters, no zero byte."""
    if not isinstance(value, (str, os.PathLike)):
        return WRONG
    try:
        text = os.fspath(value)
        return value if isinstance(text, str) and b"\0" not in os.fsencode(text) else WRONG
    except (TypeError, UnicodeEncodeError):
        return WRONG


def _is(kind: type) -> Check:
    return lambda value: value if isinstance(value, kind) else WRONG


def _flag(value: object) -> object:
    return bool(value) if type(value).__name__ in ("bool", "bool_") and not is_tensor(value) else WRONG


def whole(value: object) -> object:
    """A whole number as an int."""
    if is_tensor(value):
        plain = value.ndim == 0 and not value.is_meta and not value.is_floating_point() and not value.is_complex()
        value = value.item() if plain else None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return WRONG
    number = int(value)
    return number if -(2**63) <= number < 2**63 else WRONG


def real(value: object) -> object:
    """A number that is not nan, as an int or a float."""
    if is_tensor(value):
        # What is trained stays a tensor.
        value = value.item() if value.ndim == 0 and not value.is_meta and not value.requires_grad else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return WRONG
    try:
        number = float(value)
    except OverflowError:
        return WRONG
    if math.isnan(number):
        return WRONG
    return value if isinstance(value, int) and abs(number) < 2**63 else number


def _tensor(value: object) -> object:
    """A tensor whose numbers can be read: not sparse, nested or quantised, and not on the meta device."""
    if not is_tensor(value) or not _is_strided(value) or value.is_nested:
        return WRONG
    return value if not value.is_meta and not value.is_quantized else WRONG


def _numpy(value: object, kind: type[AbstractArray] | None = None) -> object:
    """An array of numpy; lists of numbers and dense tensors become one."""
    if is_tensor(value) and _tensor(value) is WRONG:
        return WRONG
    try:
        array = np.asarray(value.detach().cpu() if is_tensor(value) else value)
    except (ValueError, TypeError):
        # Rows of different lengths, or a type that numpy does not have.
        return WRONG
    words = {"b": "bool", "i": "int", "u": "int", "f": "float"}
    word = words.get(array.dtype.kind, "none")
    dtypes = ("bool", "int", "float") if kind is None else kind.dtypes
    allowed = any(word in name or (word == "int" and "float" in name) for name in dtypes)
    return array if array.ndim and allowed else WRONG


def _array(value: object, kind: type[AbstractArray]) -> object:
    if not is_tensor(value) or _tensor(value) is WRONG or value.is_complex():
        return WRONG
    for is_one, word in ((str(value.dtype) == "torch.bool", "bool"), (value.is_floating_point(), "float")):
        if is_one:
            return value if any(word in name for name in kind.dtypes) else WRONG
    # Whole numbers do for real ones.
    return value if any("int" in name or "float" in name for name in kind.dtypes) else WRONG


def _any_of(checks: Sequence[Check | None]) -> Check | None:
    known = [check for check in checks if check is not None]
    if len(known) < len(checks):
        return None

    def check(value: object) -> object:
        found = [new for one in known if (new := one(value)) is not WRONG]
        # A tensor of several numbers stays a tensor where a number is declared as well.
        number = next((new for new in found if is_tensor(value) and not is_tensor(new)), None)
        return number if number is not None else next((new for new in found if new is value), [*found, WRONG][0])

    return check


def _fixed(parts: tuple[object, ...]) -> Check:
    """The check of a tuple with a value of its own kind at each place."""
    checks = [check_of(part) or _same for part in parts]

    def check(value: object) -> object:
        if not isinstance(value, (list, tuple)) or len(value) != len(checks):
            return WRONG
        new = tuple(one(part) for one, part in zip(checks, value, strict=True))
        return WRONG if any(part is WRONG for part in new) else new

    return check


def _dict_of(kind: type, parts: tuple[object, ...]) -> Check:
    """The check of a dict by its keys and values."""
    checks = [check_of(part) or _same for part in parts]

    def check(value: object) -> object:
        if not isinstance(value, kind):
            return WRONG
        if not isinstance(value, dict):
            return value
        names, values = [checks[0](name) for name in value], [checks[1](part) for part in value.values()]
        if any(one is WRONG for one in (*names, *values)):
            return WRONG
        same = all(a is b for a, b in zip((*names, *values), (*value, *value.values()), strict=True))
        return value if same else dict(zip(names, values, strict=True))

    return check


def _same(value: object) -> object:
    return value


def _list_of(kind: object, parts: tuple[object, ...]) -> Check:
    element = check_of(parts[0]) if parts else None
    unordered, as_set = kind in (Sequence, list, tuple), kind in (set, frozenset)

    def check(value: object) -> object:
        if is_tensor(value) or isinstance(value, np.ndarray):
            unreadable = is_tensor(value) and _tensor(value) is WRONG
            if unreadable or parts[:1] not in ((int,), (float,)) or value.ndim != 1:
                return WRONG
            value = value.tolist()
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            return WRONG
        if unordered and not isinstance(value, Sequence):
            return WRONG
        if element is not None and isinstance(value, (list, tuple)):
            new = [element(part) for part in value]
            if any(part is WRONG for part in new):
                return WRONG
            if any(a is not b for a, b in zip(new, value, strict=True)):
                value = type(value)(new) if type(value) in (list, tuple) else new
        if as_set and not isinstance(value, Set):
            return frozenset(value) if kind is frozenset else set(value)
        return tuple(value) if kind is tuple and isinstance(value, list) else value

    return check


def advice(annotation: object, value: object) -> str:
    """What the value is and what to give instead."""
    words = list(dict.fromkeys(_words(annotation)))
    return " ".join([f"got {_got(annotation, value)}; give {' or '.join(words)}.", *_hints(annotation, value)])


def _hints(annotation: object, value: object) -> list[str]:
    """What may have been meant."""
    known = [part for part in parts_of(annotation) if isinstance(part, str)]
    if isinstance(value, str) and known:
        return [did_you_mean(value, known)]
    if isinstance(hint := getattr(value, "how_to_use", None), str):
        return [hint]
    elements = [typing.get_args(part) for part in _lists(annotation)]
    if any(check_of(one[0]) is not None and not _refused(one[0], value) for one in elements if one):
        return ["Put it into a list: [...]."]
    one_by_one = isinstance(value, (list, tuple)) and value and not _refused(annotation, value[0])
    made = [hint for part in parts_of(annotation) if isinstance(hint := getattr(part, "how_to_make", None), str)]
    return [*(["Give one of them at a time."] if one_by_one else []), *dict.fromkeys(made)]


def _refused(annotation: object, value: object) -> bool:
    check = check_of(annotation)
    return check is not None and check(value) is WRONG


def _lists(annotation: object) -> list[object]:
    return [part for part in _alternatives(annotation) if (typing.get_origin(part) or part) in _LISTS]


def _got(annotation: object, value: object) -> str:
    """A value by its kind; in a list, the first one that is wrong."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, str) and _lists(annotation):
        return "one text"
    if isinstance(value, dict):
        kinds, items, got = [typing.get_args(part)[1] for part in _dicts(annotation)], value.items(), "dict"
    elif isinstance(value, (list, tuple)):
        kinds = [(*typing.get_args(part), Any)[0] for part in _lists(annotation)]
        items, got = enumerate(value), f"a list of {len(value)}"
    else:
        return type(value).__name__
    wrong = [(at, one) for at, one in items if len(kinds) == 1 and _refused(kinds[0], one)]
    return f"a {type(value).__name__} whose value at {wrong[0][0]!r} is {_got(Any, wrong[0][1])}" if wrong else got


def _dicts(annotation: object) -> list[object]:
    """The members that are a dict with declared keys and values."""
    return [part for part in _alternatives(annotation) if len(typing.get_args(part)) == 2
            and isinstance(kind := typing.get_origin(part), type) and issubclass(kind, Mapping)]  # fmt: skip


def _alternatives(annotation: object) -> tuple[object, ...]:
    """The members of a union, or the annotation alone."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def parts_of(annotation: object) -> list[object]:
    """An annotation, what it is made of, and so on; in place of a `Literal` its values."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return list(parts)
    return [annotation, *(one for part in parts for one in parts_of(part))]


def _words(annotation: object) -> list[str]:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return [word for part in parts for word in _words(part)]
    if origin is Literal:
        return [repr(part) for part in parts]
    plain = {
        int: "a whole number of at most 64 bits", float: "a number that is not nan", str: "a text",
        bool: "True or False", type(None): "None", Any: "any value",
    }  # fmt: skip
    if annotation in plain:
        return [plain[annotation]]
    if _is_tensor_type(annotation):
        return ["a dense tensor"]
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        numbers_of = "booleans" if annotation.dtypes[0] == "bool" else "real numbers"
        if not any("float" in name for name in annotation.dtypes) and annotation.dtypes[0] != "bool":
            numbers_of = "whole numbers"
        holder = "an array" if annotation.array_type is np.ndarray else "a dense tensor"
        return [f"{holder} of {numbers_of} ({annotation.dim_str.strip() or 'one number'})"]
    kind = origin or annotation
    if kind is tuple and parts and parts[-1] is not ...:
        return [f"a list of {len(parts)} values ({', '.join(' or '.join(_words(part)) for part in parts)})"]
    if kind in _LISTS:
        inner = " or ".join(dict.fromkeys(_words(parts[0]))) if parts else "values"
        return [f"a list of values, each {inner}"]
    if kind is Callable:
        return ["a function"]
    if isinstance(kind, type) and issubclass(kind, Mapping):
        of = [" or ".join(_words(part)) for part in parts]
        return [f"a dict of {of[0]} to {of[1]}" if len(of) == 2 else "a dict"]
    if isinstance(annotation, TypeVar):
        return _words(annotation.__bound__ or Any)
    name = getattr(kind, "__name__", str(kind)).strip("_").removesuffix("Like")
    return [f"{'an' if name[0] in 'AEIO' or name.startswith('SAE') else 'a'} {name}"]
