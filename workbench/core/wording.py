"""Texts that stand for tokens: which tokens read so in running text, and where a text ends in a row of tokens."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.core.codec import token_bytes
from workbench.core.errors import InvalidInputError
from workbench.core.tokenizer import TokenizerLike, affixes, pieces, require_unicode, text_ids

_SPACES = (" ", "▁", "Ġ")
_BEHIND = ("", ".", "\n", "a", "»")
"""What a text is encoded behind, to see its tokens in running text rather than at the start of one."""


class Wording:
    """What texts in a scope stand for under one tokenizer; read when a text occurs."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._tokenizer = tokenizer

    @property
    def n_prefix(self) -> int:
        """Number of tokens that the tokenizer puts in front of a text."""
        return len(affixes(self._tokenizer).prefix)

    @functools.cached_property
    def bytes(self) -> tuple[bytes, ...]:
        """What each token id adds to a text."""
        return token_bytes(self._tokenizer)

    @functools.cached_property
    def _has_spaces(self) -> bool:
        """Whether tokens hold the spaces between words, as in SentencePiece and byte-level vocabularies."""
        return any(str(token)[:1] in _SPACES for token in self._tokenizer.convert_ids_to_tokens(self._ids("a test")))

    def tokens(self, text: str) -> tuple[int, ...]:
        """The single tokens that read exactly so in running text, a space in front included.

        Where a word has a token with a space in front and one without, " the" is the one and "the" the other, also
        under tokenizers that put a space in front of every text. Under tokenizers whose tokens hold no spaces
        (WordPiece), it is the token that the text is encoded to.

        Raises:
            InvalidInputError: if no single token reads so, with those that come close.
        """
        require_unicode(text)
        wanted = text.encode()
        alone = self._ids(text)
        if self._has_spaces:
            found = tuple(i for i, said in enumerate(self.bytes) if said == wanted and said)
            if found:
                return found
            # A normaliser may write the text in another way, so it is looked at as it comes out.
            for before in _BEHIND:
                start, whole = self._ids(before), self._ids(before + text)
                if whole[: len(start)] == start and len(whole) == len(start) + 1 and self._same(whole[-1], text):
                    return (whole[-1],)
        elif len(alone) == 1 and self._same(alone[0], text):
            return tuple(alone)
        raise InvalidInputError(
            f"TokenIs({text!r}): no single token of this tokenizer reads so; the text is {len(alone)} tokens, "
            f"{self._named(alone)}.{self._near(text)} Give a single token or its id, or use After(...)."
        )

    def marker(self, text: str) -> Marker:
        """A text to be found in rows of tokens, however it is cut into tokens there.

        Raises:
            InvalidInputError: for a text that encodes to nothing.
        """
        require_unicode(text)
        ids = self._ids("a" + text)[len(self._ids("a")) :] if self._joins(text) else self._ids(text)
        wanted = self._joined(ids)
        if self._has_spaces and text.encode() in self._joined(self._ids(f"a{text}a")):
            wanted = text.encode()
        if not wanted:
            raise InvalidInputError(f"After({text!r}): the text encodes to no tokens. Give another, or token ids.")
        return Marker(text, wanted, self.bytes)

    def _joins(self, text: str) -> bool:
        start = self._ids("a")
        return self._ids("a" + text)[: len(start)] == start

    def _same(self, i: int, text: str) -> bool:
        """Whether a token reads like the text, apart from what normalisers change: case, accents, forms of letters."""
        said = self.bytes[i].decode(errors="replace")
        return _folded(said) == _folded(text) if self._has_spaces else _folded(said).strip() == _folded(text).strip()

    def _ids(self, text: str) -> list[int]:
        return text_ids(self._tokenizer, text)

    def _joined(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.bytes[i] for i in ids)

    def _named(self, ids: Sequence[int]) -> str:
        texts = pieces(self._tokenizer, ids[:8])
        return ", ".join(f"{text!r} ({i})" for text, i in zip(texts, ids, strict=False)) + (", …" if ids[8:] else "")

    def _near(self, text: str) -> str:
        """Tokens that differ from the text in a space or in case, as a sentence."""
        bare = text.strip().casefold()
        near = [
            f"{said!r} ({i})"
            for i, known in enumerate(self.bytes)
            if bare and (said := known.decode(errors="replace")).strip().casefold() == bare
        ]
        return f" Tokens that come close: {', '.join(near[:8])}." if near else ""


def _folded(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()


class Marker:
    """A text, found by the bytes of the tokens, so that it may begin and end inside a token."""

    def __init__(self, text: str, wanted: bytes, token_bytes: Sequence[bytes]) -> None:
        self.text, self._wanted, self._bytes = text, wanted, token_bytes
        ends = tuple(wanted[i:] for i in range(len(wanted)))
        may_end = [said.startswith(ends) or wanted in said for said in token_bytes]
        # One more for ids that the tokenizer does not know.
        self._may_end = torch.tensor([*may_end, False])

    def ends(
        self, history: Int[Tensor, "rows columns"], real: Bool[Tensor, "rows columns"]
    ) -> Bool[Tensor, "rows columns"]:
        """True at tokens in which the text ends; padding, where `real` is False, is no text."""
        if self._may_end.device != history.device:
            self._may_end = self._may_end.to(history.device)
        found = self._may_end[history.clamp_max(len(self._may_end) - 1)] & real
        places = found.nonzero().tolist()
        rows = history.tolist() if places else []
        starts = real.int().argmax(1).tolist() if places else []
        for row, column in places:
            found[row, column] = self._ends(rows[row], starts[row], column)
        return found

    def _ends(self, ids: Sequence[int], start: int, last: int) -> bool:
        """Whether the text ends inside token `last` of a row that begins at `start`."""
        tail = self._of(ids[last])
        need = len(tail) + len(self._wanted) - 1
        while last > start and len(tail) < need:
            last -= 1
            tail = self._of(ids[last]) + tail
        return self._wanted in tail[-need:] if need else False

    def _of(self, i: int) -> bytes:
        return self._bytes[i] if i < len(self._bytes) else b""

    def __repr__(self) -> str:
        return repr(self.text)
