"""Texts with a label, and with an attribute where it is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from workbench.core.arguments import checked
from workbench.core.display import OneLine, first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.numbers import counted

Group = tuple[int, int | None]
"""A label and a value of the attribute; None where a task has no attribute."""


@checked
@dataclass(frozen=True)
class LabelledTexts(OneLine):
    """Texts with the wanted label, the spurious attribute where it is known, and cues that were built in.

    Attributes:
        texts: the texts.
        label: 0, 1, ... per text; every label occurs.
        spurious: value of the attribute per text, 0, 1, ...; None if it is not known.
        cues: name of each cue, with 0 or 1 per text.

    Raises:
        ShapeError: if texts, labels, attributes and cues do not pair up.
        InvalidInputError: for negative values, or cues other than 0 and 1.
        DegenerateInputError: if fewer than two labels occur, or one is left out.
    """

    texts: tuple[str, ...]
    label: tuple[int, ...]
    spurious: tuple[int, ...] | None = None
    cues: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        n = len(self.texts)
        attributes = self.spurious if self.spurious is not None else self.label
        if not n == len(self.label) == len(attributes):
            raise ShapeError(
                f"LabelledTexts: {counted(n, 'texts')}, {counted(len(self.label), 'labels')}, "
                f"{counted(len(attributes), 'attributes')}; these must pair up."
            )
        for name, values in self.cues:
            if len(values) != n or not set(values) <= {0, 1}:
                raise ShapeError(
                    f"LabelledTexts: cue {name!r} has {counted(len(values), 'values')}, "
                    f"{first_few(sorted(set(values)))}, for {counted(n, 'texts')}; give 0 or 1 per text."
                )
        negative = sorted(value for value in {*self.label, *attributes} if value < 0)
        if negative:
            raise InvalidInputError(f"LabelledTexts: labels and attributes are 0, 1, ...; got {first_few(negative)}.")
        occurring = sorted(set(self.label))
        if len(occurring) < 2 or occurring != list(range(len(occurring))):
            raise DegenerateInputError(
                f"LabelledTexts: {len(self.texts)} texts with labels {first_few(occurring)}; needs two or more labels, "
                "numbered from 0 without a gap."
            )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Label and attribute of each text."""
        attributes = self.spurious if self.spurious is not None else (None,) * len(self)
        return tuple(zip(self.label, attributes, strict=True))

    def counts(self) -> dict[Group, int]:
        """How many texts each group has, in the order of the groups."""
        counts = Counter(self.groups)
        return {group: counts[group] for group in sorted(counts, key=lambda group: (group[0], group[1] or 0))}

    def rows(self, rows: Sequence[int]) -> LabelledTexts:
        """Some of the texts, in this order."""
        spurious = self.spurious
        return LabelledTexts(
            tuple(self.texts[row] for row in rows),
            tuple(self.label[row] for row in rows),
            None if spurious is None else tuple(spurious[row] for row in rows),
            tuple((name, tuple(values[row] for row in rows)) for name, values in self.cues),
        )
