"""Dataclasses to strict JSON and back, and files that are either whole or not there."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import json
import math
import os
import stat
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TypeVar

from workbench.core.atomic import sync_folder as sync_folder
from workbench.core.atomic import write_atomic as write_atomic
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MissingFileError,
    UnknownConfigKeyError,
    did_you_mean,
)
from workbench.core.jsontext import Json, parse_json
from workbench.core.numbers import counted, number

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


@typing.runtime_checkable
class DataclassLike(typing.Protocol):
    """Any dataclass, or an instance of one."""

    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[typing.Any]]]


MAX_INLINE_VALUES = 200_000
"""Arrays above this many values are refused in JSON; they belong in a safetensors or Parquet file."""

MAX_JSON_BYTES = 2**29
"""Larger JSON files are refused: parsed, they take about ten times as much memory."""

_FLOAT_TAG = "$float"
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}


@typing.overload
def to_jsonable(value: DataclassInstance | Mapping[str, object]) -> dict[str, Json]: ...
@typing.overload
def to_jsonable(value: object) -> Json: ...
def to_jsonable(value: object) -> Json:
    """The value in JSON types: dict, list, str, int, float, bool, None.

    Dataclasses become dicts of their fields, tuples and sets lists, paths, dtypes and devices strings, numpy and torch
    values numbers or lists. JSON has no NaN: it becomes null, and infinities become `{"$float": "inf"}`.

    Raises:
        InvalidInputError: for a type that has no JSON form, or an array too large to be written as text.

    >>> to_jsonable((1, float("nan"), Path("a/b")))
    [1, None, 'a/b']
    """
    if value is None or isinstance(value, bool | str) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, enum.Enum):
        return to_jsonable(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _float_to_json(float(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_jsonable(item) for item in value), key=str)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    return _foreign_to_json(value)


def from_jsonable(cls: type[T] | types.GenericAlias | types.UnionType, data: object) -> T:
    """The value of type `cls` that `to_jsonable` turned into `data`; strict about types and keys.

    `cls` may be a dataclass, `X | None`, a union, `tuple[...]`, `list[...]`, `dict[...]`, `Literal`, `Path`, an enum or
    a plain type. In a union of dataclasses the field `kind` decides. null is NaN where a float is expected.

    Raises:
        UnknownConfigKeyError: for a key that the dataclass does not have.
        InvalidInputError: for a value of another type, or a missing key.

    >>> from_jsonable(tuple[int, ...], [1, 2])
    (1, 2)
    """
    return typing.cast("T", _decode(cls, data, _name_of(cls)))


def save_json(path: str | os.PathLike[str], value: object) -> Path:
    """Write `value` as JSON: after a crash the file is the old one or the new one, never a part. Returns the path."""
    text = json.dumps(to_jsonable(value), indent=1, ensure_ascii=False, allow_nan=False)
    return write_atomic(path, text + "\n")


def load_json(path: str | os.PathLike[str], kind: type[T] = object, *, foreign: bool = False) -> T:
    """The JSON content of a file; `kind` and `foreign` are those of `parse_json`.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: if it is not JSON, or not of that kind.
    """
    return parse_json(_read_bytes(path, MAX_JSON_BYTES), os.fspath(path), kind, foreign=foreign)


def json_lines(
    path: str | os.PathLike[str], *, only_whole: bool = False
) -> Iterator[dict[str, typing.Any]]:  # as the file has them
    """The objects of a file with one on each line; empty lines are left out.

    With `only_whole` a last line without a line feed, which a killed process leaves, is left out too.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: naming the first line that is not a JSON object.
    """
    lines = _read_bytes(path, MAX_JSON_BYTES).split(b"\n")
    for n, line in enumerate(lines[:-1] if only_whole else lines, 1):
        if line.strip():
            yield parse_json(line, f"{os.fspath(path)}, line {n},", dict, remedy="Correct or remove the line.")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, without the byte order mark that it may begin with; line ends become line feeds.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: if it is not UTF-8.
    """
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def not_utf8(path: str | os.PathLike[str], error: UnicodeDecodeError) -> CorruptFileError:
    """What to say of a text file in another encoding."""
    return CorruptFileError(f"{os.fspath(path)} is not UTF-8 text ({error}). Convert it, or leave it out.")


