"""Methods that a study compares: their names, the information that they use, and how each makes its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from workbench.core.errors import InvalidInputError, UnknownNameError, did_you_mean

Role = Literal["subject", "start", "control", "rival", "bound"]
"""What a method is in a study: what is studied; what it starts from; random; a simpler or better-informed way to the
same end; one that sees what a user does not have, and is a limit rather than a way."""

Study = TypeVar("Study", contravariant=True)
Result = TypeVar("Result", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Method(Generic[Study, Result]):
    """One way to do what a study is about; its report reads name, information and role from here.

    Attributes:
        name: for people.
        information: what the method is allowed to use, in words.
        run: makes the result from what the study has read.
        role: what it is in the study.
        compared_with: names of the methods whose results are subtracted from its own.
    """

    name: str
    information: str
    run: Callable[[Study], Result]
    role: Role = "subject"
    compared_with: tuple[str, ...] = ()


class Methods(Generic[Study, Result]):
    """Methods by name, in order; the registry of a study."""

    def __init__(self, methods: Iterable[Method[Study, Result]] = ()) -> None:
        self._by_name: dict[str, Method[Study, Result]] = {}
        for method in methods:
            self.register(method)

    def register(self, method: Method[Study, Result]) -> Method[Study, Result]:
        """Adds a method at the end.

        Raises:
            InvalidInputError: if there is one of this name.
        """
        if method.name in self._by_name:
            raise InvalidInputError(
                f"register({method.name!r}): there is a method of this name already, among {list(self._by_name)}. "
                "Name it differently."
            )
        self._by_name[method.name] = method
        return method

    def __getitem__(self, name: str) -> Method[Study, Result]:
        if name not in self._by_name:
            raise UnknownNameError(f"method {name!r}: {did_you_mean(name, tuple(self._by_name))}")
        return self._by_name[name]

    def __iter__(self) -> Iterator[Method[Study, Result]]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods, in order."""
        return tuple(self._by_name)

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Each method with each that it is compared with.

        Raises:
            UnknownNameError: if one of those is not there.
        """
        return tuple((method.name, self[other].name) for method in self for other in method.compared_with)
