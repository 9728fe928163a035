"""Indirect objects: of two names the one that was not repeated comes next (Wang et al. 2022, arXiv 2211.00593)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from circuits.behaviours.registry import BEHAVIOURS, Behaviour, Split
from circuits.pairs import PromptPair
from circuits.shift.biographies import NAMES

PLACES: dict[Split, tuple[str, ...]] = {
    "train": ("store", "garden", "restaurant", "school", "office", "beach"),
    "test": ("park", "station", "library", "market", "hospital", "museum"),
}
_OBJECTS = ("drink", "book", "letter", "key", "gift", "ball", "map")
_TEMPLATES = (
    "When {first} and {second} went to the {place}, {giver} gave a {thing} to",
    "After {first} and {second} arrived at the {place}, {giver} handed a {thing} to",
    "While {first} and {second} were at the {place}, {giver} passed a {thing} to",
)


def _made(split: Split) -> Iterator[PromptPair]:
    """Every two names in both orders and each template; place and thing take turns, so that all of them occur."""
    people, places = [name for names in NAMES[split] for name in names], PLACES[split]
    for i, first in enumerate(people):
        for j, second in enumerate(people):
            for k, template in enumerate(_TEMPLATES if i != j else ()):
                place, thing = places[(i + j + k) % len(places)], _OBJECTS[(i + 2 * j + k) % len(_OBJECTS)]
                with_giver = [
                    template.format(first=first, second=second, place=place, thing=thing, giver=giver)
                    for giver in (second, first)
                ]
                yield PromptPair(with_giver[0], with_giver[1], f" {first}", f" {second}", "abba")
                yield PromptPair(with_giver[1], with_giver[0], f" {second}", f" {first}", "baba")


def candidates(split: Split) -> Sequence[Sequence[PromptPair]]:
    """All pairs of a split; the counterpart repeats the other name."""
    return (tuple(_made(split)),)


BEHAVIOURS.add("ioi", Behaviour("Of two names, the one that is not named twice receives what is given.", candidates))
