"""How objects show themselves on one line: short, and never the contents of a tensor or of a long list."""

from __future__ import annotations

import dataclasses
import enum
import unicodedata
from collections.abc import Iterable, Mapping, Set
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.core.kinds import is_tensor

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 300
"""Characters of a one-line repr."""
_ROOM, _ITEMS, _DEPTH = 72, 3, 2
"""Characters of a value inside it, items of a container, and containers in each other."""

_PICTURES = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡", "\u00a0": "⍽"}
# category Cf holds the joiners that Persian, Indic scripts and emoji need: they shape text and hide nothing
_KEPT_FORMATS = "\u200c\u200d"


def visible(text: str) -> str:
    """The text with every character that could hide or reorder shown as a sign or its code.

    Line ends, tabs, control characters, direction marks, zero-width spaces and halves of characters are replaced;
    letters of every script stay.

    >>> visible(chr(0x202e) + "a" + chr(10) + "b")
    '⟨U+202E⟩a⏎b'
    """
    return "".join(_visible_char(char) for char in text)


def _visible_char(char: str) -> str:
    if char in _PICTURES:
        return _PICTURES[char]
    if ord(char) < 32:
        return chr(0x2400 + ord(char))
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and char not in _KEPT_FORMATS:
        return f"⟨U+{ord(char):04X}⟩"
    return char


def clipped(text: str, room: int) -> str:
    """The text, cut to so many characters.

    >>> clipped("abcdef", 4)
    'abc…'
    """
    return text if len(text) <= room else text[: room - 1] + "…"


def first_few(items: Iterable[object], limit: int = 8, between: str = ", ") -> str:
    """The first items as a sentence lists them, with an ellipsis if there are more.

    >>> first_few(range(5), 3), first_few(("resid_post.1", "z.0"))
    ('0, 1, 2, …', 'resid_post.1, z.0')
    """
    listed = list(items)
    return between.join([*map(str, listed[:limit]), *(["…"] if len(listed) > limit else [])])


def brief(value: object, room: int = _ROOM) -> str:
    """A value on one line: a tensor by its shape and dtype, a container by its first items and their number.

    >>> import torch
    >>> brief(torch.zeros(2, 3)), brief(("a", "b", "c", "d")), brief({"a": 1})
    ('tensor[2, 3] float32', "('a', 'b', 'c', … 4 in all)", "{'a': 1}")
    """
    return clipped(_brief(value, _DEPTH), room)


def _brief(value: object, depth: int) -> str:
    if isinstance(value, str) and not isinstance(value, enum.Enum):
        return repr(clipped(value, _ROOM - 2))
    if isinstance(value, float) and not isinstance(value, np.generic):
        return repr(value) if len(repr(value)) <= 8 else f"{value:.6g}"
    is_plain = isinstance(value, bool | int | complex | PurePath | np.generic) or value is None
    if is_plain or _full_name(type(value)) in ("torch.dtype", "torch.device"):
        return clipped(str(value), _ROOM)
    if isinstance(value, enum.Enum):
        return repr(value.value)
    if is_tensor(value) or isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, Mapping):
        parts = (f"{_brief(key, 0)}: {_brief(item, depth - 1)}" for key, item in value.items())
        return _items(parts, len(value), "{}", depth)
    if isinstance(value, tuple | list | Set):
        ends = "()" if isinstance(value, tuple) else "[]" if isinstance(value, list) else "{}"
        return _items((_brief(item, depth - 1) for item in value), len(value), ends, depth)
    return _object(value, depth)


def _full_name(kind: type) -> str:
    """By name, because an import of torch takes a second, and a run folder needs none."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_module(value: object) -> bool:
    return any(_full_name(kind) == "torch.nn.modules.module.Module" for kind in type(value).__mro__)


def _array(value: Tensor | np.ndarray) -> str:
    kind = "tensor" if is_tensor(value) else "array"
    return f"{kind}{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _items(parts: Iterable[str], n: int, ends: str, depth: int) -> str:
    if depth < 0:
        return f"{ends[0]}{n}{ends[1]}" if n else ends
    shown = [part for _, part in zip(range(_ITEMS), parts, strict=False)]
    if n > len(shown):
        shown.append(f"… {n} in all")
    comma = "," if n == 1 and ends == "()" else ""
    return f"{ends[0]}{', '.join(shown)}{comma}{ends[1]}"


def _object(value: object, depth: int) -> str:
    name = type(value).__name__
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return getattr(value, "__qualname__", name)
    if isinstance(value, OneLine):
        whole = repr(value)
        return whole if depth >= 0 and len(whole) <= _ROOM else f"{name}(…)"
    if dataclasses.is_dataclass(value):
        own = type(value).__repr__
        if not hasattr(own, "__wrapped__") and own is not object.__repr__:
            return repr(value)  # one that is written by hand
        return f"{name}({fields_line(value, depth - 1)})" if depth > 0 else f"{name}(…)"
    if (shape := getattr(value, "shape", None)) is not None and isinstance(shape, tuple):
        return f"{name}{list(shape)}"
    is_ours = type(value).__module__.split(".")[0] in ("workbench", "circuits", "builtins", "datetime")
    plain = _is_module(value) or type(value).__repr__ is object.__repr__ or not is_ours
    return name if plain else clipped(repr(value), _ROOM)


def fields_line(value: Any, depth: int = _DEPTH, room: int = _ROOM) -> str:  # a dataclass of any kind
    """The fields of a dataclass as `name=value`; those at their default are left out where there is no room."""
    fields = [field for field in dataclasses.fields(value) if field.repr]
    line = ", ".join(f"{field.name}={_brief(getattr(value, field.name), depth)}" for field in fields)
    if len(line) <= room:
        return line
    changed = [field for field in fields if not _is_default(field, getattr(value, field.name))]
    return ", ".join(f"{field.name}={_brief(getattr(value, field.name), depth)}" for field in changed)


def _is_default(field: dataclasses.Field[object], value: object) -> bool:
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    if (
        default is dataclasses.MISSING
        or type(value) is not type(default)
        or (is_tensor(value) or isinstance(value, np.ndarray))
    ):
        return False
    return value is default or bool(value == default)


class OneLine:
    """Base of what shows itself on one line: its name, and in brackets its fields or what `_shown_line` says.

    Dataclasses that derive from it keep this repr, though `dataclass` would write one of its own.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            # in the class itself, where `dataclass`, which runs afterwards, leaves it alone
            cls.__repr__ = cls.__repr__

    def _shown_line(self) -> str:
        """What stands in the brackets of the repr."""
        if not dataclasses.is_dataclass(self):
            return ""
        return fields_line(self, room=LONGEST - len(type(self).__name__) - 2)

    def __repr__(self) -> str:
        line = f"{type(self).__name__}({self._shown_line()})".replace("\n", "⏎")
        return line if len(line) <= LONGEST else line[: LONGEST - 2] + "…)"
