"""The one reader of JSON text, and what is said of a file whose content is wrong."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

from workbench.core.errors import CallError, CorruptFileError, WorkbenchError

T = TypeVar("T")

if TYPE_CHECKING:
    Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None
else:  # beartype, which checks annotations in the tests, knows no recursive types
    Json = object

Record: TypeAlias = dict[str, Any]
"""Values of several types by name: a row of a table, settings of a report, the config of another library. Whoever reads
a value knows its type; no checker can."""

MAX_JSON_DEPTH = 64
"""Deeper nesting is refused; nothing that is written here has more than about ten levels."""

MAX_INTEGER_DIGITS = 20
"""Of an integer in JSON: enough for 64 bits."""

WRITE_AGAIN = "Delete it and run the step that writes it."


def parse_json(
    raw: str | bytes, where: str, kind: type[T] = object, *, foreign: bool = False, remedy: str = WRITE_AGAIN
) -> T:
    """The value of JSON text in UTF-8; every reader of JSON in this package comes here.

    Another program's text (`foreign`), such as a model's config, may hold NaN and infinities, integers of any size, and
    a key twice. Errors name the place `where` and end with `remedy`.

    Raises:
        CorruptFileError: if it is not JSON, is nested deeper than `MAX_JSON_DEPTH`, or is not of the type `kind`.

    >>> parse_json('{"a": [1, 2.5]}', "here", dict)
    {'a': [1, 2.5]}
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
        value = json.loads(text) if foreign else _STRICT.decode(text)
        if _is_deep(value):
            raise RecursionError
    except RecursionError:
        problem = f"it is nested more than {MAX_JSON_DEPTH} levels deep"
        raise CorruptFileError(f"{where} is not JSON that can be used ({problem}). {remedy}") from None
    except ValueError as error:
        raise CorruptFileError(f"{where} is not JSON ({str(error).partition(';')[0]}). {remedy}") from None
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else f"a {kind.__name__}"
        raise CorruptFileError(f"{where} holds a {type(value).__name__}, not {wanted}. {remedy}")
    return value


@contextlib.contextmanager
def content_of(what: str | os.PathLike[str], remedy: str = WRITE_AGAIN, *others: type[Exception]) -> Iterator[None]:
    """Turns what goes wrong with a file's content inside the block into CorruptFileError.

    For the few lines that take values out of a file: there a missing key or a value of another type is the file's
    fault. `others` are the errors of the library that reads the file.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, *others) as error:
        if isinstance(error, WorkbenchError) and not isinstance(error, CallError):
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")
        raise CorruptFileError(f"{os.fspath(what)} can't be read ({problem}). {remedy}") from error


def _is_deep(value: object) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        inside = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in inside if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _each_key_once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    by_name = dict(pairs)
    if len(by_name) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} occurs twice")
    return by_name


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits[:30]} is too large for a float")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_STRICT = json.JSONDecoder(
    object_pairs_hook=_each_key_once, parse_int=_integer, parse_float=_finite, parse_constant=_no_constant
)
