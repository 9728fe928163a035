"""The same text in other tokens: flagged ids are cut into pieces that decode to exactly what they decoded to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from workbench.core.codec import Codec, bytes_of
from workbench.core.errors import InvalidInputError
from workbench.core.tokens import TokenBatch
from workbench.glitch.vocabulary.segments import ByText, Pieces, segmentations
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.model import Model
from workbench.models.wrapped import Texts

_KEPT = 8
"""Alternative segmentations tried per token, shortest first."""
_AROUND = 6


@dataclass(frozen=True)
class Sanitized:
    """New ids that decode to the same text: position, old id and pieces of each cut, and where no cut is possible."""

    ids: tuple[int, ...]
    replaced: tuple[tuple[int, int, Pieces], ...]
    impossible: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Sanitizer:
    """Cuts flagged tokens into others.

    Feed the ids to the model: text would be cut into the flagged tokens again.

    Attributes:
        pieces: the ids that may stand in for others, by what they write; those that are not whole text marked with 1.
    """

    codec: Codec
    flagged: frozenset[int]
    written: tuple[bytes, ...] = field(repr=False)
    pieces: ByText = field(repr=False)
    _known: dict[int, tuple[Pieces, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, codec: Codec, flagged: Iterable[int]) -> Sanitizer:
        """A sanitizer that uses ordinary tokens first and bytes or halves of characters only where it must."""
        avoid = frozenset(int(i) for i in flagged)
        vocabulary = analyse(codec)
        ids_of: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
        every = bytes_of(codec)
        for i, written in enumerate(every):
            usable = vocabulary.category[i] in ("ok", "partial_utf8", "unreachable_single", "unreachable_multi")
            if written and usable and i not in avoid and i not in codec.special and not vocabulary.reserved[i]:
                ids_of[written].append((int(vocabulary.category[i] != "ok"), i))
        return cls(codec, avoid, every, {written: tuple(sorted(ids)[:2]) for written, ids in ids_of.items()})

    def __call__(self, ids: Sequence[int]) -> Sanitized:
        """The row without flagged tokens.

        Each replacement is checked by decoding it among its neighbours, and the whole row at the end.

        Raises:
            InvalidInputError: for an id that is not in the vocabulary.
        """
        row = [int(i) for i in ids]
        bad = [i for i in row if not 0 <= i < len(self.codec.raw)]
        if bad:
            raise InvalidInputError(
                f"{len(bad)} of {len(row)} ids, such as {bad[0]}, are not in the vocabulary (0 to "
                f"{len(self.codec.raw) - 1}). Use ids of this tokenizer."
            )
        places = [at for at, i in enumerate(row) if i in self.flagged]
        if not places:
            return Sanitized(tuple(row), (), ())
        chosen = {at: pieces for at in places if (pieces := self._fitting(row, at)) is not None}
        new = list(_filled(row, chosen))
        if self.codec.decode([new]) != self.codec.decode([row]):
            chosen = self._one_by_one(row, chosen)
            new = list(_filled(row, chosen))
        return Sanitized(
            tuple(new), tuple((at, row[at], pieces) for at, pieces in chosen.items()),
            tuple(at for at in places if at not in chosen),
        )  # fmt: skip

    def alternatives(self, token_id: int) -> tuple[Pieces, ...]:
        """Up to eight ways to write a token's bytes with tokens that are not flagged, shortest first; maybe none."""
        if token_id not in self._known:
            self._known[token_id] = segmentations(self.written[token_id], self.pieces, _KEPT, token_id)
        return self._known[token_id]

    def batch(self, model: Model, value: Texts) -> TokenBatch:
        """Tokens of texts or chats, as `model.tokens` takes them, with flagged ids cut; `model` has this tokenizer."""
        made = model.tokens(value)
        rows = [self(row.tolist()).ids for row in made.rows()]
        pad = model.tokenizer.pad_token_id
        return TokenBatch.pad(
            rows, 0 if pad is None else int(pad), note=f"{made.note}; flagged tokens cut".lstrip("; ")
        )

    def _fitting(self, row: list[int], at: int) -> Pieces | None:
        """The first alternative that decodes to the same among the neighbours."""
        left, right = row[max(0, at - _AROUND) : at], row[at + 1 : at + 1 + _AROUND]
        options = self.alternatives(row[at])
        rows = [[*left, *pieces, *right] for pieces in ((row[at],), *options)]
        wanted, *texts = self.codec.decode(rows)
        return next((pieces for pieces, text in zip(options, texts, strict=True) if text == wanted), None)

    def _one_by_one(self, row: list[int], chosen: dict[int, Pieces]) -> dict[int, Pieces]:
        """Only the replacements with which the whole row still decodes to its text."""
        (wanted,) = self.codec.decode([row])
        kept: dict[int, Pieces] = {}
        for at, pieces in chosen.items():
            if self.codec.decode([list(_filled(row, kept | {at: pieces}))]) == [wanted]:
                kept[at] = pieces
        return kept


def _filled(row: Sequence[int], chosen: dict[int, Pieces]) -> Iterator[int]:
    for at, i in enumerate(row):
        yield from chosen.get(at, (i,))
