"""An approximate tagger: tense of the first verb and number of the first noun, by word lists and endings.

Rules and no model, so that it needs no download and the same text always gets the same tag. It knows the closed classes
and about 500 verbs; an unknown word is a noun unless its ending says otherwise. Its accuracy on 200 sentences that were
tagged by hand is in the documentation, and a test checks it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from circuits.cues.lexicon import (
    ADJECTIVES,
    BETWEEN,
    DETERMINERS,
    ING_NOUNS,
    IRREGULAR_PASTS,
    IRREGULAR_PLURALS,
    MODALS,
    NAMES_IN_S,
    NOUN_PRONOUNS,
    OTHER,
    OTHER_PRONOUNS,
    PAST_AUXILIARIES,
    PLURAL_PRONOUNS,
    PRESENT_AUXILIARIES,
    SINGULAR_IN_S,
    SINGULAR_PRONOUNS,
    TITLES,
    VERBS,
)

Tag = Literal[
    "noun", "nouns", "present", "past", "base", "participle", "modal", "determiner", "adjective", "pronoun", "other"
]
"""Singular or plural noun, finite verb in the present or past, infinitive, -ing form, and what is none of these."""

_WORD = re.compile(r"[^\W\d_]+(?=n't\b)|n't\b|'(?:s|re|ve|d|ll|m)\b|[^\W\d_]+(?:-[^\W\d_]+)*|\d[\d.,]*|[.!?;:,]")
_ADJECTIVE_ENDINGS = ("ous", "ful", "ive", "less", "able", "ible", "ish", "ical", "ary")
_NO_ADVERBS = ("family", "italy", "july", "reply", "fly", "ally", "bully", "rally", "supply", "belly", "lily", "apply")
VERBAL = ("present", "past", "base", "participle", "modal")


@dataclass
class _State:
    """What came before the word.

    Attributes:
        is_open: a noun phrase has begun and has no noun yet.
        subject: the noun or pronoun that a verb would agree with, if one came last.
        has_verb: whether a verb came already.
        begins: whether the sentence begins here.
        after_to: whether the last word is "to".
        after_title: whether the last word is a title such as "Mr".
    """

    is_open: bool = False
    subject: Literal["", "singular", "plural"] = ""
    has_verb: bool = False
    begins: bool = True
    after_to: bool = False
    after_title: bool = False
    seen: list[Tag] = field(default_factory=list)


def tags(text: str) -> Iterator[tuple[str, Tag]]:
    """The words of a text with what each is.

    >>> [tag for _, tag in tags("The dogs chase cats.")]
    ['determiner', 'nouns', 'present', 'nouns']
    """
    words = [word.replace("’", "'") for word in _WORD.findall(text.replace("’", "'"))]
    state = _State()
    for i, word in enumerate(words):
        if word in ".!?;:":
            # the full stop of a title ends no sentence
            state = state if state.after_title else _State(has_verb=state.has_verb)
        elif word == ",":
            state.is_open, state.subject = False, ""
        else:
            following = words[i + 1].lower() if i + 1 < len(words) else ""
            tag = _tag(word.lower(), following, state)
            yield word, tag
            _advance(state, word.lower(), tag)


def is_present(text: str) -> bool:
    """Whether the first verb is a present tense; False for a past tense, an infinitive, a participle, or no verb.

    >>> is_present("She teaches law."), is_present("She gave lectures."), is_present("She can swim.")
    (True, False, False)
    """
    return next((tag == "present" for _, tag in tags(text) if tag in VERBAL), False)


def is_plural(text: str) -> bool:
    """Whether the first noun is a plural; False for a singular, or no noun.

    >>> is_plural("Old ships sank."), is_plural("The ship sank."), is_plural("He sank.")
    (True, False, False)
    """
    return next((tag == "nouns" for _, tag in tags(text) if tag in ("noun", "nouns")), False)


def _tag(word: str, following: str, state: _State) -> Tag:
    closed = _closed(word, following, state)
    if closed is not None:
        return closed
    number: Tag = "nouns" if _ends_plural(word) and not state.after_title else "noun"
    if state.after_title:
        return "noun"
    if state.after_to and word in VERBS:
        return "base"
    verb = _verb(word, following, state)
    if verb is not None:
        return verb
    if _is_adjective(word):
        return "adjective"
    if _is_past(word) or (word.endswith("ing") and len(word) > 4 and word not in ING_NOUNS):
        return "adjective"
    return number


def _closed(word: str, following: str, state: _State) -> Tag | None:
    """The tag of a word of a closed class."""
    if word == "'s":
        # after a noun a possessive, after a pronoun "is" or "has"
        return "present" if not state.seen or state.seen[-1] == "pronoun" else "determiner"
    if word in MODALS:
        return "modal"
    if word in PRESENT_AUXILIARIES:
        return "base" if state.after_to else "present"
    if word in PAST_AUXILIARIES:
        return "past"
    if word in ("this", "that", "there", "which") and _can_be_verb(following):
        return "pronoun"
    if word == "her" or word in DETERMINERS or word[0].isdigit():
        return "determiner"
    if word in NOUN_PRONOUNS:
        return "noun"
    if word in PLURAL_PRONOUNS | SINGULAR_PRONOUNS | OTHER_PRONOUNS:
        return "pronoun"
    is_adverb = word.endswith("ly") and len(word) > 4 and word not in _NO_ADVERBS
    return "other" if word in OTHER or is_adverb or word in TITLES else None


def _verb(word: str, following: str, state: _State) -> Tag | None:
    """The tag of a word that is a verb here; None if it is none."""
    if state.is_open:
        return None
    if word.endswith("ing") and len(word) > 4 and word not in ING_NOUNS:
        return "participle"
    if state.begins and not state.subject:
        if _is_past(word) and word not in VERBS:
            return "past"
        # an imperative, unless a verb follows and this is its subject
        is_imperative = word in VERBS and not _can_be_verb(following, finite_only=True)
        return "base" if is_imperative and not _is_adjective(word) else None
    if _stem(word) in VERBS and state.subject != "plural":
        return "present"
    is_base = word in VERBS
    if is_base and (state.subject == "plural" or (not state.subject and state.has_verb)):
        return "present" if state.subject == "plural" else "base"
    return "past" if _is_past(word) else None


def _can_be_verb(word: str, finite_only: bool = False) -> bool:
    auxiliary = word in MODALS | PRESENT_AUXILIARIES | PAST_AUXILIARIES
    return auxiliary or _stem(word) in VERBS or _is_past(word) or (not finite_only and word in VERBS)


def _stem(word: str) -> str:
    """The verb of which this is the third person singular; "" if it is none.

    >>> [_stem(word) for word in ("carries", "watches", "needs", "need", "goes")]
    ['carry', 'watch', 'need', '', 'go']
    """
    for ending, instead in (("ies", "y"), ("es", ""), ("s", "")):
        if word.endswith(ending) and word[: -len(ending)] + instead in VERBS:
            return word[: -len(ending)] + instead
    return ""


def _is_past(word: str) -> bool:
    return word in IRREGULAR_PASTS or (word.endswith("ed") and len(word) > 4 and not word.endswith("eed"))


def _is_adjective(word: str) -> bool:
    return word in ADJECTIVES or (len(word) > 5 and word.endswith(_ADJECTIVE_ENDINGS))


def _ends_plural(word: str) -> bool:
    """Whether a noun is a plural by its ending.

    >>> [_ends_plural(word) for word in ("ships", "glass", "virus", "crisis", "mice", "James")]
    [True, False, False, False, True, False]
    """
    word = word.lower()
    if word in IRREGULAR_PLURALS:
        return True
    singular = word in SINGULAR_IN_S or word in NAMES_IN_S or word.endswith(("ss", "us", "is"))
    return word.endswith("s") and len(word) > 3 and not singular


def _advance(state: _State, word: str, tag: Tag) -> None:
    state.after_title = word in TITLES
    state.after_to = word == "to"
    state.begins = state.begins and tag in ("other", "adjective") and not state.after_title
    state.has_verb = state.has_verb or tag in VERBAL
    if tag in ("noun", "nouns"):
        state.is_open, state.subject = False, "plural" if tag == "nouns" else "singular"
    elif tag == "pronoun":
        plural = word in PLURAL_PRONOUNS or (word in ("who", "which", "that") and state.subject == "plural")
        state.is_open, state.subject = False, "plural" if plural else "singular"
    elif tag in ("determiner", "adjective"):
        state.is_open, state.subject = True, ""
    elif tag in VERBAL or (word in OTHER and word not in BETWEEN):
        state.is_open, state.subject = False, ""
    state.seen.append(tag)
