"""Tokens of long texts with the place of each in the text, window by window, as if the text were encoded in one go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.activations.files import SUFFIXES, documents
from workbench.core.codec import Codec, FastCodec, bytes_of

WINDOW = 1 << 16
"""Characters encoded at a time."""
MARGIN = 1 << 10
"""Characters of context on both sides of a seam: tokens depend on their neighbourhood only."""

_HALVES = re.compile("[\ud800-\udfff]")

Spans = list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Piece:
    """Part of a text with its tokens.

    Attributes:
        text: characters around the part, context included.
        start: position of `text[0]` in the whole text.
        begin: first position that belongs to this part.
    """

    text: str
    start: int
    begin: int
    end: int
    ids: list[int]
    spans: Spans

    def around(self, start: int, end: int, context: int = 24) -> str:
        """The text of a place, with `context` characters on each side."""
        return self.text[max(0, start - self.start - context) : max(0, end - self.start) + context]


def encodable(text: str) -> str:
    """The text with each half of a character replaced by one sign, so that positions stay: no tokenizer takes halves.

    >>> encodable("a" + chr(0xdc80) + "b")
    'a�b'
    """
    return text if text.isascii() else _HALVES.sub("�", text)


def encode_spans(codec: Codec, texts: Sequence[str]) -> list[tuple[list[int], Spans]]:
    """Ids of each text and where each token stands in it; nothing is added.

    A tokenizer without a `tokenizers` backend does not say where: its tokens are looked for one after the other.
    """
    texts = [encodable(text) for text in texts]
    if isinstance(codec, FastCodec):
        encodings = codec.backend.encode_batch(texts, add_special_tokens=False)
        return [(list(one.ids), list(one.offsets)) for one in encodings]
    pieces = bytes_of(codec)
    return [
        (ids, _search(text, [pieces[i] for i in ids])) for text, ids in zip(texts, codec.encode(texts), strict=True)
    ]


def _search(text: str, pieces: Sequence[bytes], reach: int = 64) -> Spans:
    """Where each piece is found, from the end of the one before on; an empty span where it is not."""
    spans, at = [], 0
    for piece in pieces:
        wanted = piece.decode("utf-8", errors="ignore").strip()
        place = text.find(wanted, at, at + reach + len(wanted)) if wanted else -1
        spans.append((at, at) if place < 0 else (place, place + len(wanted)))
        at = spans[-1][1]
    return spans


def windows(codec: Codec, parts: Iterable[str]) -> Iterator[Piece]:
    """The tokens of a text that comes in parts, in memory bounded by `WINDOW`.

    Neighbouring windows overlap by two margins and are joined at a token border that both have, so the tokens are
    those of the whole text wherever a token depends on no more than `MARGIN` characters on either side.
    """
    done, before = 0, None
    for start, text in _overlapping(parts):
        ((ids, spans),) = encode_spans(codec, [text])
        now = Piece(text, start, start, start + len(text), ids, [(a + start, b + start) for a, b in spans])
        if before is not None:
            # the first token border that both windows have, at least a margin away from where the later one starts
            borders = {a for a, _ in now.spans if a >= start + MARGIN}
            seam = next((a for a, _ in before.spans if a in borders), start + MARGIN)
            yield _cut(before, done, seam)
            done = seam
        before = now
    if before is not None:
        yield _cut(before, done, before.end)


def _overlapping(parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    held, start, size = "", 0, WINDOW + 2 * MARGIN
    waiting: list[str] = []
    length = 0
    for part in parts:
        waiting.append(part)
        length += len(part)
        if len(held) + length < size + 1:
            continue
        held, waiting, length = held + "".join(waiting), [], 0
        at = 0
        while len(held) - at > size:
            yield start + at, held[at : at + size]
            at += size - 2 * MARGIN
        held, start = held[at:], start + at
    held += "".join(waiting)
    if held:
        yield start, held


def _cut(piece: Piece, begin: int, end: int) -> Piece:
    kept = [k for k, (a, _) in enumerate(piece.spans) if begin <= a < end or (a == end == piece.end)]
    ids, spans = [piece.ids[k] for k in kept], [piece.spans[k] for k in kept]
    return Piece(piece.text, piece.start, begin, end, ids, spans)


def numbered_texts(path: Path, column: str) -> Iterator[tuple[int, Iterable[str]]]:
    """Number of each document of a file and its text, in parts: .jsonl and .parquet hold one per record.

    Bytes of a text file that are no UTF-8 come as halves of characters, so that nothing is lost or moved.
    """
    if path.suffix in SUFFIXES[1:]:
        yield from ((number, (text,)) for number, text in enumerate(documents(path, column), 1))
    else:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield 1, iter(lambda: file.read(WINDOW), "")
