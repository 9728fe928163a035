"""Hooks and settings that are put on together and taken off together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial

from torch import nn

from workbench.core.errors import EditError
from workbench.hooks.sites import Point


class Hooks:
    """What a block puts on a model; all of it is taken off when the block ends, also after an interrupt.

    What takes a hook off is noted before the hook is put on, and running it twice does no harm. So a
    KeyboardInterrupt between any two lines loses no hook. Python runs a few instructions before the first line of an
    `__exit__`; after an interrupt there, the hooks are taken off when this object is freed. Nothing that a hook refers
    to may therefore refer to this object.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __bool__(self) -> bool:
        """Whether anything is on."""
        return bool(self._undo)

    def note(self, undo: Callable[[], object]) -> None:
        """Notes what takes back the next step; it may run before that step and more than once."""
        self._undo.append(undo)

    def add(
        self, module: nn.Module, hook: Callable[..., object], *, before: bool = False, always: bool = False
    ) -> None:
        """Registers a forward hook, called with the module, its arguments and its output.

        With `always` it is called after an exception as well. A hook that runs `before` the module gets the module, its
        positional and its named arguments.
        """
        self.note(partial(_take_off, module, hook))
        if before:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            module.register_forward_hook(hook, always_call=always)

    def remove(self) -> None:
        """Takes everything off, last first."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.remove()
        finally:
            self.remove()

    def __del__(self) -> None:
        if getattr(self, "_undo", None):
            self.remove()


def _take_off(module: nn.Module, hook: Callable[..., object]) -> None:
    """Removes a hook by its identity: an interrupt in torch's registration leaves no handle to remove it with."""
    for hooks, more in (
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
        (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
    ):
        for key in [key for key, known in hooks.items() if known is hook]:
            for table in (*more, hooks):
                table.pop(key, None)


def weakly(method: Callable[..., object]) -> Callable[..., object]:
    """A method as a hook that does not keep its object, and so the model that the object belongs to, in memory."""
    weak = weakref.WeakMethod(method)

    def hook(*args: object) -> object:
        live = weak()
        return None if live is None else live(*args)

    return hook


def refuse_compiled(model: nn.Module, points: Iterable[Point]) -> None:
    """Raises EditError for points inside a compiled module: there hooks run in some calls and are passed by in others.

    A compiled module's own input and output are outside of it.
    """
    for point in points:
        module: nn.Module | None = model
        for name in point.path.split("."):
            if module is None:
                break
            if getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules:
                raise EditError(
                    f"Site {point.site}: {point.path} is inside a compiled {type(module).__name__}, where hooks "
                    "do not reliably run. Use the model without torch.compile, or compile its blocks only and edit "
                    "the residual stream."
                )
            module = module._modules.get(name)
