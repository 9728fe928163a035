"""Cues: what is 0 or 1 of any text, and can be put into some texts and stripped from them again."""

from __future__ import annotations

import abc
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float

from circuits.cues.tagger import is_plural, is_present
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError

Embedding = Callable[[Sequence[str]], np.ndarray]
"""Texts to an array with one row per text."""
_VOCABULARY = 500


class Cue(OneLine, abc.ABC):
    """A property of a text that is there (1) or not (0).

    A cue that can be injected has `put` and `strip`: `strip(put(text))` is the text, if the text does not have the cue.
    """

    can_inject: ClassVar[bool] = False
    """Whether `put` and `strip` exist."""

    _name: ClassVar[str] = "cue"
    _values: ClassVar[tuple[str, str]] = ("no", "yes")

    @property
    def name(self) -> str:
        """Short name."""
        return self._name

    @property
    def values(self) -> tuple[str, str]:
        """Names of the values 0 and 1."""
        return self._values

    @abc.abstractmethod
    def of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """0 or 1 per text."""

    def fit(self, texts: Sequence[str]) -> Cue:  # noqa: ARG002
        """The cue with its threshold, from training texts alone; itself if it has none."""
        return self

    def put(self, text: str) -> str:  # noqa: ARG002
        """The text with the cue."""
        raise InvalidInputError(f"put: the cue {self.name!r} can't be put into a text. Choose texts that have it.")

    def strip(self, text: str) -> str:  # noqa: ARG002
        """The text without the cue."""
        raise InvalidInputError(f"strip: the cue {self.name!r} can't be taken out of a text. Choose texts without it.")


@checked
@dataclass(frozen=True)
class Length(Cue):
    """Whether a text has more characters than the median training text.

    Attributes:
        threshold: the number of characters; None until it is fitted.
    """

    threshold: float | None = None

    _name = "length"
    _values = ("short", "long")

    def fit(self, texts: Sequence[str]) -> Length:
        """With the median of these texts, unless it was given."""
        return self if self.threshold is not None else Length(float(np.median([len(text) for text in texts])))

    def of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """1 for texts above the threshold.

        >>> Length().fit(["a", "bb", "ccc"]).of(["bb", "dddd"])
        (0, 1)
        """
        if self.threshold is None:
            raise MismatchError("Length has no threshold yet. Give one, or call fit(training texts) first.")
        return tuple(int(len(text) > self.threshold) for text in texts)


@checked
@dataclass(frozen=True)
class FirstVerb(Cue):
    """Whether the first verb is in the present tense; approximate, see `circuits.cues.tagger`."""

    _name = "tense of the first verb"
    _values = ("not present", "present")

    def of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """1 where the first verb is in the present tense.

        >>> FirstVerb().of(["She sings.", "She sang."])
        (1, 0)
        """
        return tuple(int(is_present(text)) for text in texts)


@checked
@dataclass(frozen=True)
class FirstNoun(Cue):
    """Whether the first noun is a plural; approximate, see `circuits.cues.tagger`."""

    _name = "number of the first noun"
    _values = ("singular", "plural")

    def of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """1 where the first noun is a plural.

        >>> FirstNoun().of(["The dogs bark.", "The dog barks at cats."])
        (1, 0)
        """
        return tuple(int(is_plural(text)) for text in texts)


@checked
@dataclass(frozen=True)
class Casing(Cue):
    """Whether the first letter is a capital."""

    can_inject = True
    _name = "casing"
    _values = ("small first letter", "capital first letter")

    def of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """1 where the first letter is a capital.

        >>> Casing().of(["'Tis", "1 dog", "10"])
        (1, 0, 0)
        """
        return tuple(int(next((char.isupper() for char in text if char.isalpha()), False)) for text in texts)

    def put(self, text: str) -> str:
        """With a capital; unchanged where a letter has none."""
        return _first_letter(text, str.upper)

    def strip(self, text: str) -> str:
        """With a small letter."""
        return _first_letter(text, str.lower)


@checked
@dataclass(frozen=True)
class Punctuation(Cue):
    """Whether a text ends with a mark.

    Attributes:
        mark: the mark.
    """

    mark: str = "!"

    can_inject = True

    def __post_init__(self) -> None:
        if not self.mark.strip() or self.mark != self.mark.strip():
            raise InvalidInputError(f"Punctuation({self.mark!r}): give a mark without white space around it.")

    @property
    def name(self) -> str:
        """Short name."""
        return f"final {self.mark}"

    @property
    def values(self) -> tuple[str, str]:
        """Names of the values 0 and 1."""
        return f"no {self.name}", f"{self.name}"

    def of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """1 where a text ends with the mark."""
        return tuple(int(text.endswith(self.mark)) for text in texts)

    def put(self, text: str) -> str:
        """With the mark behind it.

        >>> Punctuation("!").strip(Punctuation("!").put("Stop. "))
        'Stop. '
        """
        return text + self.mark

    def strip(self, text: str) -> str:
        """Without the final mark."""
        return text.removesuffix(self.mark)


