"""Words deleted from all texts: those of the attribute's list, and as many others, matched, as the control of that."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from circuits.shift.methods import words_deleted
from circuits.shift.table.base import SHIFT_METHODS
from circuits.shift.task import Prediction, ShiftStudy
from circuits.shift.words import tidied, word_pattern
from workbench.controls.methods import Method

LEXICON = "lexicon words deleted"
MAX_DRAWS = 3
"""Each draw reads all texts again."""
N_NEAREST = 3
"""A word is drawn from so many that are nearest in length and frequency."""
_WORD = re.compile(r"\w+")


def deleted_matched(
    text: str, lexicon: re.Pattern[str], frequency: Mapping[str, int], random: np.random.Generator
) -> str:
    """The text without as many other words as it has of the lexicon, each drawn from those nearest to one of these.

    Near is a small sum of the difference in letters and of that of the logarithms, base 2, of the frequencies. A text
    with fewer other words loses all of them but one.

    >>> deleted_matched("He saw it", word_pattern(["he"]), {}, np.random.default_rng(1))  # "it" or "saw" goes
    'He saw'
    """
    listed = [match.span() for match in lexicon.finditer(text)]
    others = [
        match.span() for match in _WORD.finditer(text)
        if not any(match.start() < end and start < match.end() for start, end in listed)
    ]  # fmt: skip
    gone: list[tuple[int, int]] = []
    for start, end in listed:
        if len(others) < 2:
            break
        by_distance = sorted(others, key=lambda span: _distance(text[start:end], text[slice(*span)], frequency))
        drawn = by_distance[int(random.integers(min(N_NEAREST, len(by_distance))))]
        others.remove(drawn)
        gone.append(drawn)
    for start, end in sorted(gone, reverse=True):
        text = text[:start] + text[end:]
    return tidied(text)


def _distance(word: str, other: str, frequency: Mapping[str, int]) -> float:
    n, m = (frequency.get(part.lower(), 0) + 1 for part in (word, other))
    return abs(len(word) - len(other)) + abs(float(np.log2(n / m)))


def _matched(study: ShiftStudy) -> Prediction:
    lexicon, seed = word_pattern(study.task.spurious_words), study.options.seed
    frequency = Counter(word.lower() for text in study.train.texts for word in _WORD.findall(text))

    def without(texts: Sequence[str], draw: int) -> list[str]:
        random = np.random.default_rng((seed, draw))
        return [deleted_matched(text, lexicon, frequency, random) for text in texts]

    draws = []
    for draw in range(min(MAX_DRAWS, study.options.random_draws)):
        train, test = (
            study.reader.pooled(without(part.texts, draw), "reading without random words")
            for part in (study.train, study.test)
        )
        draws.append(study.refit(train).predict(test))
    return Prediction(tuple(draws), is_random=True)


def _lexicon(study: ShiftStudy) -> Prediction:
    return words_deleted(LEXICON, study.task.spurious_words).run(study)


SHIFT_METHODS.add(
    LEXICON,
    Method(
        name=LEXICON, run=_lexicon, role="rival", needs=("words",), regime="R0",
        information="the word list; the probe is trained and tested on the shorter texts",
    ),
)  # fmt: skip
SHIFT_METHODS.add(
    "length-matched deletion",
    Method(
        name="length-matched deletion", run=_matched, role="control", needs=("words",), regime="R0",
        information="how many words of the list each text has; as many others, of like length and frequency, are "
        "deleted",
    ),
)  # fmt: skip
