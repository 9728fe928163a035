"""How a token's text is written with other tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from workbench.core.errors import ShapeError

Pieces = tuple[int, ...]


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
        self._of: dict[bytes, int] = {}
        for i in np.flatnonzero(allowed).tolist():
            if texts[i]:
                self._of.setdefault(texts[i], i)
        self._longest = max(map(len, self._of), default=0)

    def __call__(self, text: bytes, without: int = -1) -> Pieces | None:
        """The pieces of a text, or None if it can't be written.

        Args:
            text: what to write.
            without: a token that must not be used, such as the one whose text this is.
        """
        best: list[tuple[int, int, Pieces] | None] = [(0, 0, ()), *[None] * len(text)]
        for end in range(1, len(text) + 1):
            for start in range(max(0, end - self._longest), end):
                before, piece = best[start], self._of.get(text[start:end])
                if before is None or piece is None or piece == without:
                    continue
                found = (before[0] + 1, before[1] + piece, (*before[2], piece))
                best[end] = found if best[end] is None else min(best[end] or found, found)
        done = best[len(text)]
        return None if done is None else done[2]
