"""How a token's text is written with other tokens."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from workbench.core.errors import ShapeError

Pieces = tuple[int, ...]
Cost = tuple[int, int, int]
ByText = Mapping[bytes, Sequence[tuple[int, int]]]
"""Ids that write a text, each with 0 if it is whole text and 1 if it is a byte or half a character."""


def segmentations(text: bytes, ids: ByText, n: int, without: int = -1) -> tuple[Pieces, ...]:
    """The first `n` ways to write a text, cheapest first: fewest pieces, then fewest that are not whole text, low ids.

    Args:
        text: what to write.
        ids: the pieces that are allowed.
        n: ways that are kept, here and for each beginning of the text.
        without: a token that must not be used, such as the one whose text this is.
    """
    best: list[list[tuple[Cost, Pieces]]] = [[((0, 0, 0), ())], *([] for _ in text)]
    longest = max(map(len, ids), default=0)
    for end in range(1, len(text) + 1):
        options = (
            ((cost[0] + 1, cost[1] + odd, cost[2] + i), (*before, i))
            for start in range(max(0, end - longest), end)
            for odd, i in ids.get(text[start:end], ()) if i != without
            for cost, before in best[start]
        )  # fmt: skip
        best[end] = heapq.nsmallest(n, options)
    return tuple(pieces for _, pieces in best[-1])


class Speller:
    """Writes texts with the allowed tokens of a vocabulary, in as few of them as possible.

    Of equally many pieces it takes those with the lower ids, which in most vocabularies are the more frequent ones.
    Spelling is by bytes, so half characters can be pieces where they are allowed.

    >>> speller = Speller([b"a", b"b", b"ab", b"abb"], np.array([True, True, True, False]))
    >>> speller(b"abb"), speller(b"ac")
    ((2, 1), None)
    """

    def __init__(self, texts: Sequence[bytes], allowed: Bool[np.ndarray, " ids"]) -> None:
        if len(allowed) > len(texts):
            raise ShapeError(f"Speller: {len(allowed)} flags for {len(texts)} tokens; give one per token.")
        self._ids: dict[bytes, list[tuple[int, int]]] = {}
        for i in np.flatnonzero(allowed).tolist():
            if texts[i]:
                self._ids.setdefault(texts[i], [(0, i)])

    def __call__(self, text: bytes, without: int = -1) -> Pieces | None:
        """The pieces of a text, or None if it can't be written."""
        return next(iter(segmentations(text, self._ids, 1, without)), None)
