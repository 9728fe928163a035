"""What a plan has to know from outside a forward pass: the prompts of `hf.generate`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn

_REPLACED = "_replaced_by_watch_generate"
"""Attribute of our `generate`: what stood in its place on the instance, or None for the method of the class."""


@dataclass(eq=False)
class Job:
    """One call of `hf.generate`.

    Attributes:
        width: columns of the prompts.
        mask: True at their real tokens; None until a forward pass tells.
        fresh: no forward pass has been made yet.
    """

    width: int
    mask: Bool[Tensor, "prompts width"] | None
    fresh: bool = True

    def prompt_mask(self, given: Tensor | None, batch: int, device: torch.device) -> Bool[Tensor, "batch width"]:
        """The real prompt tokens of each row; beams and returned sequences repeat each prompt."""
        if self.mask is None:
            seen = given is not None and given.shape[1] >= self.width
            self.mask = given[:, : self.width] if seen and given is not None else None
        if self.mask is None or batch % len(self.mask):
            return torch.ones(batch, self.width, dtype=torch.bool, device=device)
        return self.mask.to(device).repeat_interleave(batch // len(self.mask), 0)


@runtime_checkable
class Watcher(Protocol):
    """Told when a generation of Hugging Face begins and when it is over."""

    job: Job | None


def watch_generate(hf: nn.Module, watchers: Callable[[], Iterable[Watcher]]) -> None:
    """From now on `hf.generate` tells those who watch at the time of a call how wide its prompts are.

    A forward pass can't know: the prompt may come in chunks, with candidate tokens behind it, or without a cache again
    and again. Watching twice is watching once.
    """
    inner = getattr(hf, "generate", None)
    if not callable(inner) or hasattr(inner, _REPLACED):
        return

    @functools.wraps(inner)
    def generate(*args: Any, **kwargs: Any) -> Any:
        ids = next((kwargs[name] for name in ("inputs", "input_ids") if kwargs.get(name) is not None), None)
        ids = args[0] if ids is None and args else ids
        source = kwargs.get("inputs_embeds") if ids is None else ids
        mask = kwargs.get("attention_mask")
        told = tuple(watchers())
        for watcher in told:
            watcher.job = None if source is None else Job(source.shape[1], None if mask is None else mask.bool())
        try:
            return inner(*args, **kwargs)
        finally:
            for watcher in told:
                watcher.job = None

    setattr(generate, _REPLACED, vars(hf).get("generate"))
    vars(hf)["generate"] = generate


def unwatch_generate(hf: nn.Module) -> None:
    """Takes back `watch_generate`; without it, does nothing."""
    generate = vars(hf).get("generate")
    if not hasattr(generate, _REPLACED):
        return
    replaced = getattr(generate, _REPLACED)
    if replaced is None:
        del vars(hf)["generate"]
    else:
        vars(hf)["generate"] = replaced
