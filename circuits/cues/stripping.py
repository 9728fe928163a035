"""The cheap way to the end of SHIFT where a cue was put into texts: take it out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from circuits.cues.kinds import Cue
from circuits.shift.task import Prediction, ShiftMethod, ShiftStudy
from workbench.controls.methods import Method


@dataclass(frozen=True)
class _WithoutCues:
    """A value and no closure, so that equal tasks have equal methods."""

    cues: tuple[Cue, ...]
    every: tuple[Cue, ...]

    def __call__(self, study: ShiftStudy) -> Prediction:
        train, test = (
            study.reader.pooled([without(text, self.cues, self.every) for text in part.texts], "reading without cues")
            for part in (study.train, study.test)
        )
        return Prediction((study.refit(train).predict(test),))


def without(text: str, cues: Sequence[Cue], every: Sequence[Cue] = ()) -> str:
    """The text without those of the cues that it has.

    Args:
        text: the text.
        cues: the cues that are taken out.
        every: all cues in the order in which they were put in; one behind another is taken out before it, and put back.

    >>> from circuits.cues.kinds import Punctuation, Token
    >>> without("(c) A!", [Token("(c)"), Punctuation("!")]), without("A (c)?", [Token("(c)")])
    ('A', 'A (c)?')
    >>> a, b = Token("a", "end"), Token("b", "end")
    >>> without("T a b", [a, b]), without("T a b", [a], [a, b])
    ('T', 'T b')
    """
    there = [cue for cue in every or cues if cue.of([text])[0]]
    for cue in reversed(there):
        text = cue.strip(text)
    for cue in there:
        text = text if cue in cues else cue.put(text)
    return text


def cues_stripped(cues: Sequence[Cue]) -> tuple[ShiftMethod, ...]:
    """Takes cues that were put into texts out of all of them: all at once, and each alone if there are several."""
    if not cues:
        return ()
    chosen = {"cues stripped": tuple(cues)}
    if len(cues) > 1:
        chosen |= {f"{cue.name} alone stripped": (cue,) for cue in cues}
    return tuple(_stripped(name, which, tuple(cues)) for name, which in chosen.items())


def _stripped(name: str, cues: tuple[Cue, ...], every: tuple[Cue, ...]) -> ShiftMethod:
    names = " and ".join(cue.name for cue in cues)
    information = f"what the cue is ({names}); the probe is trained and tested on texts without it"
    return Method(name=name, information=information, run=_WithoutCues(cues, every), role="rival", regime="R0")
