"""How a model called its blocks for a batch, recorded once, to call them again for other rows and other activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

from workbench.core.tokens import TokenBatch
from workbench.models.kvcache import can_crop, crop, holds, new_cache, select_rows, takes_cache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block besides the residual stream, and whether that was given by position."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    is_positional: bool

    def over(self, block: nn.Module, stream: Tensor) -> Tensor:
        """The block's output for another stream."""
        given = (stream, *self.args) if self.is_positional else self.args
        named = self.kwargs if self.is_positional else {**self.kwargs, "hidden_states": stream}
        out = block(*given, **named)
        return out if isinstance(out, Tensor) else out[0]

    def mapped(self, change: Callable[[object], object]) -> BlockCall:
        """The call with each argument changed."""
        kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return BlockCall(tuple(map(change, self.args)), kwargs, self.is_positional)


class BlockCalls:
    """The calls of some blocks in one run of a batch, and the cached keys and values of its tokens but the last few.

    Attributes:
        start: the residual stream that the first block was given; without blocks, what the final norm was given.
        prefix: the cache; None where all tokens run.
    """

    def __init__(self, batch: TokenBatch, prefix: Cache | None, last: int = 1) -> None:
        self.start: Tensor | None = None
        self.prefix = prefix
        self._n_rows, width = batch.ids.shape
        self._cached = width - last
        self._calls: list[BlockCall] = []
        self._selected: tuple[Tensor, Cache | None, list[BlockCall]] | None = None
        self._caches: list[tuple[Tensor, Cache]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def note(self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Records one call; a pre-hook of each block."""
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self._calls.append(BlockCall(args[1:], others, is_positional=bool(args)))
        self.note_start(_module, args, kwargs)

    def note_start(self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Records the first residual stream; a pre-hook."""
        stream = args[0] if args else kwargs.get("hidden_states")
        self.start = stream if self.start is None and isinstance(stream, Tensor) else self.start

    def part(self, first: int, n: int) -> BlockCalls:
        """Some of the calls, one after the other."""
        some = copy.copy(self)
        some._calls, some._selected = self._calls[first : first + n], None
        return some

    def of_rows(self, index: Int[Tensor, " rows"]) -> tuple[Cache | None, list[BlockCall]]:
        """The cache and the calls for a batch of these rows, repeats included."""
        if self._selected is not None and torch.equal(self._selected[0], index):
            return self._selected[1:]
        cache = self._cache_of(index)
        taken: dict[int, Tensor] = {}  # blocks share their masks and rotations

        def select(value: object) -> object:
            if value is self.prefix and cache is not None:
                return cache
            if isinstance(value, tuple):
                return tuple(map(select, value))
            if not isinstance(value, Tensor) or value.ndim < 2 or not value.shape[0] == self._n_rows > 1:
                return value
            if id(value) not in taken:
                taken[id(value)] = value[index.to(value.device)]
            return taken[id(value)]

        calls = [call.mapped(select) for call in self._calls]
        # A graph may still need the keys and values that a later run would write over.
        self._selected = None if cache is not None and torch.is_grad_enabled() else (index, cache, calls)
        return cache, calls

    def _cache_of(self, index: Int[Tensor, " rows"]) -> Cache | None:
        """The cache for a batch of these rows; the calls of later blocks share it, since each run takes out its own."""
        if self.prefix is None:
            return None
        if self._caches and not torch.is_grad_enabled() and torch.equal(self._caches[0][0], index):
            return self._caches[0][1]
        cache = copy.deepcopy(self.prefix)
        select_rows(cache, index)
        self._caches[:] = [] if torch.is_grad_enabled() else [(index, cache)]
        return cache

    def crop(self, cache: Cache | None) -> None:
        """Takes the last tokens out of the cache again."""
        if cache is not None:
            crop(cache, self._cached)


def prefill(hf: PreTrainedModel, batch: TokenBatch, last: int = 1) -> Cache | None:
    """Keys and values of every token but the last few of each row; None where they can't be kept, or there are none."""
    width = batch.ids.shape[1]
    if width <= last or not takes_cache(hf):
        return None
    cache = new_cache(hf.config, width)
    if not can_crop(cache, width):
        return None
    inputs = {name: value[:, :-last] for name, value in batch.hf().items()}
    hf(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache if holds(cache, width - last) else None
