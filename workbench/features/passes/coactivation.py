"""Sparse activations of as many tokens as fit, for comparing features on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.features.passes.sampling import uniform

_ROWS = 0xC0AC


@dataclass(frozen=True, eq=False)
class CoSample:
    """Activations of all features on some tokens.

    Attributes:
        token: of each entry, numbered from 0 without gaps.
        feature: of each entry.
        value: its activation.
        n_tokens: tokens of the packed rows that were kept, active or not.
        share: of the packed rows that was kept; 1 means all.
        n_features: how many features were read.
    """

    token: Int[Tensor, " entries"]
    feature: Int[Tensor, " entries"]
    value: Float[Tensor, " entries"]
    n_tokens: int
    share: float
    n_features: int


class CoActivationSample:
    """All activations, until there are too many; then those of half of the packed rows, and so on.

    Which rows stay is decided by a hash of the row, so the result depends on nothing but the limit and the seed.
    """

    def __init__(self, n_features: int, limit: int, seed: int) -> None:
        self._n_features, self._limit, self._seed = n_features, limit, seed
        self._share, self._entries = 1.0, 0
        self._parts: list[tuple[Tensor, ...]] = []
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(
        self,
        row: Int[Tensor, " entries"],
        token: Int[Tensor, " entries"],
        feature: Int[Tensor, " entries"],
        value: Float[Tensor, " entries"],
        rows: Int[Tensor, " tokens"],
    ) -> None:
        """Takes the entries of whole packed rows; `rows` is the packed row of every kept token."""
        if not self._limit:
            return
        drawn = uniform(row, _ROWS, self._seed)
        numbers, counts = rows.unique_consecutive(return_counts=True)
        self._parts.append((drawn, token, feature.int(), value))
        self._kept.append((uniform(numbers, _ROWS, self._seed), counts))
        self._thin_last()
        while self._entries > self._limit:
            self._share /= 2
            self._thin()

    def _thin_last(self) -> None:
        chosen = self._parts[-1][0] < self._share
        self._parts[-1] = tuple(x[chosen] for x in self._parts[-1])
        self._entries += len(self._parts[-1][0])
        drawn, counts = self._kept[-1]
        self._kept[-1] = (drawn[drawn < self._share], counts[drawn < self._share])

    def _thin(self) -> None:
        parts, kept = self._parts, self._kept
        self._parts, self._kept, self._entries = [], [], 0
        for part, rows in zip(parts, kept, strict=True):
            self._parts.append(part)
            self._kept.append(rows)
            self._thin_last()

    def result(self) -> CoSample:
        """What is left."""
        if not self._parts:
            empty = torch.zeros(0, dtype=torch.long)
            return CoSample(empty, empty, torch.zeros(0), 0, 0.0, self._n_features)
        _, token, feature, value = (torch.cat(column) for column in zip(*self._parts, strict=True))
        numbers, place = token.unique(return_inverse=True)
        del numbers
        n_tokens = sum(int(counts.sum()) for _, counts in self._kept)
        return CoSample(place, feature.long(), value, n_tokens, self._share, self._n_features)
