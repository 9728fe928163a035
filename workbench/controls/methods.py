"""Methods that a study compares: their names, the information that they use, and how each makes its result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import require_known
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
        needs: names of what the study must have read; a study that has not leaves the method out, and says so.
        regime: the class of information that it uses, in studies that tell such classes apart; None elsewhere.
    """

    name: str
    information: str
    run: Callable[[Study], Result]
    role: Role = "subject"
    compared_with: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    regime: str | None = None


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


def possible(
    methods: Iterable[Method[Study, Result]], known: Iterable[str], missing: Mapping[str, str]
) -> tuple[tuple[Method[Study, Result], ...], tuple[str, ...]]:
    """The methods that have what they need, and why each other one is left out.

    Args:
        methods: methods by what they are compared with; those that are left out are compared with none.
        known: everything that a method of this kind of study may need.
        missing: what this study does not have, with the reason in words.

    Raises:
        UnknownNameError: if a method needs something unknown.
    """
    methods, known = tuple(methods), tuple(known)
    reasons: dict[str, str] = {}
    for method in methods:
        for need in method.needs:
            require_known(f"need of the method {method.name!r}:", need, known)
        lacking = [missing[need] for need in method.needs if need in missing]
        if lacking:
            reasons[method.name] = f"{method.name} is left out: {lacking[0]}."
    kept = tuple(
        replace(method, compared_with=tuple(name for name in method.compared_with if name not in reasons))
        for method in methods
        if method.name not in reasons
    )
    return kept, tuple(reasons.values())
