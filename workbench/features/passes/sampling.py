"""Keeps the best entries of every feature of a stream; random draws that do not depend on how it is chunked."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MISSING = -1
"""Index of a window that does not exist."""
BUFFER_ENTRIES = 2**16
"""Least number of entries that are buffered before the best are chosen; no effect on the result."""

_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(items: Int[Tensor, " n"], groups: Int[Tensor, " n"] | int = 0, seed: int = 0) -> Float[Tensor, " n"]:
    """A number in [0, 1) for each pair of item and group, whatever the other pairs and their order.

    >>> uniform(torch.tensor([3, 4]))[1] == uniform(torch.tensor([4]))[0]
    tensor(True)

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014).
    """
    group = torch.full_like(items, groups) if isinstance(groups, int) else groups
    x = mixed(group.numpy().astype(np.uint64) + np.uint64(seed % 2**63))
    x = mixed(x ^ items.numpy().astype(np.uint64))
    return torch.from_numpy((x >> np.uint64(11)).astype(np.float64) / 2.0**53)


def mixed(x: np.ndarray) -> np.ndarray:
    """Hashes of 64-bit integers by the finaliser of SplitMix64, which is one to one."""
    x = x + np.uint64(_GAMMA)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return x ^ (x >> np.uint64(31))


class BestEntries:
    """The entries with the largest keys of each feature; of equal keys the one that came first.

    Memory is `features * keep` entries and a buffer of the same order, however many entries are added.

    Attributes:
        keys: of the kept entries, largest first; -inf where there are fewer.
        where: integers that say where an entry is; `MISSING` where there are fewer.
        values: activations of an entry's window.
    """

    def __init__(self, features: int, keep: int, columns: int, width: int) -> None:
        self.keys = torch.full((features, keep), -torch.inf, dtype=torch.float64)
        self.where = torch.full((features, keep, columns), MISSING, dtype=torch.int32)
        self.values = torch.zeros(features, keep, width)
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._n, self._flush_at = 0, max(BUFFER_ENTRIES, features * keep // 4)

    def wants(self, features: Int[Tensor, " n"], keys: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which entries could still be among the best; the others need not be added."""
        if self.keys.shape[1] == 0:
            return torch.zeros(len(keys), dtype=torch.bool)
        return keys > self.keys[:, -1][features]

    def add(
        self,
        features: Int[Tensor, " n"],
        keys: Float[Tensor, " n"],
        where: Int[Tensor, "n columns"],
        values: Float[Tensor, "n width"],
    ) -> None:
        """Adds entries; the best are chosen when the buffer is full."""
        self._pending.append((features, keys.double(), where.int(), values))
        self._n += len(features)
        if self._n >= self._flush_at:
            self.flush()

    def flush(self) -> None:
        """Chooses the best of kept and buffered entries; call it before reading."""
        if not self._pending:
            return
        features, keys, where, values = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._n = [], 0
        n_features, keep = self.keys.shape
        held = (self.keys > -torch.inf).view(-1).nonzero().squeeze(1)
        features = torch.cat([held // keep, features])
        keys = torch.cat([self.keys.view(-1)[held], keys])
        # Two stable sorts: by key, then by feature; what came first stays first.
        order = keys.argsort(descending=True, stable=True)
        order = order[features[order].argsort(stable=True)]
        sorted_features = features[order]
        counts = torch.bincount(sorted_features, minlength=n_features)
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[sorted_features]
        order, rank, sorted_features = (x[rank < keep] for x in (order, rank, sorted_features))
        slots = sorted_features * keep + rank
        self.keys.view(-1)[slots] = keys[order]
        for name, new in (("where", where), ("values", values)):
            table: Tensor = getattr(self, name)
            flat = table.view(n_features * keep, table.shape[2])
            flat[slots] = torch.cat([flat[held], new])[order]
