"""Rules: explanations in terms of a token, what precedes and follows it and its position, executed on text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from workbench.features.token_classes import TOKEN_CLASSES, TokenTexts, quoted

REACH = 8
"""How many preceding tokens a rule can look at."""


@dataclass(frozen=True, eq=False)
class TokenView:
    """Tokens with what precedes and follows them.

    Attributes:
        ids: token ids, any shape.
        before: the `REACH` preceding ids, nearest first, -1 beyond the start of the document; one axis more.
        positions: position in the packed row.
        after: the next id, -1 behind the end of the document.
    """

    ids: np.ndarray
    before: np.ndarray
    positions: np.ndarray
    after: np.ndarray

    def __getitem__(self, chosen: np.ndarray | slice) -> TokenView:
        return TokenView(self.ids[chosen], self.before[chosen], self.positions[chosen], self.after[chosen])


@runtime_checkable
class Rule(Protocol):
    """An explanation that can be executed: whether a feature should be active, token by token."""

    def fires(self, view: TokenView, vocabulary: TokenTexts, /) -> np.ndarray:
        """True where the rule holds, in the shape of `view.ids`."""
        ...

    def text(self, vocabulary: TokenTexts, /) -> str:
        """The rule in words."""
        ...

    def bits(self, vocabulary: TokenTexts, /) -> float:
        """Length of the rule's description, in bits."""
        ...


@dataclass(frozen=True)
class Never:
    """The empty explanation: it never fires."""

    kind: Literal["never"] = "never"

    def fires(self, view: TokenView, _: TokenTexts) -> np.ndarray:
        return np.zeros(view.ids.shape, dtype=bool)

    def text(self, _: TokenTexts) -> str:
        return ""

    def bits(self, _: TokenTexts) -> float:
        return 0.0


@dataclass(frozen=True)
class TokenIn:
    """The token is one of a set."""

    tokens: tuple[int, ...]
    kind: Literal["token"] = "token"

    def fires(self, view: TokenView, vocabulary: TokenTexts) -> np.ndarray:
        return vocabulary.holds(self.tokens)[view.ids]

    def text(self, vocabulary: TokenTexts) -> str:
        return f"token is {'one of ' if len(self.tokens) > 1 else ''}{vocabulary.quoted(self.tokens)}"

    def bits(self, vocabulary: TokenTexts) -> float:
        return len(self.tokens) * vocabulary.bits


@dataclass(frozen=True)
class BeginsWith:
    """The token, without white space and case, begins with one of some letters."""

    prefixes: tuple[str, ...]
    kind: Literal["begins"] = "begins"

    def fires(self, view: TokenView, vocabulary: TokenTexts) -> np.ndarray:
        fires = np.zeros(view.ids.shape, dtype=bool)
        for length in {len(prefix) for prefix in self.prefixes}:
            number, of_token = vocabulary.beginnings(length)
            wanted = [number[p] for p in self.prefixes if len(p) == length and p in number]
            fires |= np.isin(of_token[view.ids], wanted)
        return fires

    def text(self, _: TokenTexts) -> str:
        return "token begins with " + " or ".join(f"{prefix}-" for prefix in self.prefixes)

    def bits(self, _: TokenTexts) -> float:
        return 2 + 5.0 * sum(map(len, self.prefixes))  # five bits a letter


@dataclass(frozen=True)
class InClass:
    """The token, the one before it (`back` 1) or the one after it (`back` -1) is of a class."""

    name: str
    back: Literal[-1, 0, 1] = 0
    kind: Literal["class"] = "class"

    def fires(self, view: TokenView, vocabulary: TokenTexts) -> np.ndarray:
        ids = {0: view.ids, 1: view.before[..., 0], -1: view.after}[self.back]
        return vocabulary.mask(self.name)[ids]

    def text(self, _: TokenTexts) -> str:
        which = {0: "", 1: "preceding ", -1: "following "}[self.back]
        return f"{which}token is {self.name}"

    def bits(self, _: TokenTexts) -> float:
        return 1 + float(np.log2(len(TOKEN_CLASSES)))


@dataclass(frozen=True)
class At:
    """The position in the packed row is in an interval."""

    low: int
    high: int | None
    kind: Literal["at"] = "at"

    def fires(self, view: TokenView, _: TokenTexts) -> np.ndarray:
        return (view.positions >= self.low) & (True if self.high is None else view.positions < self.high)

    def text(self, _: TokenTexts) -> str:
        if self.high is None:
            return f"position {self.low} or later"
        return f"position {self.low}" if self.high == self.low + 1 else f"position {self.low} to {self.high - 1}"

    def bits(self, _: TokenTexts) -> float:
        return 8.0  # two of sixteen boundaries


@dataclass(frozen=True)
class After:
    """One of some tokens stands among the last few."""

    tokens: tuple[int, ...]
    within: int = 1
    kind: Literal["after"] = "after"

    def fires(self, view: TokenView, vocabulary: TokenTexts) -> np.ndarray:
        return np.asarray(vocabulary.holds(self.tokens)[view.before[..., : self.within]].any(-1))

    def text(self, vocabulary: TokenTexts) -> str:
        where = "directly after" if self.within == 1 else f"within {self.within} tokens after"
        return f"{where} {vocabulary.quoted(self.tokens)}"

    def bits(self, vocabulary: TokenTexts) -> float:
        return 3 + len(self.tokens) * vocabulary.bits  # three for the distance


@dataclass(frozen=True)
class Before:
    """The next token, which the model has not seen yet, is one of some."""

    tokens: tuple[int, ...]
    kind: Literal["before"] = "before"

    def fires(self, view: TokenView, vocabulary: TokenTexts) -> np.ndarray:
        return vocabulary.holds(self.tokens)[view.after]

    def text(self, vocabulary: TokenTexts) -> str:
        return f"directly before {vocabulary.quoted(self.tokens)}"

    def bits(self, vocabulary: TokenTexts) -> float:
        return 3 + len(self.tokens) * vocabulary.bits  # as of `After`


@dataclass(frozen=True)
class Ngram:
    """The token ends one of some sequences."""

    sequences: tuple[tuple[int, ...], ...]
    kind: Literal["ngram"] = "ngram"

    def fires(self, view: TokenView, _: TokenTexts) -> np.ndarray:
        fires = np.zeros(view.ids.shape, dtype=bool)
        for sequence in self.sequences:
            here = view.ids == sequence[-1]
            for back, token in enumerate(reversed(sequence[:-1])):
                here &= view.before[..., back] == token
            fires |= here
        return fires

    def text(self, vocabulary: TokenTexts) -> str:
        return "last token of " + quoted(["".join(map(vocabulary.text, s)) for s in self.sequences])

    def bits(self, vocabulary: TokenTexts) -> float:
        return 1 + sum(map(len, self.sequences)) * vocabulary.bits


@dataclass(frozen=True)
class Both:
    """A rule on the token that holds only in a context."""

    token: AnyRule
    context: AnyRule
    kind: Literal["both"] = "both"

    def fires(self, view: TokenView, vocabulary: TokenTexts) -> np.ndarray:
        return self.token.fires(view, vocabulary) & self.context.fires(view, vocabulary)

    def text(self, vocabulary: TokenTexts) -> str:
        return f"{self.token.text(vocabulary)}, and {self.context.text(vocabulary)}"

    def bits(self, vocabulary: TokenTexts) -> float:
        return 1 + self.token.bits(vocabulary) + self.context.bits(vocabulary)


AnyRule = Never | TokenIn | BeginsWith | InClass | At | After | Before | Ngram | Both
"""The rules that there are; in files `kind` tells them apart."""
