"""Prompts that a token has to be copied in, built by splicing its id: text would be cut into other tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import DegenerateInputError, InvalidInputError
from workbench.glitch.tokenizer import Vocabulary
from workbench.records import from_jsonable, load_json

SLOT = "{token}"


@dataclass(frozen=True)
class Probe:
    """One prompt: `preamble`, then `shots` worked copies, then the beginning of one that the model has to finish.

    Attributes:
        name: short name.
        preamble: what stands in front.
        shown: the part that shows the token, with `{token}` in it.
        answer: the part that repeats it, with `{token}` in it; the model is asked at that place.
        shots: number of complete copies in front.
    """

    name: str
    preamble: str
    shown: str
    answer: str
    shots: int = 0

    def __post_init__(self) -> None:
        if SLOT not in self.shown or self.answer.count(SLOT) != 1 or self.shots < 0:
            raise InvalidInputError(
                f"Probe {self.name!r}: shown={self.shown!r}, answer={self.answer!r}, shots={self.shots}. "
                f"Both texts need {SLOT} (the answer once), and shots can't be negative."
            )

    @property
    def occurrences(self) -> int:
        """How often the token stands in the prompt."""
        return self.shown.count(SLOT) * (self.shots + 1) + self.shots

    def text(self, token: str) -> str:
        """The prompt as text, up to the place where the model has to give the token."""
        template = self.preamble + (self.shown + self.answer) * self.shots + self.shown
        return (template + self.answer[: self.answer.index(SLOT)]).replace(SLOT, token)


PROBES = (
    Probe("copy", "A copying machine was checked again and again. What goes in comes out unchanged, every time.",
          "\nIn: «{token}»\nOut:", " «{token}»", shots=8),
    Probe("row", "One word fills this whole page, again and again and nothing else:\n", "{token}", "{token}", shots=20),
    Probe("meaning", "A dictionary assistant names each word before explaining it, and treats all words alike.\n"
          "Reader: Please explain the word 'qwvbnx'.\nAssistant: 'qwvbnx' is not a word that I have met.\n"
          "Reader: Please explain the word '", "{token}'.\nAssistant:", " '{token}'"),
)  # fmt: skip
"""The prompts used unless a file names others: many worked copies, a plain repetition, and a question."""


def probes_from(path: Path) -> tuple[Probe, ...]:
    """Prompts from a JSON file: a list of objects with name, preamble, shown, answer and shots.

    Raises:
        MissingFileError: if there is no such file.
        InvalidInputError: if it holds no list of probes.
    """
    probes = from_jsonable(tuple[Probe, ...], load_json(path))
    if not probes:
        raise InvalidInputError(f"{path} holds no prompts. Give at least one with name, preamble, shown and answer.")
    return probes


@dataclass(frozen=True, eq=False)
class Template:
    """A probe as ids, with the places where the token goes."""

    probe: Probe
    ids: Int[Tensor, " pos"]
    slots: Int[Tensor, " slots"]

    def fill(self, tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch pos"]:
        """One row per token, all of the same length, that differ in the slots only."""
        rows = self.ids.repeat(len(tokens), 1)
        rows[:, self.slots] = tokens[:, None].expand(-1, len(self.slots))
        return rows


def template(probe: Probe, vocabulary: Vocabulary, encode: Callable[[str], Sequence[int]]) -> Template:
    """The probe as ids, made with a placeholder token that provably stays whole in it.

    Args:
        probe: the prompt.
        vocabulary: where the placeholder is looked for (long, purely alphabetic tokens without a leading space).
        encode: text to ids, with what the model's tokenizer puts in front of a text.

    Raises:
        DegenerateInputError: if no token of the vocabulary stays whole in this prompt.
    """
    for i in _placeholders(vocabulary):
        ids = torch.as_tensor(list(encode(probe.text(vocabulary.text[i]))), dtype=torch.long)
        slots = (ids == i).nonzero().flatten()
        if len(slots) == probe.occurrences:
            return Template(probe, ids, slots)
    raise DegenerateInputError(
        f"Probe {probe.name!r} holds its token {probe.occurrences} times, but none of the placeholders tried stays a "
        "single token there. Separate the token from its neighbours, for example by quotes."
    )


def _placeholders(vocabulary: Vocabulary, limit: int = 200) -> list[int]:
    texts = vocabulary.text
    plain = [i for i, c in enumerate(vocabulary.category) if c == "ok" and texts[i].isascii() and texts[i].isalpha()]
    return sorted(plain, key=lambda i: (len(set(texts[i])), len(texts[i]), -i), reverse=True)[:limit]
