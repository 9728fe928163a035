"""The one primitive under every read and every write: hooks that are on inside a block and off after it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.core.errors import EditError
from workbench.hooks.handles import Hooks
from workbench.hooks.pattern import add_pattern_hook, unwatched
from workbench.hooks.sites import Point

Fn = Callable[[Tensor], Tensor | None]
_INPUT_NAMES = ("hidden_states", "x", "input")


def _checked(point: Point, before: Tensor, after: object) -> Tensor | None:
    """The hook's return value, or an error that says how it differs from what the model needs."""
    if after is None or after is before:
        return None
    if not isinstance(after, Tensor):
        raise EditError(f"Edit at {point.site} returned {type(after).__name__}; return a tensor or None.")
    if after.shape != before.shape:
        raise EditError(
            f"Edit at {point.site} returned shape {tuple(after.shape)}; the model has {tuple(before.shape)}."
        )
    if after.dtype != before.dtype:
        raise EditError(f"Edit at {point.site} returned {after.dtype}; the model has {before.dtype}. Cast it back.")
    if not torch.isfinite(after).all() and torch.isfinite(before).all():
        raise EditError(f"Edit at {point.site} made non-finite values. Check the vector and the strength.")
    return after


def _run(point: Point, fn: Fn, raw: Tensor) -> Tensor | None:
    """The module's tensor after `fn` on the canonical tensor of the point; None if it stays as it is."""
    x = point.read(raw)
    with unwatched():
        after = _checked(point, x, fn(x))
    return None if after is None else point.write(raw, after)


def _first_input(point: Point, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Tensor, str | None]:
    if args and isinstance(args[0], Tensor):
        return args[0], None
    for name in _INPUT_NAMES:
        if isinstance(x := kwargs.get(name), Tensor):
            return x, name
    raise EditError(f"Site {point.site}: module {point.path} was called without a tensor as its first argument.")


def _input_hook(point: Point, fn: Fn) -> Callable[..., object]:
    thread = threading.get_ident()

    def hook(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if threading.get_ident() != thread:
            return None  # another thread's use of the same model
        x, name = _first_input(point, args, kwargs)
        if point.is_kept:
            # The block adds this very tensor to the MLP's output later; a replaced argument would not reach that sum.
            after = _run(point, fn, x.clone())
            if after is not None:
                x.copy_(after)
            return None
        after = _run(point, fn, x)
        if after is None:
            return None
        return ((after, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: after})

    return hook


def _output_hook(point: Point, fn: Fn) -> Callable[..., object]:
    thread = threading.get_ident()

    def hook(
        _module: nn.Module, _args: tuple[object, ...], output: Any
    ) -> object:  # a tensor, or a tuple that begins with one
        if threading.get_ident() != thread:
            return None
        x = output if isinstance(output, Tensor) else output[0]
        after = _run(point, fn, x)
        if after is None:
            return None
        return after if isinstance(output, Tensor) else type(output)((after, *output[1:]))

    return hook


def _pattern_write(point: Point, fn: Fn) -> Callable[[Tensor], Tensor]:
    def write(raw: Tensor) -> Tensor:
        after = _run(point, fn, raw)
        return raw if after is None else after

    return write


@contextlib.contextmanager
def attached(hooks: Sequence[tuple[Point, Fn]]) -> Iterator[None]:
    """Runs `fn` on the canonical tensor of each point inside the block; a returned tensor replaces it.

    A point at an attention pattern makes attention run in eager mode inside the block. Hooks are registered inside the
    block and removed one by one, also after an exception in registration, in a hook or in the body; hooks of others
    stay.

    Raises:
        EditError: if a function returns another shape or dtype, or makes non-finite values.
    """
    with Hooks() as on:
        attach(on, hooks)
        yield


def attach(on: Hooks, hooks: Sequence[tuple[Point, Fn]]) -> None:
    """Adds to `on` what runs `fn` on the canonical tensor of each point; see `attached`."""
    for point, fn in hooks:
        if point.side == "inside":
            add_pattern_hook(on, point, _pattern_write(point, fn))
        elif point.side == "in":
            on.add(point.module, _input_hook(point, fn), before=True)
        else:
            on.add(point.module, _output_hook(point, fn))
