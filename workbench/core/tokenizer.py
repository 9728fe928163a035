"""What a tokenizer does around a text: tokens that it puts in front and behind, special ids, decoding in context."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol, runtime_checkable

from workbench.core.errors import InvalidInputError

_WINDOW, _OVERLAP = 32, 8
"""Tokens that are decoded at once to read the next one, and how many of them stay when the window moves."""


class NoTokenizer:
    """Stands where a model has no tokenizer: token ids work, and anything that needs text is refused in one way."""

    def _refuse(self) -> NoReturn:
        raise InvalidInputError(
            "This model has no tokenizer, so text can't be read or written. Give token ids (a tensor, "
            "TokenBatch.of_rows or TokenRows), or a tokenizer: Model(hf, tokenizer), or tokenizer files in its folder."
        )

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Refuses to encode."""
        self._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # protocols such as copying look for these
            raise AttributeError(name)
        self._refuse()

    def __len__(self) -> int:
        self._refuse()

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "no tokenizer"


if TYPE_CHECKING:

    class _HFTokenizer(Protocol):
        """What is asked of a Hugging Face tokenizer, fast or slow; what only some have is looked up by name."""

        bos_token_id: int | None
        eos_token_id: int | None
        pad_token_id: int | None
        all_special_ids: Sequence[int]
        chat_template: str | Mapping[str, str] | None

        def __call__(
            self, text: str, *, add_special_tokens: bool = True, **options: object
        ) -> Mapping[str, Sequence[int]]: ...
        def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]: ...
        def decode(
            self, ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
        ) -> str: ...
        def get_vocab(self) -> dict[str, int]: ...
        def batch_decode(self, sequences: Sequence[Sequence[int]]) -> list[str]: ...
        def __len__(self) -> int: ...
        def save_pretrained(self, save_directory: str) -> object: ...
        def convert_ids_to_tokens(self, ids: Sequence[int]) -> Sequence[str]: ...
        def apply_chat_template(
            self,
            conversation: Sequence[dict[str, object]],
            *,
            tokenize: bool,
            add_generation_prompt: bool,
            **options: object,
        ) -> str: ...

    TokenizerLike = _HFTokenizer | NoTokenizer
else:

    @runtime_checkable
    class TokenizerLike(Protocol):
        """What is checked at run time: NoTokenizer refuses even to say which other attributes it has."""

        def __call__(self, text: str) -> object:
            """Encodes a text."""
            ...


@dataclass(frozen=True)
class Affixes:
    """What a tokenizer puts around a single text.

    Attributes:
        prefix: ids in front: BOS, `[gMASK]<sop>`, `[CLS]`, a language tag.
        suffix: ids behind: `</s>`, `[SEP]`.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


def affixes(tokenizer: TokenizerLike) -> Affixes:
    """What this tokenizer puts around a text by itself, whatever part of it does so.

    Found by encoding two texts with and without special tokens.

    Raises:
        InvalidInputError: if what it adds is not in front of and behind the text.
    """
    if isinstance(tokenizer, NoTokenizer):
        return Affixes()
    found: set[Affixes] | None = None
    for text in _probes(tokenizer):
        plain, whole = text_ids(tokenizer, text), list(tokenizer(text)["input_ids"])
        n = len(plain)
        around = {
            Affixes(tuple(whole[:i]), tuple(whole[i + n :]))
            for i in range(len(whole) - n + 1)
            if whole[i : i + n] == plain
        }
        found = around if found is None else found & around
    if not found:
        raise InvalidInputError(
            "This tokenizer does not encode a text as prefix, text and suffix, so it is not known what belongs in "
            "front of a prompt. Use bos=False and write the special tokens into the text, or give token ids."
        )
    return min(found, key=lambda around: len(around.suffix))


def _probes(tokenizer: TokenizerLike) -> list[str]:
    """Two texts that encode to different tokens; vocabularies of other things than language have no letters."""
    found: dict[tuple[int, ...], str] = {}
    for text in _texts(tokenizer):
        ids = tuple(text_ids(tokenizer, text))
        if ids and ids not in found:
            found[ids] = text
        if len(found) == 2:
            break
    return list(found.values()) or ["a"]


def _texts(tokenizer: TokenizerLike) -> Iterator[str]:
    yield from ("a", "b c")
    special = set(map(int, tokenizer.all_special_ids))
    vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    yield from (token for token, i in vocabulary.items() if i not in special)


def special_ids(tokenizer: TokenizerLike) -> tuple[int, ...]:
    """Ids that are not text, ascending: those marked special, and what the tokenizer puts around a text."""
    if isinstance(tokenizer, NoTokenizer):
        return ()
    marked = {int(i) for i in tokenizer.all_special_ids}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked |= {int(i) for i, token in added.items() if getattr(token, "special", False)}
    around = affixes(tokenizer)
    return tuple(sorted(marked | {*around.prefix, *around.suffix}))


def start_ids(tokenizer: TokenizerLike) -> tuple[int, ...]:
    """What the model's own texts start from: the tokenizer's prefix, or else BOS, or else EOS.

    Raises:
        InvalidInputError: if the tokenizer has none of them.
    """
    prefix = affixes(tokenizer).prefix
    if prefix:
        return prefix
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None:
            return (int(found),)
    raise InvalidInputError(
        "This tokenizer has no prefix, BOS or EOS, so no token starts a text. Give texts, or token ids."
    )


def text_ids(tokenizer: TokenizerLike, text: str) -> list[int]:
    """The ids of a text; nothing is added in front or behind.

    Raises:
        InvalidInputError: for a text with half a character.
    """
    require_unicode(text)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def require_unicode(text: str, what: str = "The text") -> None:
    """Refuses a text with half a character (a lone surrogate), which no tokenizer takes.

    Raises:
        InvalidInputError: with its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = max(0, error.start - 10)
        raise InvalidInputError(
            f"{what} holds half a character, \\u{ord(text[error.start]):04x} at {error.start} "
            f"({ascii(text[start : error.start + 10])}), which no tokenizer takes. Repair it or leave it out."
        ) from error


