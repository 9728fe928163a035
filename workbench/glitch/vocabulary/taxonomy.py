"""What kind of text a token is: words, letters, other characters, another script, a byte; and what it is a part of."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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
    texts = {int(i): text for i in wanted if (text := raw[i])}
    longer_of: dict[int, tuple[int, ...]] = {}
    for size, owner, value in _windows(raw, max(map(len, texts.values()), default=0)):
        known = {_hash(text): i for i, text in texts.items() if len(text) == size}
        if not known:
            continue
        keys = np.sort(np.fromiter(known, dtype=np.uint64))
        at = np.searchsorted(keys, value).clip(max=len(keys) - 1)
        hit = keys[at] == value
        pairs = np.unique(np.stack([at[hit], owner[hit]], axis=1), axis=0)
        for k, key in enumerate(keys.tolist()):
            i = known[key]
            holders = pairs[np.searchsorted(pairs[:, 0], k) : np.searchsorted(pairs[:, 0], k + 1), 1]
            longer = [h for h in holders[holders > i][: limit + 1].tolist() if texts[i] in (raw[h] or "")][:limit]
            if longer:
                longer_of[i] = tuple(longer)
    return {i: longer_of[i] for i in texts if i in longer_of}


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


Kind = Literal["word", "letter", "character", "letter_character", "special", "byte", "space", "empty"]
KINDS: dict[str, str] = {
    "word": "one word, or several joined: ASCII letters that split into words of the vocabulary",
    "letter": "ASCII letters that are no such words",
    "character": "ASCII without letters",
    "letter_character": "ASCII letters and other characters",
    "special": "holds a character outside ASCII",
    "byte": "a single byte, or an incomplete character",
    "space": "white space only",
    "empty": "decodes to nothing",
}
"""Kinds after Li et al. 2024 (word, letter, character, letter-character, special), with three that they leave out."""
_MIN_PART = 4
_STRAY = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Nature:
    """What a token is; `script` is that of most of its letters, `part_of` are ids whose text holds its own."""

    kind: Kind
    script: str
    words: tuple[str, ...] = ()
    part_of: tuple[int, ...] = ()


def kind_of(text: str, words: Collection[str] = (), *, is_byte: bool = False) -> Kind:
    """The kind of a token's text, with stray bytes as <0xNN>; letters may be made of the lower-case `words`.

    >>> [kind_of(t, {"quick", "ship"}) for t in (" quickShip", "davidjl", '="', "v2", " réalis", "<0xE2>", " ", "")]
    ['word', 'letter', 'character', 'letter_character', 'special', 'byte', 'space', 'empty']
    """
    if not text:
        return "empty"
    if is_byte or _STRAY.search(text):
        return "byte"
    if text.isspace():
        return "space"
    bare = text.strip()
    if not bare.isascii():
        return "special"
    if bare.isalpha():
        return "word" if split_words(bare, words) else "letter"
    return "letter_character" if any(c.isalpha() for c in bare) else "character"


def split_words(text: str, words: Collection[str]) -> tuple[str, ...]:
    """The text as a few known words side by side, empty if it is not made of such.

    A single word may be short; joined ones have at least four letters each, since shorter ones fit anywhere.

    >>> split_words("newReleases", {"new", "news", "releases"}), split_words("oldHouseKeeper", {"house", "keeper"})
    ((), ())
    >>> split_words("houseKeeper", {"house", "keeper", "keep"}), split_words("an", {"an"})
    (('house', 'Keeper'), ('an',))
    """
    low = text.lower()
    if low in words:
        return (text,)
    best: list[tuple[str, ...] | None] = [(), *[None] * len(text)]
    for end in range(_MIN_PART, len(text) + 1):
        for start in range(end - _MIN_PART + 1):
            before, shortest = best[start], best[end]
            if before is None or low[start:end] not in words:
                continue
            if shortest is None or len(before) + 1 < len(shortest):
                best[end] = (*before, text[start:end])
    return best[-1] or ()


@functools.lru_cache(maxsize=4096)
def script_of(text: str) -> str:
    """The script of most letters, by the first word of their Unicode names.

    >>> script_of("réalis"), script_of("Привет"), script_of("日本"), script_of("==")
    ('LATIN', 'CYRILLIC', 'CJK', 'none')
    """
    names = Counter(unicodedata.name(c, "UNKNOWN").split()[0] for c in text if c.isalpha())
    return names.most_common(1)[0][0] if names else "none"


def lexicon(vocabulary: Vocabulary, without: Collection[int] = ()) -> frozenset[str]:
    """Words that the vocabulary holds with a space in front, lower case, apart from tokens that are under suspicion.

    In a vocabulary without such spaces (WordPiece) a token begins a word if it is stored as it reads, without a mark.
    """
    ordinary = np.flatnonzero(vocabulary.is_category("ok")).tolist()
    texts = {i: vocabulary.text[i] for i in ordinary}
    begins = {i: text[1:] for i, text in texts.items() if text[:1] == " "}
    begins = begins or {i: text for i, text in texts.items() if text == vocabulary.raw[i]}
    words = (begins[i] for i in begins.keys() - set(without))
    return frozenset(word.lower() for word in words if len(word) > 1 and word.isascii() and word.isalpha())


def natures(vocabulary: Vocabulary, ids: Sequence[int], suspects: Collection[int] = ()) -> dict[int, Nature]:
    """The nature of some tokens; `suspects`, whose text may be no word of any language, are not taken as words."""
    words, n = lexicon(vocabulary, suspects), len(vocabulary)
    # A single character is a part of nearly everything, which says nothing about it.
    longer = superstrings(vocabulary.raw, [i for i in ids if i < n and len(vocabulary.raw[i] or "") > 1])
    nature_of = {}
    for i in map(int, ids):
        text = vocabulary.text[i] if i < n else ""
        kind = kind_of(text, words, is_byte=i < n and bool(vocabulary.byte[i] >= 0))
        split = split_words(text.strip(), words) if kind == "word" else ()
        nature_of[i] = Nature(kind, "none" if kind == "byte" else script_of(text), split, longer.get(i, ()))
    return nature_of