def _read_bytes(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """The bytes of a regular file: reading a pipe or a device might never end."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise InvalidInputError(f"{os.fspath(path)} is {kind}, not a file. Name a file.")
        if limit is not None and status.st_size > limit:
            raise CorruptFileError(
                f"{os.fspath(path)} has {counted(status.st_size, 'bytes')}; at most {number(limit)} are read. "
                "Name the right file."
            )
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"No file {path}. Check the path, or run the step that writes it.") from None


def _float_to_json(value: float) -> Json:
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else {_FLOAT_TAG: "inf" if value > 0 else "-inf"}


def _key(key: object) -> str:
    if isinstance(key, str | int | Path) and not isinstance(key, bool):
        return str(key)
    raise InvalidInputError(f"A {type(key).__name__} ({key!r}) can't be a JSON key. Use strings or integers.")


def _foreign_to_json(
    value: typing.Any,
) -> Json:  # of numpy or torch, recognised by what it offers: neither is imported here
    if (size := getattr(value, "size", None)) is not None and hasattr(value, "tolist"):
        count = value.numel() if callable(size) else int(size)
        if count > MAX_INLINE_VALUES:
            raise InvalidInputError(
                f"An array of {counted(count, 'values')} does not belong in JSON "
                f"(at most {number(MAX_INLINE_VALUES)}). Save it as safetensors or Parquet and keep its path."
            )
        return to_jsonable(value.tolist())
    if type(value).__module__.split(".")[0] in ("torch", "numpy") and type(value).__name__ in ("dtype", "device"):
        return str(value)
    raise InvalidInputError(
        f"A {type(value).__module__}.{type(value).__qualname__} has no JSON form. Use dataclasses, numbers, strings, "
        "paths, lists, tuples or dicts."
    )


def _name_of(cls: object) -> str:
    return getattr(cls, "__name__", str(cls))


def _wrong(where: str, expected: object, data: object) -> InvalidInputError:
    shown = repr(data) if len(repr(data)) <= 60 else repr(data)[:57] + "…"
    expected = expected if isinstance(expected, str) else _name_of(expected)
    return InvalidInputError(f"{where}: {shown} is a {type(data).__name__}; expected {expected}. Correct that value.")


def _decode(cls: object, data: object, where: str) -> object:
    origin = typing.get_origin(cls)
    if cls in (typing.Any, object):
        return data
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(cls), data, where)
    if origin is typing.Literal:
        if data in typing.get_args(cls):
            return data
        raise _wrong(where, " or ".join(map(repr, typing.get_args(cls))), data)
    if origin is typing.Annotated:
        return _decode(typing.get_args(cls)[0], data, where)
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        return _decode_dataclass(cls, data, where)
    if callable(kind := origin or cls) and kind in _CONTAINERS:
        return _decode_container(kind, typing.get_args(cls), data, where)
    return _decode_plain(cls, data, where)


def _decode_plain(cls: object, data: object, where: str) -> object:
    if cls is type(None) and data is None:
        return None
    if cls is float:
        return _decode_float(data, where)
    if (
        isinstance(cls, type)
        and cls in (bool, int, str)
        and isinstance(data, cls)
        and isinstance(data, bool) <= (cls is bool)
    ):
        return data
    if isinstance(cls, type) and issubclass(cls, PurePath) and isinstance(data, str):
        return Path(data)
    if isinstance(cls, type) and issubclass(cls, enum.Enum):
        try:
            return cls(data)
        except ValueError:
            raise _wrong(where, " or ".join(repr(member.value) for member in cls), data) from None
    raise _wrong(where, cls, data)


def _decode_float(data: object, where: str) -> float:
    if data is None:
        return math.nan
    if isinstance(data, dict) and data.keys() == {_FLOAT_TAG} and data[_FLOAT_TAG] in tuple(_INFINITIES):
        return _INFINITIES[data[_FLOAT_TAG]]
    if isinstance(data, float) or (type(data) is int and data.bit_length() <= 1023):
        return float(data)
    raise _wrong(where, float, data)


_CONTAINERS = (tuple, list, dict, set, frozenset, typing.get_origin(Mapping[str, int]))


def _decode_container(kind: Callable[..., object], args: tuple[object, ...], data: object, where: str) -> object:
    if kind in (dict, Mapping):
        if not isinstance(data, dict):
            raise _wrong(where, "an object", data)
        key_type, value_type = args or (str, object)
        return {
            (_decode_key(key, where) if key_type is int else key): _decode(value_type, item, f"{where}[{key!r}]")
            for key, item in data.items()
        }
    if not isinstance(data, list | tuple):
        raise _wrong(where, "a list", data)
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(data):
            raise _wrong(where, f"a list of {len(args)}", data)
        return tuple(_decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, data, strict=True)))
    item_type = args[0] if args else object
    if set(map(type, data)) <= _as_they_are(item_type):
        return kind(data)
    return kind(_decode(item_type, item, f"{where}[{i}]") for i, item in enumerate(data))


def _decode_key(key: str, where: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise _wrong(f"{where}: the key", "an integer", key) from None


@functools.cache
def _as_they_are(cls: object) -> frozenset[type]:
    """Types of values that decode to themselves: long lists of them need no look at each."""
    options = typing.get_args(cls) if typing.get_origin(cls) in (typing.Union, types.UnionType) else (cls,)
    plain = {str, int, float, bool, type(None)}
    return frozenset(plain & set(options)) if plain.issuperset(options) else frozenset()


def _decode_union(options: tuple[object, ...], data: object, where: str) -> object:
    if data is None and type(None) in options:
        return None
    if isinstance(data, dict) and data.keys() == {_FLOAT_TAG} and float in options:
        return _decode_float(data, where)
    if isinstance(data, dict) and "kind" in data:
        named = [cls for cls in options if isinstance(cls, type) and getattr(cls, "kind", None) == data["kind"]]
        if named:
            return _decode_dataclass(named[0], data, where)
    # an exact type first: 1 stays an int in `float | int`, and 1.0 a float in `int | float`
    ordered = sorted(options, key=lambda cls: cls is not type(data))
    first: InvalidInputError | UnknownConfigKeyError | None = None
    for cls in ordered:
        try:
            return _decode(cls, data, where)
        except (InvalidInputError, UnknownConfigKeyError) as error:
            # with one dataclass among the options, what is wrong inside it says more than "no option fits"
            first = error if dataclasses.is_dataclass(cls) and isinstance(data, dict) else first
    raise first or _wrong(where, " | ".join(map(_name_of, options)), data)


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    return typing.get_type_hints(cls, include_extras=True)


def _decode_dataclass(cls: type, data: object, where: str) -> object:
    if not isinstance(data, Mapping):
        raise _wrong(where, cls, data)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise UnknownConfigKeyError(f"{where} has no key {key!r}. {did_you_mean(str(key), fields)}")
    hints, values = _hints(cls), {}
    for name, field in fields.items():
        if name in data:
            decoded = _decode(hints[name], data[name], f"{where}.{name}")
            if field.init:
                values[name] = decoded
            elif decoded != field.default:
                raise _wrong(f"{where}.{name}", repr(field.default), data[name])
        elif field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InvalidInputError(f"{where} lacks the key {name!r}. Its keys: {', '.join(fields)}. Add it.")
    return cls(**values)
