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

    def __call__(self, study: ShiftStudy) -> Prediction:
        train, test = (
            study.reader.pooled([without(text, self.cues) for text in part.texts], "reading without cues")
            for part in (study.train, study.test)
        )
        return Prediction((study.refit(train).predict(test),))


def without(text: str, cues: Sequence[Cue]) -> str:
    """The text without those of the cues that it has.

    >>> from circuits.cues.kinds import Punctuation, Token
    >>> without("(c) A!", [Token("(c)"), Punctuation("!")]), without("A (c)?", [Token("(c)")])
    ('A', 'A (c)?')
    """
    for cue in cues:
        text = cue.strip(text) if cue.of([text])[0] else text
    return text


def cues_stripped(cues: Sequence[Cue]) -> tuple[ShiftMethod, ...]:
    """Takes cues that were put into texts out of all of them: all at once, and each alone if there are several."""
    if not cues:
        return ()
    chosen = {"cues stripped": tuple(cues)}
    if len(cues) > 1:
        chosen |= {f"{cue.name} alone stripped": (cue,) for cue in cues}
    return tuple(_stripped(name, which) for name, which in chosen.items())


def _stripped(name: str, cues: tuple[Cue, ...]) -> ShiftMethod:
    names = " and ".join(cue.name for cue in cues)
    information = f"what the cue is ({names}); the probe is trained and tested on texts without it"
    return Method(name=name, information=information, run=_WithoutCues(cues), role="rival", regime="R0")