def decoded(tokenizer: TokenizerLike, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """The text of a row of ids, spaces as the tokens have them; `⟨id⟩` for each without a tokenizer."""
    if isinstance(tokenizer, NoTokenizer):
        return "".join(f"⟨{int(i)}⟩" for i in ids)
    listed = [int(i) for i in ids]
    return tokenizer.decode(listed, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)


def continuation(tokenizer: TokenizerLike, before: Sequence[int], new: Sequence[int]) -> str:
    """What new tokens add to the text of those before them, special tokens left out.

    Decoded together and compared, because many decoders strip the space in front of the first token. A character that
    `before` has begun belongs to the continuation.
    """
    start = decoded(tokenizer, before, skip_special=True)
    whole = decoded(tokenizer, [*before, *new], skip_special=True)
    return whole[len(os.path.commonprefix([start, whole])) :]


def pieces(tokenizer: TokenizerLike, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token in its place; joined they are the text of the row, special tokens included.

    A character that several tokens make up belongs to the last of them; the others are empty.
    """
    found = _pieces(tokenizer, ids, _WINDOW)
    # Some decoders read a whole run of bytes at once, which may be longer than the window.
    if "".join(found) != decoded(tokenizer, ids):
        found = _pieces(tokenizer, ids, len(ids) + 1)
    return tuple(found)


def _pieces(tokenizer: TokenizerLike, ids: Sequence[int], window: int) -> list[str]:
    found: list[str] = []
    start, before, after = 0, "", ""
    for i in range(len(ids)):
        after = decoded(tokenizer, ids[start : i + 1])
        if after.endswith("\ufffd") and not after.startswith(before):
            # A run of byte tokens is valid as a whole or not at all, so the next byte may bring the text back.
            found.append("")
            continue
        _extend(found, before, after)
        before = after
        if i + 1 - start >= window and not after.endswith("\ufffd"):
            start = i + 1 - _OVERLAP
            before = after = decoded(tokenizer, ids[start : i + 1])
    if after != before:
        _extend(found, before, after)
        found[-2:] = ["".join(found[-2:])]
    return found


def _extend(found: list[str], before: str, after: str) -> None:
    """Adds what the next token makes of `before`; characters that it changes are taken back from earlier tokens."""
    shared = len(os.path.commonprefix([before, after]))
    n = len(before) - shared
    for k in reversed(range(len(found))):
        cut = min(n, len(found[k]))
        found[k], n = found[k][: len(found[k]) - cut], n - cut
        if not n:
            break
    found.append(after[shared:])
