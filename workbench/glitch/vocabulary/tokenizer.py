"""What each token id is: text that the tokenizer can produce, a byte, half a character, a special, or unreachable."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from workbench.core.codec import BYTE_OF_CHAR, ByteStyle, Codec, codec_of, token_bytes
from workbench.core.errors import DegenerateInputError
from workbench.models.model import Model


@dataclass(frozen=True, eq=False)
class Survival:
    """Which characters come back from encode and decode, alone or between letters; each is tried once.

    A character is lost if it never comes back, or if normalisation removes it; white space is lost if the words beside
    it come back changed or glued together, though a plain space keeps them apart. Spaces that decoding adds, as
    WordPiece does around signs, and other changes by normalisation (case, accents, compatibility forms) are no loss.
    `bad` maps the lost characters that were `seen` to what comes back for `between`.
    """

    codec: Codec
    seen: set[str] = field(default_factory=set)
    bad: dict[str, str] = field(default_factory=dict)

    def lost(self, text: str) -> set[str]:
        """Characters of the text that are lost."""
        present = {char for char in set(text) if not is_half(char)}
        new = sorted(present - self.seen)
        if new:
            trials = [[char, between(char), f" {char} "] for char in (*new, " ", "")]
            flat = list(itertools.chain(*trials))
            ids = self.codec.encode(flat)
            back = self.codec.decode(ids)
            apart, glued = ((ids[row], back[row]) for row in (-5, -2))
            for k, char in enumerate(new):
                row = 3 * k + 1
                same = [self._same(flat[at], back[at]) for at in (row - 1, row, row + 1)]
                if char.isspace():
                    is_glued = ids[row] == glued[0] or (back[row] == glued[1] != apart[1])
                    failed = is_glued or not same[1]
                else:
                    bare = self.codec.normalize(between(""))
                    failed = not any(same) or self.codec.normalize(between(char)) == bare
                if failed:
                    self.bad[char] = back[row]
            self.seen.update(new)
        return present & self.bad.keys()

    def _same(self, text: str, back: str) -> bool:
        return "".join(self.codec.normalize(text).split()) == "".join(self.codec.normalize(back).split())


def between(char: str) -> str:
    """A character between two letters, as it is tried and shown."""
    return f"a{char}b"


def is_half(char: str) -> bool:
    r"""Whether it is half a surrogate pair, which is no character.

    >>> is_half("\ud800"), is_half("a")
    (True, False)
    """
    return "\ud800" <= char <= "\udfff"


CATEGORIES: dict[str, str] = {
    "ok": "re-encodes to itself in some context",
    "special": "marked special by the tokenizer, and reachable",
    "unreachable_special": "looks like a special, but no text gives it",
    "partial_utf8": "holds an incomplete character; only part of a longer sequence",
    "unreachable_single": "its text always encodes to one other token",
    "unreachable_multi": "its text always encodes to several other tokens",
    "dropped": "its text encodes to nothing",
    "no_token": "a row of the matrix without a token (padding)",
    "no_row": "a token without a row in the matrix",
}
"""Every category, in the order in which reports list them, with what it means."""

IMPOSSIBLE_BYTES = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
"""Bytes that valid UTF-8 never holds, so no training text can."""

_RESERVED = re.compile(
    r"^(?:<|\[|>>)[|｜]?\w*?(?:unused|reserved|dummy|place▁?holder|madeupword|extra_(?:id_)?\d|pad_?\d|special_?\d"
    r"|control_\d)[\w\- ▁]*[|｜]?(?:>|\]|<<)$",
    re.IGNORECASE,
)
_SPACES = (" ", "▁", "Ġ")
"""How vocabularies write a space: as it is, as SentencePiece does, and as byte-level BPE does."""
_ANCHORS = ("«", "»", "a", "1", ".", "\n", "(", "é", " a", "=")
_CONTEXTS = (
    ("", ""), *((before, "") for before in _ANCHORS), ("", "a"), ("", "1"), ("", "\n"), ("", "☃"), ("«", "☃"),
)  # fmt: skip
_IN_WORDS = (
    *((before, "") for before in "bcdefghijklmnopqrstuvwxyz023456789"), ("", "q"), ("", "z"), ("a", "a"), ("x", "x"),
)  # fmt: skip
"""What stands before and after a token when its reachability is tried: a piece of a word needs the rest of one."""


@dataclass(frozen=True)
class LossyByte:
    """A byte that this tokenizer loses: `text` does not come back from encode and decode."""

    byte: int
    text: str
    back: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Vocabulary:
    """The tokenizer's side of a scan; index = token id, up to the largest id with a token.

    Attributes:
        raw: vocabulary strings as stored; None for an id without a token.
        text: what each token decodes to in context, leading space kept; incomplete bytes shown as <0xNN>.
        byte: the byte of a single-byte token, -1 for others.
        reserved: whether the name says that the id is kept for later (<unused7>, <|reserved_special_token_3|>).
        missing_bytes: bytes without a single-byte token (byte-level and byte-fallback vocabularies only).
    """

    raw: tuple[str | None, ...]
    text: tuple[str, ...]
    category: tuple[str, ...]
    byte: np.ndarray
    reserved: np.ndarray
    missing_bytes: tuple[int, ...]
    lossy: tuple[LossyByte, ...]
    style: ByteStyle
    adds_space: bool

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def digest(self) -> str:
        """Sixteen hex digits of all vocabulary strings with their ids: the same for the same vocabulary."""
        return hashlib.sha256(json.dumps(self.raw).encode()).hexdigest()[:16]

    @property
    def n_tokens(self) -> int:
        """Number of ids that have a token."""
        return sum(raw is not None for raw in self.raw)

    def is_category(self, *names: str) -> np.ndarray:
        """Boolean per id: whether its category is one of `names`."""
        return np.isin(np.asarray(self.category), names)

    @property
    def ordinary(self) -> np.ndarray:
        """Boolean per id: reachable text tokens that are neither special nor named as reserved."""
        return self.is_category("ok") & ~self.reserved

    def pool(self, n_rows: int, avoid: Iterable[int]) -> np.ndarray:
        """Ids of ordinary tokens that a model with so many rows takes, in order, apart from some."""
        return np.setdiff1d(np.flatnonzero(self.ordinary[:n_rows]), list(avoid))


def draw_controls(pool: Sequence[int] | np.ndarray, n: int, seed: int) -> list[int]:
    """Random ids of a pool without replacement, all of them if it holds fewer than `n`."""
    return np.random.default_rng(seed).choice(pool, min(n, len(pool)), replace=False).tolist()


def matched_controls(
    model: Model, vocabulary: Vocabulary, tokens: Sequence[int], avoid: set[int], n: int, seed: int
) -> list[list[int]]:
    """For each token, `n` random ordinary ones with a leading space if it has one, and as near its length as there are.

    Raises:
        DegenerateInputError: if there are not enough ordinary tokens.
    """
    texts = token_bytes(model.tokenizer)
    pool = vocabulary.pool(model.d_vocab, avoid)
    random = np.random.default_rng(seed)
    spaced = np.array([texts[i][:1] == b" " for i in pool], dtype=bool)
    length = np.array([len(texts[i]) for i in pool])
    free, controls = np.ones(len(pool), dtype=bool), []
    for i in tokens:
        fits = np.flatnonzero(free & (spaced == (texts[i][:1] == b" ")))
        fits = np.flatnonzero(free) if len(fits) < n else fits
        if len(fits) < n:
            raise DegenerateInputError(
                f"There are {len(pool)} ordinary tokens for {len(tokens)} x {n} controls. Ask for fewer."
            )
        order = np.lexsort((random.random(len(fits)), np.abs(length[fits] - len(texts[i]))))
        chosen = fits[order[:n]]
        free[chosen] = False
        controls.append(pool[chosen].tolist())
    return controls


def vocabulary_of(model: Model) -> Vocabulary:
    """The analysis of a model's tokenizer."""
    return analyse(codec_of(model.tokenizer))


