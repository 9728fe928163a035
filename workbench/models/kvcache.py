"""The KV cache of a generation: allocated once, and its rows and columns can be chosen."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor


def new_cache(config: Any, width: int) -> Any:
    """A KV cache whose plain layers are allocated for `width` tokens at once instead of growing at every step."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Preallocated(DynamicLayer):
        is_preallocated = True

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
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
        cache.layers = [Preallocated() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_plain(cache: Any) -> bool:
    """Whether every layer keeps every column, so that columns can be moved."""
    return bool(cache.layers) and all(getattr(layer, "is_preallocated", False) for layer in cache.layers)


def can_select(cache: Any) -> bool:
    """Whether rows can be chosen: every layer keeps keys and values per row and nothing else."""
    return bool(cache.layers) and all(hasattr(layer, "batch_select_indices") for layer in cache.layers)


def select_rows(cache: Any, index: Int[Tensor, " kept"]) -> None:
    """From here on the batch of this cache consists of these of its rows, in this order, repeats included."""
    for layer in cache.layers:
        layer.batch_select_indices(_near(index, layer))


def take_columns(cache: Any, index: Int[Tensor, "batch columns"]) -> None:
    """From a cache of one row to one of many: column `c` of row `r` becomes column `index[r, c]` of the old row."""
    for layer in cache.layers:
        layer.take_columns(_near(index, layer))


def _near(index: Tensor, layer: Any) -> Tensor:
    """The index on the layer's device; layers without keys yet, or with other names for them, take it as it is."""
    keys = getattr(layer, "keys", None)
    return index if keys is None else index.to(keys.device)


def crop(cache: Any, length: int) -> bool:
    """Keeps the first `length` columns; False, and nothing done, if this cache no longer has what it would need."""
    excess = int(cache.get_seq_length()) - length
    if excess <= 0:
        return excess == 0
    if not can_crop(cache, length + excess):
        return False
    for layer in cache.layers:
        layer.crop(-excess)
    return True


def can_crop(cache: Any, width: int) -> bool:
    """Whether a cache that holds `width` columns can give some of them back.

    A sliding window that has been full has lost what would come back in, and a recurrent state can't be taken back.
    """
    windows = (getattr(layer, "sliding_window", None) for layer in cache.layers)
    croppable = all(getattr(layer, "is_croppable", False) for layer in cache.layers)
    return bool(cache.layers) and croppable and all(window is None or width < window for window in windows)
