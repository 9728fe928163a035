"""Subject-verb agreement in four structures, after Finlayson et al. 2021 (arXiv 2106.06087); other nouns per split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from circuits.behaviours.registry import BEHAVIOURS, Behaviour, Split
from circuits.pairs import PromptPair

NUMBERS = ("singular", "plural")
VERBS = ((" is", " are"), (" has", " have"), (" does", " do"), (" goes", " go"))
"""Singular and plural form of what comes next."""
PREPOSITIONS = ("behind", "beside", "near")
TRANSITIVES = (
    ("praises", "praise"), ("calls", "call"), ("describes", "describe"), ("follows", "follow"),
    ("influences", "influence"), ("forgives", "forgive"), ("protects", "protect"), ("informs", "inform"),
    ("visits", "visit"), ("likes", "like"), ("hates", "hate"),
)  # fmt: skip
_IRREGULAR = {"man": "men", "woman": "women"}


@dataclass(frozen=True)
class Nouns:
    """The nouns of a split.

    Attributes:
        people: subjects, of the sentence and of relative clauses.
        things: what somebody is behind, beside or near.
    """

    people: tuple[str, ...]
    things: tuple[str, ...]


NOUNS: dict[Split, Nouns] = {
    "train": Nouns(
        ("athlete", "aunt", "boy", "carpenter", "doctor", "farmer", "father", "friend", "girl", "guy", "guard", "chef",
         "architect", "skater", "king", "nurse", "student", "artist", "pilot", "soldier", "judge", "writer", "clerk",
         "neighbor"),
        ("bike", "car", "cat", "chair", "desk", "house", "boat", "door"),
    ),
    "test": Nouns(
        ("kid", "lawyer", "man", "mother", "poet", "singer", "teacher", "uncle", "victim", "woman", "dancer",
         "minister", "driver", "assistant", "executive", "parent", "player", "leader"),
        ("dog", "table", "tree", "truck", "window", "bench", "fence", "lamp"),
    ),
}  # fmt: skip


def plural(noun: str) -> str:
    """Plural of a noun of this file.

    >>> plural("woman"), plural("desk")
    ('women', 'desks')
    """
    return _IRREGULAR.get(noun, noun + "s")


def _forms(noun: str) -> tuple[str, str]:
    return noun, plural(noun)


def _simple(nouns: Nouns) -> Iterator[PromptPair]:
    for noun in nouns.people:
        yield from _both_numbers(lambda number, noun=noun: f"The {_forms(noun)[number]}", "")


def _nounpp(nouns: Nouns) -> Iterator[PromptPair]:
    for noun in nouns.people:
        for preposition in PREPOSITIONS:
            for thing in nouns.things:
                for other in (0, 1):
                    rest = f"{preposition} the {_forms(thing)[other]}"
                    yield from _both_numbers(
                        lambda number, noun=noun, rest=rest: f"The {_forms(noun)[number]} {rest}", NUMBERS[other]
                    )


def _rc(nouns: Nouns) -> Iterator[PromptPair]:
    for i, (noun, inner, other) in enumerate(_two_people(nouns)):
        # each pair of nouns with one verb, so that there are not ten times as many candidates
        rest = f"that the {_forms(inner)[other]} {TRANSITIVES[i % len(TRANSITIVES)][other]}"
        yield from _both_numbers(
            lambda number, noun=noun, rest=rest: f"The {_forms(noun)[number]} {rest}", NUMBERS[other]
        )


def _within_rc(nouns: Nouns) -> Iterator[PromptPair]:
    for inner, noun, other in _two_people(nouns):
        start = f"The {_forms(noun)[other]} that the"
        yield from _both_numbers(
            lambda number, inner=inner, start=start: f"{start} {_forms(inner)[number]}", NUMBERS[other]
        )


def _two_people(nouns: Nouns) -> Iterator[tuple[str, str, int]]:
    """The noun that decides, another one, and the number of the other one."""
    return ((a, b, other) for a in nouns.people for b in nouns.people if a != b for other in (0, 1))


def _both_numbers(prompt: Callable[[int], str], distractor: str) -> Iterator[PromptPair]:
    """A prompt with its deciding noun in either number, with each verb; the case is `<subject>_<distractor>`."""
    for number in (0, 1):
        for verb in VERBS:
            case = f"{NUMBERS[number]}_{distractor}" if distractor else NUMBERS[number]
            yield PromptPair(prompt(number), prompt(1 - number), verb[number], verb[1 - number], case)


def _register(name: str, about: str, made: Callable[[Nouns], Iterator[PromptPair]]) -> None:
    def candidates(split: Split) -> Sequence[Sequence[PromptPair]]:
        return (tuple(made(NOUNS[split])),)

    BEHAVIOURS.add(name, Behaviour(about, candidates))


_register("sva_simple", "The verb agrees with the subject in front of it.", _simple)
_register("sva_nounpp", "The verb agrees with the subject across a prepositional phrase with another noun.", _nounpp)
_register("sva_rc", "The verb agrees with the subject across a relative clause with a subject of its own.", _rc)
_register("sva_within_rc", "The verb of a relative clause agrees with the subject inside the clause.", _within_rc)