def analyse(codec: Codec) -> Vocabulary:
    """Categorises every token by decoding it in context and encoding the result again.

    A token counts as reachable if *some* context gives it: alone, or after one of a few anchor texts. So tokens with
    a leading space are judged with the space that they have in running text, also where the tokenizer strips one,
    and pieces that only continue or only begin a word with the rest of a word.
    Source: Land and Bartolo 2024, section 2.1; departs from it by trying several contexts before it says unreachable.
    """
    ids = [i for i, raw in enumerate(codec.raw) if raw is not None]
    # whether encode puts a space in front of a text, and whether tokens hold the one in front of a word: one that
    # decode strips has to be brought back
    test, words = ([(codec.raw[i] or "").startswith(_SPACES) for i in row] for row in codec.encode(["test", "a test"]))
    adds_space, writes_space = any(test[:1]), any(words)
    needs_anchor = adds_space or (writes_space and codec.decode(codec.encode([" test"])) != [" test"])
    anchor = _anchor(codec) if needs_anchor else ((), "")
    decoded = _decode_in_context(codec, ids, anchor)
    byte = np.array([-1 if raw is None else _byte_of(raw, codec.style) for raw in codec.raw], dtype=np.int64)
    if codec.style == "raw_bytes":  # decoding may drop half a character, and with it the token
        decoded = [
            shown if byte[i] < 0 else bytes([byte[i]]).decode(errors="replace")
            for i, shown in zip(ids, decoded, strict=True)
        ]
    if codec.style == "none" and not writes_space:
        decoded = _without_mark(codec, ids, decoded)
    back = _second_chance(codec, ids, decoded, _encode_in_context(codec, decoded, anchor))
    n = len(codec.raw)
    text, category = [""] * n, ["no_token"] * n
    for i, shown, again in zip(ids, decoded, back, strict=True):
        raw = codec.raw[i] or ""
        category[i] = _category(i, shown, again, codec.special)
        text[i] = _readable(raw, codec.style) if "�" in shown else shown
    reserved = np.array([raw is not None and bool(_RESERVED.match(raw)) for raw in codec.raw])
    missing = () if codec.style == "none" else tuple(sorted(set(range(256)) - set(byte.tolist())))
    return Vocabulary(
        raw=codec.raw, text=tuple(text), category=tuple(category), byte=byte, reserved=reserved,
        missing_bytes=missing, lossy=lossy_bytes(codec), style=codec.style, adds_space=adds_space,
    )  # fmt: skip


