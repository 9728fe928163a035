"""A bounded sample of sparse activations, to compare features on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.features.passes.sampling import uniform

_ROWS = 0xC0AC


@dataclass(frozen=True, eq=False, kw_only=True)
class CoSample:
    """Activations of all features on some tokens.

    Attributes:
        token: of each entry, numbered from 0 without gaps.
        value: activation of each entry.
        n_tokens: tokens of the packed rows in the sample, active or not.
        share: of the packed rows that are in the sample; 1 means all.
    """

    token: Int[Tensor, " entries"]
    feature: Int[Tensor, " entries"]
    value: Float[Tensor, " entries"]
    n_tokens: int
    share: float
    n_features: int


class CoActivationSample:
    """Collects all activations up to a limit, then those of half of the packed rows, of a quarter, and so on.

    A hash of the row decides which rows stay, so the result depends only on the limit and the seed.
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
        """Adds the entries of whole packed rows; `rows` is the packed row of every kept token, active or not."""
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
        """The sample, with a share of 0 if nothing was added."""
        none = torch.zeros(0, dtype=torch.long)
        columns = zip(*(self._parts or [(none, none, none, torch.zeros(0))]), strict=True)
        _, token, feature, value = (torch.cat(column) for column in columns)
        return CoSample(
            token=token.unique(return_inverse=True)[1], feature=feature.long(), value=value,
            n_tokens=sum(int(counts.sum()) for _, counts in self._kept),
            share=self._share if self._parts else 0.0, n_features=self._n_features,
        )  # fmt: skip
