"""Named parts of one kind, such as ops, SAE architectures or judges; a new part registers itself in its own file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from workbench.core.errors import InvalidInputError, UnknownNameError, did_you_mean

T = TypeVar("T")
P = TypeVar("P")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to parts that refuses duplicates.

    Names come in the order of registration, those of a package in alphabetical order, since its modules may be imported
    in any order.

    Errors call one part a `kind`, such as "SAE architecture". All modules of `package` are imported before the first
    look-up, so that a new file in it needs no entry elsewhere.

    >>> COLOURS: Registry[int] = Registry("colour")
    >>> COLOURS.add("red", 0xFF0000)
    16711680
    >>> COLOURS["red"], list(COLOURS), "blue" in COLOURS
    (16711680, ['red'], False)
    >>> COLOURS["rad"]
    Traceback (most recent call last):
    workbench.core.errors.UnknownNameError: There is no colour 'rad'. Did you mean red?
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind, self._undiscovered, self._is_sorted = kind, package, package is not None
        self._parts: dict[str, T] = {}

    def add(self, name: str, part: T) -> T:
        """Registers a part and returns it.

        A class or function may replace an older version of itself, as when a notebook cell runs a second time.

        Raises:
            InvalidInputError: if the name is empty or belongs to another part.
        """
        if not name:
            raise InvalidInputError(f"A {self.kind} needs a name, and got an empty one. Give it one.")
        if name in self._parts and _definition(self._parts[name]) != _definition(part):
            raise InvalidInputError(
                f"{name!r} is already the name of a {self.kind}: {self._parts[name]!r}. Choose another name, or "
                f"remove({name!r}) first."
            )
        self._parts[name] = part
        return part

    def register(self, name: str) -> Callable[[P], P]:
        """Decorator form of `add`; the type of the decorated class or function is kept.

        >>> RULES: Registry[Callable[[int], bool]] = Registry("rule")
        >>> @RULES.register("even")
        ... def is_even(n: int) -> bool:
        ...     return n % 2 == 0
        >>> RULES["even"](4)
        True
        """

        def keep(part: P) -> P:
            self.add(name, part)  # pyright: ignore[reportArgumentType]  # P is a T that keeps its own type
            return part

        return keep

    def remove(self, name: str) -> T:
        """Takes a part out and returns it.

        Raises:
            UnknownNameError: if there is no such part.
        """
        part = self[name]
        del self._parts[name]
        return part

    def check(self, *names: str) -> None:
        """Refuses names that are not registered.

        Raises:
            UnknownNameError: for the first of them, with the closest names.
        """
        for name in names:
            self[name]

    def __getitem__(self, name: str) -> T:
        self._discover()
        if name not in self._parts:
            raise UnknownNameError(f"There is no {self.kind} {name!r}. {did_you_mean(str(name), self._parts)}")
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._parts) if self._is_sorted else self._parts)

    def __len__(self) -> int:
        self._discover()
        return len(self._parts)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}: {', '.join(self)})"

    def _discover(self) -> None:
        if self._undiscovered is not None:
            path, self._undiscovered = (
                self._undiscovered,
                None,
            )  # cleared first: the modules may look names up themselves
            package = importlib.import_module(path)
            for module in pkgutil.iter_modules(package.__path__, f"{path}."):
                importlib.import_module(module.name)


def _definition(part: object) -> object:
    """Where a class or function is defined; anything else is only itself."""
    name = getattr(part, "__qualname__", None)
    return id(part) if name is None else (getattr(part, "__module__", None), name)
