"""Methods that a study compares: their names, the information that they use, and how each makes its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.registry import Registry

Role = Literal["subject", "variant", "start", "control", "rival", "bound"]
"""What a method is in a study.

subject: what is studied; variant: the same with a part exchanged; start: what it starts from; control: random; rival: a
simpler or better-informed way to the same end; bound: sees what a user does not have, and is a limit.
"""

Study = TypeVar("Study")
Result = TypeVar("Result")


@checked
@dataclass(frozen=True, kw_only=True)
class Method(OneLine, Generic[Study, Result]):
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


@checked
def methods_of(methods: Iterable[Method[Study, Result]]) -> Registry[Method[Study, Result]]:
    """Methods by name, in order.

    Raises:
        InvalidInputError: if two have the same name.
    """
    registry: Registry[Method[Study, Result]] = Registry("method")
    for method in methods:
        registry.add(method.name, method)
    return registry


@checked
def comparisons(methods: Registry[Method[Study, Result]]) -> tuple[tuple[str, str], ...]:
    """Names of each method and of each that it is compared with.

    Raises:
        UnknownNameError: if one of those is not there.
    """
    return tuple((name, methods[other].name) for name, method in methods.items() for other in method.compared_with)