def _category(i: int, text: str, back: list[int] | None, special: frozenset[int]) -> str:
    if back == [i]:
        return "special" if i in special else "ok"
    if len(text) >= 3 and text[0] in "[<" and text[-1] in "]>" and any(c.isalpha() for c in text):
        return "unreachable_special"
    if "�" in text:
        return "partial_utf8"
    if not back:
        return "dropped"
    return "unreachable_single" if len(back) == 1 else "unreachable_multi"


Anchor = tuple[tuple[int, ...], str]


def _anchor(codec: Codec) -> Anchor:
    """Ids and decoded text of the first anchor that stays whole when a word follows it; empty if none does."""
    for text in _ANCHORS:
        alone, followed = codec.encode([text, text + "test"])
        if alone and followed[: len(alone)] == alone:
            return tuple(alone), codec.decode([alone])[0]
    return (), ""


def _decode_in_context(codec: Codec, ids: Sequence[int], anchor: Anchor) -> list[str]:
    prefix, shown = anchor
    texts = codec.decode([[*prefix, i] for i in ids])
    if not prefix:
        return texts
    alone = codec.decode([[i] for i in ids])
    return [full[len(shown) :] if full.startswith(shown) else one for full, one in zip(texts, alone, strict=True)]


def _encode_in_context(codec: Codec, texts: Sequence[str], anchor: Anchor) -> list[list[int] | None]:
    prefix, shown = anchor
    rows = codec.encode([shown.lstrip(" ") + text if prefix else text for text in texts])
    return [ids[len(prefix) :] if tuple(ids[: len(prefix)]) == prefix else None for ids in rows]


