"""The attention pattern, which no module takes or gives: seen where attention multiplies it with v."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from workbench.errors import EditError
from workbench.hooks.sites import Point

Write = Callable[[Tensor], Tensor]
_SOFTMAX = frozenset({torch.softmax, torch.nn.functional.softmax, Tensor.softmax})
_MATMUL = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__})


@contextlib.contextmanager
def eager(configs: Sequence[Any]) -> Iterator[None]:
    """Makes the model compute attention step by step inside the block; masks are built to match at each call.

    The setting belongs to the model's config, so another thread that runs the model meanwhile does the same.
    """
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config._attn_implementation_internal = value


class _Watch(TorchFunctionMode):
    """Follows the result of the softmax through casts, slices and dropout to the product with v, and replaces it there.

    On only during the forward pass of one attention module.
    """

    def __init__(self, module: nn.Module, heads: int) -> None:
        super().__init__()
        self.module, self.heads = module, heads
        self.writes: list[Write] = []
        self.seen = False
        self._followed: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if self.seen or _RUNNING.paused or not isinstance(x, Tensor):
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

    def _is_pattern(self, x: Tensor, v: Any) -> bool:
        return x.ndim == 4 and x.shape[1] == self.heads and isinstance(v, Tensor) and v.shape[-2:-1] == x.shape[-1:]


class _Running(threading.local):
    """The watches that are on, innermost last, and how many functions of hooks are running, which they overlook."""

    def __init__(self) -> None:
        self.watches: list[_Watch] = []
        self.paused = 0


_RUNNING = _Running()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Softmax and products inside the block, as in the function of a hook, are not taken for those of attention."""
    _RUNNING.paused += 1
    try:
        yield
    finally:
        _RUNNING.paused -= 1


class _Hook:
    """One function on the pattern of one module; several on the same module share a watch, in the order of hooks."""

    def __init__(self, point: Point, write: Write) -> None:
        self.point, self.write = point, write
        self.watch: _Watch | None = None

    def enter(self, module: nn.Module, _args: Any) -> None:
        running = _RUNNING.watches
        if running and running[-1].module is module:
            running[-1].writes.append(self.write)
            return
        assert self.point.heads is not None
        watch = _Watch(module, self.point.heads)
        watch.writes.append(self.write)
        watch.__enter__()
        running.append(watch)
        self.watch = watch

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        watch = self.close()
        # After an exception in the forward pass there is no output, and the exception speaks for itself.
        if watch is not None and output is not None and not watch.seen:
            raise EditError(
                f"Site {self.point.site}: {type(self.point.module).__name__} multiplied no (batch, {watch.heads}, "
                "q_pos, k_pos) result of a softmax with v, so its pattern can't be read or written."
            )

    def close(self) -> _Watch | None:
        """Switches the watch off if it is on."""
        watch, self.watch = self.watch, None
        if watch is not None:
            _RUNNING.watches.remove(watch)
            watch.__exit__(None, None, None)
        return watch


@contextlib.contextmanager
def pattern_hook(point: Point, write: Write) -> Iterator[None]:
    """Runs `write` on the pattern that the attention module of `point` multiplies with v; its result takes its place.

    Attention is computed in eager mode inside the block.

    Raises:
        EditError: in a forward pass in which no pattern is found.
    """
    hook = _Hook(point, write)
    with contextlib.ExitStack() as stack:
        stack.enter_context(eager(point.configs))
        stack.callback(hook.close)
        stack.callback(point.module.register_forward_pre_hook(hook.enter).remove)
        stack.callback(point.module.register_forward_hook(hook.leave, always_call=True).remove)
        yield
