"""Gendered pronouns: he or she follows from the first name (after Mathwin et al. 2023); other names per split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from circuits.behaviours.registry import BEHAVIOURS, Behaviour, Split
from circuits.pairs import PromptPair
from circuits.shift.biographies import GENDERS, NAMES

_PRONOUNS = (" he", " she")
_ADJECTIVES = ("kind", "clever", "busy", "patient", "funny")
_NOUNS = ("friend", "person", "driver", "student", "neighbour", "cook", "painter")
_TEMPLATES = (
    "So {name} is a really {adjective} {noun}, isn't",
    "{name} is known as a {adjective} {noun}, and today",
    "My {noun} {name} was {adjective}, and everyone knew that",
)


def _made(split: Split) -> Iterator[PromptPair]:
    """Every two names of different gender with each template; adjective and noun take turns."""
    for i, he in enumerate(NAMES[split][0]):
        for j, she in enumerate(NAMES[split][1]):
            for k, template in enumerate(_TEMPLATES):
                adjective, noun = _ADJECTIVES[(i + j + k) % len(_ADJECTIVES)], _NOUNS[(i + 2 * j + k) % len(_NOUNS)]
                prompts = [template.format(name=name, adjective=adjective, noun=noun) for name in (he, she)]
                for gender in (0, 1):
                    yield PromptPair(
                        prompts[gender], prompts[1 - gender], _PRONOUNS[gender], _PRONOUNS[1 - gender], GENDERS[gender]
                    )


def candidates(split: Split) -> Sequence[Sequence[PromptPair]]:
    """All pairs of a split; the counterpart has a name of the other gender."""
    return (tuple(_made(split)),)


BEHAVIOURS.add("pronouns", Behaviour("The pronoun agrees with the gender of a first name.", candidates))
