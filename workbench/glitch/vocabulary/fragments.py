"""Which tokens are parts of longer ones, and which share their text: the commonest reasons for an untrained token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from workbench.glitch.vocabulary.tokenizer import Vocabulary

_BASE, _WORD = 0x9E3779B97F4A7C15, 2**64


def superstrings(raw: Sequence[str | None], wanted: Sequence[int], limit: int = 5) -> dict[int, tuple[int, ...]]:
    """The first `limit` tokens with a higher id whose vocabulary string contains the wanted one; absent without any.

    A merge that exists only on the way to a longer token is never given by text that holds the longer one; in BPE the
    longer one comes later, so only higher ids count. Every window of every string is hashed once, so the cost does not
    depend on how many tokens are wanted.
    Source: Land and Bartolo 2024 list the same tokens, by a search through the vocabulary for each.

    >>> superstrings(["a", "ab", "cab", "b", "abd"], [1, 3])  # "b" is also in "ab" and "cab", whose ids are lower
    {1: (2, 4), 3: (4,)}
    """
    asked = [i for i in dict.fromkeys(int(i) for i in wanted) if raw[i]]
    longer_of: dict[int, tuple[int, ...]] = {}
    sizes = {len(raw[i] or "") for i in asked}
    for size, owner, value in _windows(raw, max(sizes, default=0)):
        if size not in sizes:
            continue
        known = {_hash(raw[i] or ""): i for i in asked if len(raw[i] or "") == size}
        keys = np.sort(np.fromiter(known, dtype=np.uint64))
        at = np.searchsorted(keys, value).clip(max=len(keys) - 1)
        hit = keys[at] == value
        pairs = np.unique(np.stack([at[hit], owner[hit]], axis=1), axis=0)
        for k, key in enumerate(keys.tolist()):
            i = known[key]
            holders = pairs[np.searchsorted(pairs[:, 0], k) : np.searchsorted(pairs[:, 0], k + 1), 1]
            longer = [h for h in holders[holders > i][: limit + 1].tolist() if (raw[i] or "") in (raw[h] or "")][:limit]
            if longer:
                longer_of[i] = tuple(longer)
    return {i: longer_of[i] for i in asked if i in longer_of}


def _windows(raw: Sequence[str | None], largest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each size up to `largest`: the token that holds each window of so many characters, and the window's hash."""
    text = "".join(token or "" for token in raw).encode("utf-32-le", "surrogatepass")
    chars = np.frombuffer(text, dtype=np.uint32).astype(np.uint64)
    length = np.array([len(token or "") for token in raw], dtype=np.int64)
    owner = np.repeat(np.arange(len(raw)), length)
    left = np.repeat(np.cumsum(length), length) - np.arange(len(chars))
    place, value = np.arange(len(chars)), np.zeros(len(chars), dtype=np.uint64)
    for size in range(1, largest + 1):
        fits = left[place] >= size
        place = place[fits]
        value = value[fits] * np.uint64(_BASE) + chars[place + (size - 1)] + np.uint64(1)
        yield size, owner[place], value


def _hash(text: str) -> int:
    value = 0
    for char in text:
        value = (value * _BASE + ord(char) + 1) % _WORD
    return value


def same_text(vocabulary: Vocabulary) -> tuple[tuple[int, ...], ...]:
    """Sets of two or more ids that decode to the same text, of which no text gives at least one.

    Tokens that all are reachable differ by their place, such as a piece that begins a word and one that continues it.
    Incomplete characters are left out: their text is how they are shown, not what they stand for.
    """
    by_text: dict[str, list[int]] = {}
    for i, (text, category) in enumerate(zip(vocabulary.text, vocabulary.category, strict=True)):
        if text and category not in ("no_token", "partial_utf8"):
            by_text.setdefault(text, []).append(i)
    hidden = ~vocabulary.is_category("ok", "special")
    return tuple(tuple(ids) for ids in by_text.values() if len(ids) > 1 and hidden[ids].any())