@checked
@dataclass(frozen=True)
class Token(Cue):
    """Whether a text contains a token, which can be put before or behind it.

    Attributes:
        token: the token.
        where: where it is put.
    """

    token: str
    where: Literal["start", "end"] = "start"

    can_inject = True

    def __post_init__(self) -> None:
        if not self.token.strip() or self.token != self.token.strip():
            raise InvalidInputError(f"Token({self.token!r}): give a token without white space around it.")

    @property
    def name(self) -> str:
        """Short name."""
        return f"token {self.token}"

    @property
    def values(self) -> tuple[str, str]:
        """Names of the values 0 and 1."""
        return f"no {self.token}", f"with {self.token}"

    def of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """1 where the token occurs, wherever that is."""
        return tuple(int(self.token in text) for text in texts)

    def put(self, text: str) -> str:
        """With the token and a space.

        >>> Token("(c)").put("A text."), Token("(c)").strip("(c) A text.")
        ('(c) A text.', 'A text.')
        """
        return f"{self.token} {text}" if self.where == "start" else f"{text} {self.token}"

    def strip(self, text: str) -> str:
        """Without the token where it is put; elsewhere it stays."""
        if self.where == "start":
            return text.removeprefix(f"{self.token} ")
        return text.removesuffix(f" {self.token}")


@checked
@dataclass(frozen=True, eq=False)
class Cluster(Cue):
    """To which of two clusters of meaning a text belongs (2-means); value 1 is the smaller one of training.

    Attributes:
        embed: gives texts an embedding each; by default the words that they contain, weighted by how rare they are.
        seed: decides where the search for the clusters begins.
        centres: middle of each cluster; None until it is fitted.
    """

    embed: Embedding | None = None
    seed: int = 0
    centres: Float[np.ndarray, "2 d"] | None = None

    _name = "cluster of meaning"
    _values = ("large cluster", "small cluster")

    def fit(self, texts: Sequence[str]) -> Cluster:
        """With the clusters of these texts.

        Raises:
            DegenerateInputError: if all texts have the same embedding.
        """
        from sklearn.cluster import KMeans

        embed = self.embed or bag_of_words(texts)
        x = _embedded(embed, texts)
        if len(np.unique(x, axis=0)) < 2:
            raise DegenerateInputError(f"Cluster: all {len(texts)} texts have the same embedding. Give another embed=.")
        means = KMeans(2, n_init=4, random_state=self.seed).fit(x)  # pyright: ignore[reportArgumentType]  # an int is one too
        small = int(np.bincount(np.asarray(means.labels_), minlength=2).argmin())
        return replace(self, embed=embed, centres=means.cluster_centers_[[1 - small, small]])

    def of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """1 for texts that are closer to the middle of the smaller cluster."""
        if self.centres is None or self.embed is None:
            raise MismatchError("Cluster has no clusters yet. Call fit(training texts) first.")
        distance = ((_embedded(self.embed, texts)[:, None] - self.centres) ** 2).sum(axis=-1)
        return tuple(int(near) for near in distance[:, 1] < distance[:, 0])


def bag_of_words(texts: Sequence[str]) -> Embedding:
    """An embedding of unit length by the words of a text, weighted by how rare they are among these texts."""
    rows = Counter(word for text in texts for word in set(_words(text)))
    vocabulary = [word for word, n in rows.most_common(_VOCABULARY) if 1 < n < len(texts)]
    weight = np.log(len(texts) / np.array([rows[word] for word in vocabulary], dtype=float))

    def embed(others: Sequence[str]) -> np.ndarray:
        there = [set(_words(text)) for text in others]
        x = np.array([[word in words for word in vocabulary] for words in there], dtype=float) * weight
        norm = np.linalg.norm(x, axis=1, keepdims=True) if vocabulary else np.ones((len(others), 1))
        return x.reshape(len(others), len(vocabulary)) / np.where(norm > 0, norm, 1.0)

    return embed


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def _embedded(embed: Embedding, texts: Sequence[str]) -> np.ndarray:
    x = np.asarray(embed(texts), dtype=float)
    if x.ndim != 2 or len(x) != len(texts):
        raise MismatchError(
            f"Cluster: embed gave an array {list(x.shape)} for {len(texts)} texts; give a row per text."
        )
    return x


def _first_letter(text: str, change: Callable[[str], str]) -> str:
    """The text with its first letter changed, unless that is no single letter that changes back."""
    for i, char in enumerate(text):
        if char.isalpha():
            changed = change(char)
            back = str.lower if change is str.upper else str.upper
            return text[:i] + changed + text[i + 1 :] if len(changed) == 1 and back(changed) == char else text
    return text
