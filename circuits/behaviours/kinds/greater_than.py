"""Years that end later than they begin (Hanna et al. 2023, arXiv 2305.00586); other nouns and centuries per split.

Tokenizers cut years differently: in two digits and two, in single digits, in three digits and one. There is a set of
prompts for each. In every pair one prompt begins early and one late; one answer lies between the two beginnings, so it
is right for the early prompt alone, and the other answer lies behind both, near the late one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from circuits.behaviours.registry import BEHAVIOURS, Behaviour, Split
from circuits.pairs import PromptPair

NOUNS: dict[Split, tuple[str, ...]] = {
    "train": ("war", "trial", "voyage", "dispute", "project", "siege", "strike", "mission"),
    "test": ("campaign", "journey", "reign", "expedition", "tour", "conflict", "study", "partnership"),
}
CENTURIES: dict[Split, tuple[int, ...]] = {"train": (15, 17), "test": (16, 18)}


def _pairs(split: Split, years: Sequence[tuple[str, str, str, str, str]]) -> Iterator[PromptPair]:
    """Prompts from (early year, late year, what is written of the last year, early answer, late answer)."""
    for noun in NOUNS[split]:
        for century in CENTURIES[split]:
            for early, late, begun, early_answer, late_answer in years:
                prompts = [
                    f"The {noun} lasted from the year {century}{year} to the year {century}{begun}"
                    for year in (early, late)
                ]
                yield PromptPair(prompts[0], prompts[1], early_answer, late_answer, "early_late")
                yield PromptPair(prompts[1], prompts[0], late_answer, early_answer, "late_early")


def _two_digits() -> list[tuple[str, str, str, str, str]]:
    """The last two digits are one token: 17|32 to 17|35."""
    steps = ((early, late) for early in range(11, 60, 8) for late in range(early + 15, 90, 12))
    return [(str(early), str(late), "", str(early + 4), str(late + 4)) for early, late in steps]


def _tens() -> list[tuple[str, str, str, str, str]]:
    """Every digit is a token; the digit of the decades comes next."""
    decades = ((early, late) for early in range(1, 6) for late in range(early + 2, 9))
    return [
        (f"{early}{unit}", f"{late}{unit}", "", str(early + 1), str(late + 1))
        for early, late in decades for unit in (3, 7)
    ]  # fmt: skip


def _units() -> list[tuple[str, str, str, str, str]]:
    """Three digits are one token: 173|2; the digit of the year comes next."""
    within = ((early, late) for early in range(1, 6) for late in range(early + 2, 9))
    return [
        (f"{ten}{early}", f"{ten}{late}", str(ten), str(early + 1), str(late + 1))
        for early, late in within for ten in (4, 8)
    ]  # fmt: skip


def candidates(split: Split) -> Sequence[Sequence[PromptPair]]:
    """The pairs of a split, for each way of cutting years."""
    return tuple(tuple(_pairs(split, years())) for years in (_two_digits, _tens, _units))


BEHAVIOURS.add("greater_than", Behaviour("What began in one year ends in a later one.", candidates))
