"""Methods of a basis for activations of any leading axes, and for features as numbers, sequences or tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from workbench.core.errors import ShapeError


@runtime_checkable
class Numbered(Protocol):
    """What is asked of a basis: its name in errors, and the check of feature numbers."""

    name: str

    def features(self, features: Sequence[int] | Tensor, *, once: bool = False) -> Tensor:
        """Checked feature numbers."""
        ...


_ARGUMENTS = {"x": ("d_in", "reads"), "acts": ("d_sae", "takes activations of"), "target": ("d_out", "writes")}
"""Of the tensors that these methods take, the width and what the basis does with it."""
_SUMS = ("contribution", "ablate")
"""Methods that add up what features write, so that one named twice would count twice."""


def _numbers(basis: Numbered, features: int | Sequence[int] | Tensor | None, *, once: bool = False) -> Tensor | None:
    """Checked feature numbers, on any device: an accelerator would wrap negative ones and die of large ones."""
    return (
        None if features is None else basis.features([features] if isinstance(features, int) else features, once=once)
    )


def over_tokens(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The method for activations of any leading axes: it is called with rows, its rows get the axes back."""
    signature, title = inspect.signature(method), method.__name__
    first = list(signature.parameters)[1]

    def numbers(basis: Numbered, value: int | Sequence[int] | Tensor | None) -> Tensor | None:
        ids = _numbers(basis, value, once=title in _SUMS)
        if ids is not None and ids.ndim != 1:
            raise ShapeError(f"{title}: features have shape {tuple(ids.shape)}. Give (f,), the same for all tokens.")
        return ids

    def rows(basis: Numbered, name: str, value: Tensor, lead: torch.Size) -> Tensor:
        width, what = _ARGUMENTS.get(name, _ARGUMENTS["x"])
        wanted = getattr(basis, width)
        if value.shape != (*lead, wanted):
            form = "(..., " if name == first else f"({''.join(f'{n}, ' for n in lead)}"
            raise ShapeError(
                f"{title}: {basis.name} {what} {width}={wanted}, and got shape {tuple(value.shape)}. Give {form}"
                f"{wanted})."
            )
        if len(lead) == 1:
            return value
        flat = value.reshape(-1, wanted)
        vars(flat).update(vars(value))  # what `encode` keeps for `decode`, a tensor per row of `flat`
        return flat

    @functools.wraps(method)
    def call(self: Numbered, *args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        lead = given[first].shape[:-1]
        for name, value in given.items():
            if name == "features":
                given[name] = numbers(self, value)
            elif isinstance(value, Tensor):
                given[name] = rows(self, name, value, lead)
        out = method(*bound.args, **bound.kwargs)
        if len(lead) == 1:
            return out
        shaped = out.reshape(*lead, out.shape[-1])
        vars(shaped).update(vars(out))
        return shaped

    return call


def of_numbers(rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`rows` for numbers, sequences and tensors."""

    @functools.wraps(rows)
    def call(self: Numbered, features: int | Sequence[int] | Tensor | None = None) -> Tensor:
        return rows(self, _numbers(self, features))

    return call
