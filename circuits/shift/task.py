"""The data of a SHIFT study: a label that is wanted, and a spurious attribute that goes along with it in training."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError

Pair = tuple[str, str]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with the wanted label and the spurious attribute, both 0 or 1.

    Raises:
        ShapeError: if texts, labels and attributes do not pair up.
        InvalidInputError: for other values than 0 and 1.
    """

    texts: tuple[str, ...]
    label: tuple[int, ...]
    spurious: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.texts) == len(self.label) == len(self.spurious):
            raise ShapeError(
                f"LabelledTexts: {len(self.texts)} texts, {len(self.label)} labels, {len(self.spurious)} attributes; "
                "these must pair up."
            )
        other = sorted((set(self.label) | set(self.spurious)) - {0, 1})
        if other:
            raise InvalidInputError(f"LabelledTexts: labels and attributes are 0 or 1; got {other}.")
        if set(self.label) != {0, 1}:
            raise DegenerateInputError(
                f"LabelledTexts: {len(self.texts)} texts with labels {sorted(set(self.label))}; needs both."
            )

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class ShiftTask:
    """Everything that a SHIFT study reads.

    Attributes:
        name: for people.
        label_names: names of label 0 and 1.
        spurious_names: names of the spurious attribute's values 0 and 1.
        train: the ambiguous set, in which attribute and label go together; the only labels that the method sees.
        swapped: each training text with the other value of the attribute and all else equal, in the same order.
        balanced: training rows in which the two are independent; only for oracles and skylines.
        test: held-out rows of all four groups; only for evaluation.
        spurious_words: words that give the attribute away.
        target_words: words that belong to the label.

    Raises:
        ShapeError: if `swapped` does not pair up with `train`.
        DegenerateInputError: if one of the four groups is missing from `balanced` or `test`.
    """

    name: str
    label_names: Pair
    spurious_names: Pair
    train: LabelledTexts
    swapped: tuple[str, ...]
    balanced: LabelledTexts
    test: LabelledTexts
    spurious_words: frozenset[str]
    target_words: frozenset[str]

    def __post_init__(self) -> None:
        if len(self.swapped) != len(self.train):
            raise ShapeError(
                f"ShiftTask: {len(self.swapped)} swapped texts for {len(self.train)} training texts; must pair up."
            )
        for name, rows in (("balanced", self.balanced), ("test", self.test)):
            groups = set(zip(rows.label, rows.spurious, strict=True))
            if len(groups) < 4:
                missing = sorted({(a, b) for a in (0, 1) for b in (0, 1)} - groups)
                raise DegenerateInputError(
                    f"ShiftTask: {name} has no row with (label, attribute) in {missing}; needs all four."
                )

    def group_name(self, label: int, spurious: int) -> str:
        """Name of a group, such as "female professor"."""
        return f"{self.spurious_names[spurious]} {self.label_names[label]}"


def word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the words as a whole, in any case; a final full stop belongs to the word ("Mr.").

    >>> word_pattern(["he", "Mr."]).findall("He met Mr. Heath, the heir.")
    ['He', 'Mr.']
    """
    longest_first = sorted({word.lower() for word in words}, key=lambda word: (-len(word), word))
    if not longest_first:
        raise DegenerateInputError("word_pattern: the list of words is empty, so nothing could match.")
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", re.IGNORECASE)


def delete_words(text: str, words: Iterable[str]) -> str:
    """The text without these words; what is left stands as it was, single-spaced.

    >>> delete_words("Mr. Jones said he left.", ["he", "Mr."])
    'Jones said left.'
    """
    return re.sub(r"\s+([.,;]|$)", r"\1", re.sub(r"\s+", " ", word_pattern(words).sub("", text)).strip())
