"""The attention pattern, which no module takes or gives: seen where attention multiplies it with v."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from workbench.core.errors import EditError
from workbench.hooks.handles import Hooks
from workbench.hooks.sites import Point

Write = Callable[[Tensor], Tensor]
_SOFTMAX = frozenset({torch.softmax, torch.nn.functional.softmax, Tensor.softmax})
_MATMUL = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__})
_SETTING = "_attn_implementation_internal"


def make_eager(on: Hooks, configs: Sequence[object]) -> None:
    """Makes the model compute attention step by step while `on` is on; masks are built to match at each call.

    The setting belongs to the model's config, so another thread that runs the model meanwhile does the same.
    """
    for config in configs:
        on.note(partial(setattr, config, _SETTING, getattr(config, _SETTING)))
        setattr(config, _SETTING, "eager")


class _Watch(TorchFunctionMode):
    """Follows the result of the softmax through casts, slices and dropout to the product with v, and replaces it there.

    On only during the forward pass of one attention module.
    """

    def __init__(self, module: nn.Module, heads: int) -> None:
        super().__init__()
        self.module, self.heads = module, heads
        self.writes: list[Write] = []
        self.seen = self.is_closed = False
        self._followed: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if self.seen or self.is_closed or _RUNNING.paused or not isinstance(x, Tensor):
            return func(*args, **kwargs)
        if func in _SOFTMAX:
            out = func(*args, **kwargs)
            self._followed = [out]
            return out
        if not any(x is tensor for tensor in self._followed):
            return func(*args, **kwargs)
        if func in _MATMUL and self._is_pattern(x, args[1]):
            self.seen = True
            self._followed = []
            for write in self.writes:
                x = write(x)
            return func(x, *args[1:], **kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self._followed.append(out)
        return out

    def _is_pattern(self, x: Tensor, v: object) -> bool:
        return x.ndim == 4 and x.shape[1] == self.heads and isinstance(v, Tensor) and v.shape[-2:-1] == x.shape[-1:]


class _Running(threading.local):
    """The watches that are on, innermost last, and whether the function of a hook is running, which they overlook."""

    def __init__(self) -> None:
        self.watches: list[_Watch] = []
        self.paused = False


_RUNNING = _Running()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Softmax and products inside the block, as in the function of a hook, are not taken for those of attention."""
    before = _RUNNING.paused
    try:
        try:
            _RUNNING.paused = True
            yield
        finally:
            _RUNNING.paused = before
    finally:
        _RUNNING.paused = before  # an interrupt on the line above may not end the watch for good


class _Hook:
    """One function on the pattern of one module; several on the same module share a watch, in the order of hooks."""

    def __init__(self, point: Point, write: Write) -> None:
        self.point, self.write = point, write
        self.watch: _Watch | None = None

    def enter(self, module: nn.Module, *_: object) -> None:
        running = _RUNNING.watches
        if running and running[-1].module is module:
            running[-1].writes.append(self.write)
            return
        assert self.point.heads is not None
        for mode in _get_current_function_mode_stack():
            # After an interrupt inside torch's own handling of modes, torch puts a closed one back.
            if isinstance(mode, _Watch) and mode.is_closed:
                _switch_off(mode)
        self.watch = watch = _Watch(module, self.point.heads)
        watch.writes.append(self.write)
        running.append(watch)
        watch.__enter__()

    def leave(self, _module: nn.Module, _args: object, output: object) -> None:
        watch = self.watch
        self.close()
        # After an exception in the forward pass there is no output, and the exception speaks for itself.
        if watch is not None and output is not None and not watch.seen:
            raise EditError(
                f"Site {self.point.site}: {type(self.point.module).__name__} multiplied no (batch, {watch.heads}, "
                "q_pos, k_pos) result of a softmax with v, so its pattern can't be read or written."
            )

    def close(self) -> None:
        """Switches the watch off if it is on."""
        if self.watch is not None:
            _switch_off(self.watch)
            self.watch = None


def _switch_off(watch: _Watch) -> None:
    """Takes a watch off, wherever it is; once more does no harm."""
    watch.is_closed = True
    above = []
    while any(mode is watch for mode in _get_current_function_mode_stack()):
        mode = _pop_mode()
        above += [] if mode is watch else [mode]
    for mode in reversed(above):
        _push_mode(mode)
    if watch in _RUNNING.watches:
        _RUNNING.watches.remove(watch)


def add_pattern_hook(on: Hooks, point: Point, write: Write) -> None:
    """Runs `write` on the pattern that the attention module of `point` multiplies with v; its result takes its place.

    Attention is computed in eager mode while `on` is on. A forward pass in which no pattern is found raises EditError.
    """
    hook = _Hook(point, write)
    make_eager(on, point.configs)
    on.note(hook.close)
    on.add(point.module, hook.enter, before=True)
    on.add(point.module, hook.leave, always=True)
