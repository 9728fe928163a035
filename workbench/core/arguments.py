"""Arguments of the public surface, checked against their annotations: wrong ones are refused in words.

One decorator, `checked`, in place of a check by hand in every function. It looks at the kind of a value (a number, a
text, a tensor, a list of these); which numbers and shapes make sense is left to the function.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import TypeVar

from workbench.core.annotations import annotations_of, fields_of
from workbench.core.errors import CallError, InvalidInputError, did_you_mean
from workbench.core.kinds import WRONG, Check, advice, check_of, parts_of, shown

T = TypeVar("T")
_OPERATORS = ("__init__", "__add__")
"""Of the methods with underscores, those that are checked."""


class _Model(typing.Protocol):
    hf: object


_BY_NAME = {"model": _Model}
"""What parameters of these names hold where they are declared as Any, since other libraries' objects fit as well."""


def checked(target: T) -> T:
    """Checks the arguments of a function, or of the constructor and the public methods of a class, at every call.

    Numpy numbers and 0-d tensors become Python numbers, lists become tuples where those are declared. True is no
    number, and a text is no list of texts. What is not declared, or can't be resolved, is not checked.

    A class may help whoever gives something else in its place (`how_to_make`, a sentence), or gives it in place of
    something else (`how_to_use`).

    Raises:
        InvalidInputError: when a wrong argument is given.
        CallError: when an argument is missing or unknown.
    """
    if not isinstance(target, type):
        return typing.cast("T", _checked(typing.cast("Callable[..., object]", target), target.__name__))  # type: ignore[attr-defined]
    for name, member in list(vars(target).items()):
        if name.startswith("_") and name not in _OPERATORS:
            continue
        label = target.__name__ if name == "__init__" else name.replace("__add__", f"{target.__name__}.__add__")
        if isinstance(member, (classmethod, staticmethod)):
            setattr(target, name, type(member)(_checked(member.__func__, f"{target.__name__}.{label}")))
        elif isinstance(member, types.FunctionType):
            setattr(target, name, _checked(member, label))
    inherited = getattr(target.__init__, "__wrapped__", None)
    if "__init__" not in vars(target) and inherited is not None:
        setattr(target, "__init__", _checked(inherited, target.__name__))  # noqa: B010  # its errors name this class
    return target


def _checked(fn: Callable[..., object], label: str) -> Callable[..., object]:
    arguments = _Arguments(fn, label)

    @functools.wraps(fn)
    def call(*args: object, **kwargs: object) -> object:
        given = arguments.checked(args, kwargs)
        return fn(*given.args, **given.kwargs)

    return call


class _Arguments:
    """The arguments of one function: what each may be, looked up at the first call."""

    def __init__(self, fn: Callable[..., object], label: str) -> None:
        self.fn, self.label, self.signature = fn, label, inspect.signature(fn)

    @functools.cached_property
    def declared(self) -> dict[str, object]:
        """The annotation of each argument, those of an unpacked `TypedDict` among them; without `self`."""
        found: dict[str, object] = {}
        for name, annotation in annotations_of(self.fn, self.signature).items():
            parameter = self.signature.parameters[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                found.update(fields_of(annotation) or {})
            elif parameter.kind is parameter.VAR_POSITIONAL:
                found[name] = tuple[annotation, ...]
            elif name not in ("self", "cls"):
                if annotation is typing.Any and name in _BY_NAME:
                    annotation = _BY_NAME[name] | None if parameter.default is None else _BY_NAME[name]
                found[name] = annotation
        return found

    @functools.cached_property
    def checks(self) -> dict[str, Check]:
        """The check of each argument that not every value passes."""
        checks = {name: check_of(annotation) for name, annotation in self.declared.items()}
        return {name: check for name, check in checks.items() if check is not None}

    @functools.cached_property
    def others(self) -> str | None:
        """The parameter that takes all other keyword arguments."""
        return next((p.name for p in self.signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    @functools.cached_property
    def takes_any_name(self) -> bool:
        """Whether keyword arguments may have any name."""
        return self.others is not None and not fields_of(annotations_of(self.fn, self.signature)[self.others])

    def checked(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> inspect.BoundArguments:
        """The arguments as the function is to see them."""
        if not self.takes_any_name and (unknown := [name for name in kwargs if name not in self.declared]):
            raise CallError(" ".join(f"{self._unknown(name)}" for name in unknown))
        try:
            given = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CallError(self._unbound(args, kwargs, str(error))) from None
        more = given.arguments.get(self.others or "", {})
        refused = [text for part in (given.arguments, more) for text in self._replace(part)]
        if refused:
            raise InvalidInputError("\n".join(refused))
        return given

    def _replace(self, given: dict[str, object]) -> list[str]:
        """Puts each value in the form that is declared; gives what is wrong with those that have none."""
        refused = []
        for name, value in given.items():
            if name in self.checks:
                given[name] = self.checks[name](value)
                if given[name] is WRONG:
                    advised = advice(self.declared[name], value)
                    refused.append(f"{self.label}({name}={shown(value)}): {advised}")
        return refused

    def _unknown(self, name: str) -> str:
        """What to do about a name that is no argument; it may be a field of an options object that is one."""
        refused = f"{self.label}({name}=...): there is no such argument."
        if difflib.get_close_matches(name, self.declared):
            return f"{refused} {did_you_mean(name, self.declared)}"
        for parameter, annotation in self.declared.items():
            for options in (part for part in parts_of(annotation) if isinstance(part, type)):
                fields = dataclasses.fields(options) if dataclasses.is_dataclass(options) else ()
                close = difflib.get_close_matches(
                    name, [field.name for field in fields if field.init], n=1, cutoff=0.75
                )
                if close:
                    return f"{refused} Give {parameter}={options.__name__}({close[0]}=...)."
        return f"{refused} {did_you_mean(name, self.declared)}"

    def _unbound(self, args: tuple[object, ...], kwargs: Mapping[str, object], reason: str) -> str:
        """Why the arguments do not fit, which there are, and what else is wrong with those that are given."""
        parameters, takes = self.signature.parameters, f"It takes {', '.join(self.declared) or 'no arguments'}."
        positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(args) > len(positional):
            plain = ", ".join(name for name in positional if name in self.declared)
            return f"{self.label}: only these may be given without a name: {plain or 'none'}. {takes}"
        needed = [
            name for name in self.declared if name in parameters and parameters[name].default is inspect.Parameter.empty
        ]
        missing = [name for name in needed if name not in kwargs and name not in positional[: len(args)]]
        if not missing:
            return f"{self.label}: {reason}. {takes}"
        refused = self._replace(self.signature.bind_partial(*args, **kwargs).arguments)
        return "\n".join([f"{self.label}: {', '.join(missing)} must be given. {takes}", *refused])
