"""The cache of a generation: what its layers can do, and how its rows and columns are chosen."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel


def new_cache(config: PreTrainedConfig, width: int) -> Cache:
    """A KV cache whose plain layers are allocated for `width` tokens at once instead of growing at every step."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Preallocated(DynamicLayer):
        is_preallocated = True

        def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self._hold(key_states[:, :, :0], value_states[:, :, :0], width)
            assert self.keys is not None and self.values is not None
            start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
            if end > self._k.shape[2]:
                self._hold(self.keys, self.values, max(end, 2 * self._k.shape[2]))
            self._k[:, :, start:end], self._v[:, :, start:end] = key_states, value_states
            self.keys, self.values = self._k[:, :, :end], self._v[:, :, :end]
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.keys is not None and self.values is not None:
                self._hold(self.keys[indices], self.values[indices], self._k.shape[2])

        def take_columns(self, index: Tensor) -> None:
            if self.keys is not None and self.values is not None:
                keys, values = (x[0][:, index].transpose(0, 1) for x in (self.keys, self.values))
                self._hold(keys, values, self._k.shape[2])

        def _hold(self, keys: Tensor, values: Tensor, capacity: int) -> None:
            """Puts these keys and values in front of new memory for `capacity` columns."""
            end = keys.shape[2]
            self._k, self._v = (x.new_empty(x.shape[0], x.shape[1], capacity, x.shape[3]) for x in (keys, values))
            self._k[:, :, :end], self._v[:, :, :end] = keys, values
            self.keys, self.values = self._k[:, :, :end], self._v[:, :, :end]

    cache = DynamicCache(config=config)
    if cache.layers:
        cache.layers[:] = [Preallocated() if type(layer) is DynamicLayer else layer for layer in _layers(cache)]
    return cache


def takes_cache(hf: PreTrainedModel) -> bool:
    """Whether the model can be given a cache; others keep a recurrent state under another name, or recompute."""
    return "past_key_values" in inspect.signature(hf.forward).parameters


def _layers(cache: Cache) -> Sequence[Any]:
    """The layers, which share no interface: some keep keys and values, some a state, some nothing."""
    return cache.layers


def length(cache: Cache) -> int:
    """Number of columns that the layers of a cache have seen; 0 where none of them tells."""
    return max((int(layer.get_seq_length()) for layer in _layers(cache) if hasattr(layer, "get_seq_length")), default=0)


def holds(cache: Cache, columns: int) -> bool:
    """Whether a cache into which so many columns were fed holds all that the model keeps of them.

    False for a model that ignores the cache, or keeps a part of its state in its modules.
    """
    lengths = {int(layer.get_seq_length()) for layer in _layers(cache) if hasattr(layer, "get_seq_length")}
    states = [layer for layer in _layers(cache) if hasattr(layer, "conv_states")]
    # layers that read the keys of other layers stay empty
    is_full = lengths - {0} == {columns} if lengths else bool(states)
    return is_full and (not states or any(_has_state(layer) for layer in states))


def _has_state(layer: Any) -> bool:
    return any((*layer.is_conv_states_initialized.values(), *layer.is_recurrent_states_initialized.values()))


def keeps_columns(cache: Cache) -> bool:
    """Whether every layer keeps keys and values by row and column, and nothing else.

    Only then can rows be chosen, columns be taken back, and several tokens be fed after others. What is not known to be
    so counts as not: a recurrent or convolutional state, also one beside keys and values, moves in one direction, and
    some families start it from nothing when they are fed several tokens at once.
    """
    from transformers import cache_utils

    names = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer")
    kinds = [getattr(cache_utils, name, None) for name in names]
    return bool(cache.layers) and all(_is_preallocated(layer) or type(layer) in kinds for layer in _layers(cache))


def is_plain(cache: Cache) -> bool:
    """Whether every layer keeps every column in one piece of memory, so that columns can be moved."""
    return bool(cache.layers) and all(map(_is_preallocated, _layers(cache)))


def _is_preallocated(layer: object) -> bool:
    return getattr(layer, "is_preallocated", False)


def select_rows(cache: Cache, index: Int[Tensor, " kept"]) -> None:
    """From here on the batch of this cache consists of these of its rows, in this order, repeats included."""
    for layer in _layers(cache):
        layer.batch_select_indices(_near(index, layer))


def take_columns(cache: Cache, index: Int[Tensor, "batch columns"]) -> None:
    """From a cache of one row to one of many: column `c` of row `r` becomes column `index[r, c]` of the old row."""
    for layer in _layers(cache):
        layer.take_columns(_near(index, layer))


def _near(index: Tensor, layer: object) -> Tensor:
    """The index on the layer's device; layers without keys yet, or with other names for them, take it as it is."""
    keys = getattr(layer, "keys", None)
    return index if keys is None else index.to(keys.device)


def can_crop(cache: Cache, width: int) -> bool:
    """Whether a cache that holds `width` columns can give some of them back.

    A sliding window that has been full has lost what would come back in.
    """
    windows = (getattr(layer, "sliding_window", None) for layer in _layers(cache))
    return keeps_columns(cache) and all(window is None or width < window for window in windows)


def crop(cache: Cache, columns: int) -> bool:
    """Keeps the first `columns` columns, to be continued; False, and nothing done, where that is not possible."""
    excess = length(cache) - columns
    if excess < 0 or not keeps_columns(cache) or (excess and not can_crop(cache, columns + excess)):
        return False
    # layer by layer, since a pass that failed half-way has reached some of them only
    for layer in _layers(cache):
        surplus = int(layer.get_seq_length()) - columns if hasattr(layer, "get_seq_length") else 0
        if surplus > 0:
            layer.crop(-surplus)
    return True
