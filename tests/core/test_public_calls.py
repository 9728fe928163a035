"""Every public function, called with one wrong argument of each kind: the error names the argument and the function."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd  # noqa: F401  # an annotation names it, and nothing else here loads it
import pytest
from beartype import BeartypeConf
from beartype.door import is_bearable

import circuits
import workbench as wb
from workbench.core.annotations import annotations_of, fields_of
from workbench.core.errors import CallError, InvalidInputError

ROOMS = ("controls", "features", "glitch", "judges", "probes", "saes", "steering", "core")
PACKAGES = (wb, *(importlib.import_module(f"workbench.{room}") for room in ROOMS), circuits)
RESULTS = (
    "Answer", "Answers", "AttributionGraph", "Behaviours", "CardSet", "CensusReport", "CheckReport", "ClusterCircuits", "ConceptReport", "Cost", "DepthScores", "DirectAttribution", "Direction",
    "Agreement", "AutomaticShift", "Backward", "BackwardStep", "FeatureRole", "LeftOut", "WhatIf", "Check", "DoctorReport",
    "EditReport", "Estimate", "Explanation", "Exported", "FeatureCard", "FeatureDossier", "FeatureScoreReport",
    "Eraser", "Transport",
    "FeatureTable", "FeatureWindows", "FitReport", "Generation", "GlitchReport", "HarvestEstimate", "HeadScore", "HeadScores",
    "IntruderScore", "JacobianLens", "JudgeGate", "Lens", "LensEnds", "LensEstimate", "LensReading", "LensToken",
    "LensTokens", "LinearLens", "LoadedGraph", "LogitLens", "MergedLora", "Neighbour", "NodeEffects",
    "OutputScores", "PatchGrid", "PathEffects", "Plan", "PrunedCircuit", "RatingReport", "RefusalReport", "Repair", "Report", "ReptileReport", "SAEReport", "SAEsEstimate", "SampleVectors",
    "RemovalScores", "Section", "SelectionReport", "ShiftClassifier", "ShiftReport", "ShortcutEvidence", "SteeringExample", "SteeringReport", "Stability", "TokenTable",
    "TokenMeans", "TokenVectors", "TokenizerFacts", "TopContexts", "TrainedSAEs", "Trial", "TwoByTwo", "Window",
)  # fmt: skip
"""What functions give: it is not made by hand, and a number in it may be nan."""


class _Thing:
    """Something of another library, which no argument can be."""


KINDS = (
    _Thing(),
    "no such name",
    2.5,
    7,
    None,
    [],
    ["no such name"],
    [_Thing()],
    {"a": _Thing()},
    b"bytes",
    len,
    Path("a"),
)


def _public(package: ModuleType) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions, constructors and methods of a stub, each with the name that its errors use; what wb has is its own."""
    for name in package.__all__:
        value = getattr(package, name)
        if package is not wb and name in wb.__all__ and getattr(wb, name) is value:
            continue
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and not issubclass(value, Exception) and not getattr(value, "_is_protocol", False):
            yield from _of_class(value)


def _of_class(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    # `Model` is written in parts
    parts = [base for base in cls.__mro__ if base is cls or base.__module__.startswith("workbench.models.")]
    for name, member in {name: member for part in reversed(parts) for name, member in vars(part).items()}.items():
        fn = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        is_wanted = name == "__init__" and cls.__name__ not in RESULTS or not name.startswith("_")
        if inspect.isfunction(fn) and is_wanted:
            yield (cls.__name__ if name == "__init__" else name), fn


def _hints(fn: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a function but `self`, with what they are declared as."""
    signature = inspect.signature(fn)
    hints: dict[str, Any] = {}
    for name, hint in annotations_of(fn, signature).items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            hints.update(fields_of(hint) or {})
        elif kind is not inspect.Parameter.VAR_POSITIONAL and name not in ("self", "cls"):
            hints[name] = hint
    return hints


def _fits(value: object, hint: object) -> bool:
    """Whether a value is of a declared kind; a protocol is no plain value."""
    parts = _parts(hint)
    if any(getattr(part, "_is_protocol", False) for part in parts) and isinstance(value, _Thing):
        return False
    arrays = any(part is np.ndarray or getattr(part, "array_type", None) is np.ndarray for part in parts)
    if isinstance(value, list) and (frozenset in parts or arrays):
        return True
    forms = [value, tuple(value)] if isinstance(value, list) else [value]
    return any(is_bearable(form, typing.cast("Any", hint), conf=BeartypeConf(is_pep484_tower=True)) for form in forms)


def _parts(hint: object) -> list[object]:
    origin = typing.get_origin(hint)
    return [hint, origin, *(one for part in typing.get_args(hint) for one in _parts(part))]


def _call(fn: Callable[..., Any], chosen: str, value: object) -> None:
    """With things in place of the other arguments, so that nothing begins to work."""
    parameters = inspect.signature(fn).parameters
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    bound = [_Thing() for name in needed if name in ("self", "cls")]
    fn(*bound, **{**dict.fromkeys(needed[len(bound) :], _Thing()), chosen: value})


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def _failures(
    package: ModuleType, test: Callable[[str, Callable[..., Any], dict[str, Any]], Iterator[str]]
) -> list[str]:
    return [
        f"{fn.__module__}.{fn.__qualname__}({failure}"
        for label, fn in _public(package)
        for failure in test(label, fn, _hints(fn))
    ]


def _error_of(fn: Callable[..., Any], name: str, value: object) -> BaseException | None:
    try:
        _call(fn, name, value)
    except Exception as error:
        return error
    return None


def _wrong_values(label: str, fn: Callable[..., Any], hints: dict[str, Any]) -> Iterator[str]:
    for name, hint in hints.items():
        for value in [] if hint is object else [value for value in KINDS if not _fits(value, hint)] or [_Thing()]:
            error = _error_of(fn, name, value)
            if not isinstance(error, InvalidInputError) or f"{label}({name}=" not in str(error):
                yield f"{name}={value!r}): {error!r}"


def _wrong_names(label: str, fn: Callable[..., Any], hints: dict[str, Any]) -> Iterator[str]:
    others = [p.name for p in inspect.signature(fn).parameters.values() if p.kind is p.VAR_KEYWORD]
    takes_any = others and not fields_of(annotations_of(fn, inspect.signature(fn))[others[0]])
    for name in [] if takes_any else list(hints)[:1]:
        error = _error_of(fn, f"{name}_", 1)
        if not isinstance(error, CallError) or f"{label}({name}_=...): there is no such argument. Did" not in str(
            error
        ):
            yield f"{name}_=1): {error!r}"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_wrong_argument_of_any_kind_is_refused_by_its_name(package: ModuleType) -> None:
    assert _failures(package, _wrong_values) == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_an_unknown_argument_is_refused_with_the_one_that_exists(package: ModuleType) -> None:
    assert _failures(package, _wrong_names) == []
