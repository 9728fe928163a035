"""Words of a text: found as wholes, and deleted."""

from __future__ import annotations

import re
from collections.abc import Iterable

from workbench.core.errors import DegenerateInputError


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
    return tidied(word_pattern(words).sub("", text))


def tidied(text: str) -> str:
    """The text single-spaced, without a space before a full stop, a comma or a semicolon.

    >>> tidied(" a  b , c . ")
    'a b, c.'
    """
    return re.sub(r"\s+([.,;]|$)", r"\1", re.sub(r"\s+", " ", text).strip())