def _without_mark(codec: Codec, ids: Sequence[int], alone: list[str]) -> list[str]:
    """Continuation pieces (WordPiece's ##ing) as they read inside a word; other tokens as they read alone."""
    word = tuple(codec.encode(["a"])[0])
    inside = _decode_in_context(codec, ids, (word, codec.decode([word])[0]))
    prefix, suffix = codec.marks
    if prefix or suffix:
        inside = alone = [one.removeprefix(prefix).removesuffix(suffix) or one for one in alone]
    return [one if full.lstrip(" ") == one.lstrip(" ") else full for full, one in zip(inside, alone, strict=True)]


def _second_chance(
    codec: Codec, ids: Sequence[int], decoded: Sequence[str], back: list[list[int] | None]
) -> list[list[int] | None]:
    """Tries other contexts for tokens that did not come back; a token is reachable if any text gives it."""
    result = list(back)
    left = [k for k, i in enumerate(ids) if back[k] != [i] and "�" not in decoded[k]]
    for before, after in _CONTEXTS + (_IN_WORDS if codec.style == "none" else ()):
        if not left:
            break
        tried = codec.encode([before + decoded[k] + after for k in left])
        for k, again in zip(left, tried, strict=True):
            if ids[k] in again:
                result[k] = [ids[k]]
            elif result[k] is None and not before + after:
                result[k] = again
        left = [k for k in left if result[k] != [ids[k]]]
    return [[] if again is None else again for again in result]


_HEX_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


def _byte_of(raw: str, style: ByteStyle) -> int:
    """The byte that a token stands for, or -1.

    >>> _byte_of("Ġ", "byte_level"), _byte_of("<0x0A>", "byte_fallback"), _byte_of("ab", "byte_level")
    (32, 10, -1)
    """
    if style == "raw_bytes":
        return ord(raw) if len(raw) == 1 and raw < "\u0100" else -1
    if style == "byte_level":
        return BYTE_OF_CHAR.get(raw, -1)
    written = _HEX_TOKEN.match(raw)
    return int(written[1], 16) if style == "byte_fallback" and written else -1


def _readable(raw: str, style: ByteStyle) -> str:
    if style == "raw_bytes" and len(raw) == 1:
        return f"<0x{ord(raw):02X}>"
    if style != "byte_level" or any(c not in BYTE_OF_CHAR for c in raw):
        return raw
    data = bytes(BYTE_OF_CHAR[c] for c in raw)
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c
                   for c in data.decode("utf-8", errors="surrogateescape"))  # fmt: skip


def lossy_bytes(codec: Codec) -> tuple[LossyByte, ...]:
    """Bytes of valid UTF-8 whose characters do not survive encode and decode.

    Each is tried in several characters that need it; a byte is lossy if every one of them is lost.
    """
    tried = {byte: chars for byte in range(256) if (chars := _characters_with(byte))}
    survival = Survival(codec)
    lost = survival.lost("".join(char for chars in tried.values() for char in chars))
    return tuple(
        LossyByte(byte, between(chars[0]), survival.bad[chars[0]])
        for byte, chars in tried.items() if lost.issuperset(chars)
    )  # fmt: skip


def _characters_with(byte: int) -> list[str]:
    """Some characters whose UTF-8 form holds the byte; empty for bytes that valid UTF-8 never holds.

    >>> [hex(ord(c)) for c in _characters_with(0xF1)][:1]
    ['0x40000']
    """
    if byte < 0x80:
        return [chr(byte)]
    if byte in IMPOSSIBLE_BYTES:
        return []
    if byte < 0xC0:
        candidates = [bytes((lead, byte)) for lead in (0xC2, 0xC3, 0xCE, 0xD0, 0xD7)]
    elif byte < 0xE0:
        candidates = [bytes((byte, tail)) for tail in (0x80, 0x93, 0xB1)]
    elif byte < 0xF0:
        candidates = [bytes((byte, middle, tail)) for middle in (0x80, 0x9F, 0xA0) for tail in (0x80, 0xA7)]
    else:
        candidates = [bytes((byte, second, 0x80, tail)) for second in (0x80, 0x8F, 0x90) for tail in (0x80, 0xA7)]
    return [text for data in candidates if (text := data.decode("utf-8", errors="ignore"))]
