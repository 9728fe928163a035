"""Tokens as text, and the classes of tokens that rules speak of."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.core.codec import token_bytes
from workbench.core.tokenizer import TokenizerLike

_WORD = re.compile(r"^\s?[^\W\d_]+$")

_WORDS_OF_CLASS = {
    "an article or determiner": "the a an this that these those each every some any no another",
    "a pronoun": "i you he she it we they me him her us them my your his its our their mine yours who whom whose",
    "a preposition": "of in to for with on at by from about as into over after between under through during before",
    "a conjunction": "and or but nor so yet if because although while since unless whereas though",
    "an auxiliary verb": "is are was were be been being am do does did have has had will would can could may might "
    "must shall should",
    "a number word": "one two three four five six seven eight nine ten hundred thousand million first second third",
}

_SUFFIXES = ("ing", "ed", "ly", "s", "er", "tion")


def _is_word(text: str) -> bool:
    return _WORD.match(text) is not None


def _tests() -> dict[str, Callable[[str], bool]]:
    tests: dict[str, Callable[[str], bool]] = {
        "digits": lambda t: t.strip().isdigit(),
        "a capitalised word": lambda t: _is_word(t) and t.strip()[0].isupper() and not t.strip()[1:].isupper(),
        "all capitals": lambda t: _is_word(t) and len(t.strip()) > 1 and t.strip().isupper(),
        "a lower-case word": lambda t: _is_word(t) and t.strip().islower(),
        "punctuation": lambda t: bool(t.strip()) and not any(c.isalnum() for c in t),
        "a line break": lambda t: "\n" in t,
        "white space": lambda t: bool(t) and not t.strip(),
        "the start of a word": lambda t: t[:1] == " " and t[1:2].isalpha(),
        "the inside of a word": lambda t: t[:1].isalpha(),
        "not ASCII": lambda t: not t.isascii(),
        "a bracket": lambda t: any(c in "()[]{}<>" for c in t),
        "a quotation mark": lambda t: any(c in "\"'`“”‘’«»" for c in t),
    }
    for name, words in _WORDS_OF_CLASS.items():
        known = frozenset(words.split())
        tests[name] = lambda t, known=known: t.strip().lower() in known
    for suffix in _SUFFIXES:
        tests[f"a word that ends in -{suffix}"] = lambda t, end=suffix: (
            _is_word(t) and len(t.strip()) > len(end) + 2 and t.endswith(end)
        )
    return tests


TOKEN_CLASSES = tuple(_tests())
"""Names of the classes, as explanations call them."""


def quoted(texts: Sequence[str], limit: int = 12) -> str:
    """Some texts for people, each in quotes, and how many more there are."""
    shown = ", ".join(map(repr, texts[:limit]))
    return shown + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


@dataclass(frozen=True, eq=False)
class TokenTexts:
    """The text of every token id, and which classes it is in; the id -1 stands for no token and is in none.

    Attributes:
        texts: text of each token; a piece of a character as `<0xNN>`.
        stems: the letters of each token in lower case without white space, "" where there are others.
    """

    texts: tuple[str, ...]
    stems: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: TokenSource) -> TokenTexts:
        """Of a Hugging Face tokenizer, computed once per tokenizer; token texts are returned as they are."""
        return tokenizer if isinstance(tokenizer, TokenTexts) else _vocabulary(tokenizer)

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> TokenTexts:
        """Of the text of each token id.

        >>> TokenTexts.of_texts([" Dog", "7"]).stems
        ('dog', '')
        """
        return cls(tuple(texts), tuple(t.strip().lower() if _is_word(t) else "" for t in texts))

    def padded(self, n: int) -> TokenTexts:
        """The same with at least n ids; rows of an embedding beyond the tokenizer have no text and are in no class.

        >>> TokenTexts.of_texts(["a"]).padded(2).text(1)
        '⟨1⟩'
        """
        more = ("",) * (n - len(self))
        return TokenTexts(self.texts + more, self.stems + more) if more else self

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def bits(self) -> float:
        """What naming one token costs, in bits."""
        return float(np.log2(max(len(self), 2)))

    def text(self, token_id: int) -> str:
        """Text of a token; its number where it has none."""
        return self.texts[token_id] or f"⟨{token_id}⟩"

    def quoted(self, ids: Sequence[int]) -> str:
        """A list of tokens for people, each in quotes."""
        return quoted([self.text(i) for i in ids])

    @functools.lru_cache(maxsize=256)  # noqa: B019 - bounded, and a vocabulary lives as long as its model
    def mask(self, name: str) -> np.ndarray:
        """Whether each token is in a class; one place more than there are tokens, for the id -1."""
        return np.array([*map(_tests()[name], self.texts), False])

    def holds(self, tokens: Sequence[int]) -> np.ndarray:
        """Whether each token is one of these; one place more than there are tokens, for the id -1."""
        is_one = np.zeros(len(self) + 1, dtype=bool)
        is_one[list(tokens)] = True
        return is_one

    @functools.lru_cache(maxsize=64)  # noqa: B019 - likewise
    def beginnings(self, length: int) -> tuple[dict[str, int], np.ndarray]:
        """The different first letters of the stems, numbered in order, and their number for each token.

        -1 where a stem is shorter, and in the last place, for the id -1.

        >>> TokenTexts.of_texts([" Dog", "do", "cat"]).beginnings(3)
        ({'cat': 0, 'dog': 1}, array([ 1, -1,  0, -1], dtype=int32))
        """
        starts = [stem[:length] if len(stem) >= length else None for stem in self.stems]
        number = {start: i for i, start in enumerate(sorted({start for start in starts if start is not None}))}
        return number, np.array([-1 if start is None else number[start] for start in (*starts, None)], dtype=np.int32)


TokenSource = TokenizerLike | TokenTexts


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: TokenizerLike) -> TokenTexts:
    return TokenTexts.of_texts([_shown(raw) for raw in token_bytes(tokenizer)])


def _shown(raw: bytes) -> str:
    text = raw.decode("utf-8", errors="surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
