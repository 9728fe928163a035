"""Prompts that a token has to be copied in, built by splicing its id: text would be cut into other tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.records import from_jsonable, load_json
from workbench.glitch.vocabulary.tokenizer import Vocabulary

SLOT = "{token}"
_MAX_PLACEHOLDERS = 200
Form = Literal["raw", "chat"]
"""How a prompt is put to the model: as plain text to go on with, or as a user's message with a reply begun."""


@dataclass(frozen=True)
class TokenPrompt:
    """One prompt about a token: `preamble`, then `shots` worked copies, then the beginning of one to finish.

    Attributes:
        shown: the part that shows the token, with `{token}` in it.
        answer: the part that repeats it, with `{token}` in it; the model is asked at that place.
        shots: number of complete copies in front.
        request: what the user adds at the end of the message, in chat form.
        reply: how the reply begins, in chat form; None for what `answer` holds in front of the token.
    """

    name: str
    preamble: str
    shown: str
    answer: str
    shots: int = 0
    request: str = ""
    reply: str | None = None

    def __post_init__(self) -> None:
        fixed = self.preamble + self.request + (self.reply or "")
        if SLOT not in self.shown or self.answer.count(SLOT) != 1 or SLOT in fixed or self.shots < 0:
            raise InvalidInputError(
                f"Prompt {self.name!r}: shown={self.shown!r}, answer={self.answer!r}, shots={self.shots}. Both texts "
                f"need {SLOT} (the answer once), preamble, request and reply none, and shots can't be negative."
            )

    @property
    def occurrences(self) -> int:
        """How often the token stands in the prompt."""
        return self.shown.count(SLOT) * (self.shots + 1) + self.shots

    def text(self, token: str) -> str:
        """The prompt as text, up to the place where the model has to give the token."""
        return (self._question + self._lead).replace(SLOT, token)

    def turns(self, token: str) -> tuple[str, str]:
        """The same prompt as a user's message and the beginning of the reply, up to where the token has to come."""
        reply = self._lead.lstrip() if self.reply is None else self.reply
        return (self._question + self.request).strip().replace(SLOT, token), reply

    @property
    def _question(self) -> str:
        return self.preamble + (self.shown + self.answer) * self.shots + self.shown

    @property
    def _lead(self) -> str:
        return self.answer[: self.answer.index(SLOT)]


PROMPTS = (
    TokenPrompt("copy", "A copying machine was checked again and again. What goes in comes out unchanged, every time.",
                "\nIn: «{token}»\nOut:", " «{token}»", shots=8),
    TokenPrompt("row", "One word fills this whole page, again and again and nothing else:\n", "{token}", "{token}",
                shots=20, request="\n\nWhich word fills the page?", reply="The word is «"),
    TokenPrompt("meaning", "A dictionary assistant names each word before explaining it, and treats all words alike.\n"
                "Reader: Please explain the word 'qwvbnx'.\nAssistant: 'qwvbnx' is not a word that I have met.\n"
                "Reader: Please explain the word '", "{token}'.\nAssistant:", " '{token}'"),
)  # fmt: skip
"""The prompts used unless a file names others: many worked copies, a plain repetition, and a question."""


def prompts_from(path: Path) -> tuple[TokenPrompt, ...]:
    """Prompts from a JSON file: a list of objects with name, preamble, shown, answer and shots.

    Raises:
        MissingFileError: if there is no such file.
        InvalidInputError: if it holds no list of prompts.
    """
    prompts = from_jsonable(tuple[TokenPrompt, ...], load_json(path))
    if not prompts:
        raise InvalidInputError(f"{path} holds no prompts. Give at least one with name, preamble, shown and answer.")
    return prompts


@dataclass(frozen=True, eq=False)
class Template:
    """A `TokenPrompt` as ids, with the places where the token goes."""

    prompt: TokenPrompt
    ids: Int[Tensor, " pos"]
    slots: Int[Tensor, " slots"]
    form: Form = "raw"

    @property
    def name(self) -> str:
        """Form and prompt, which no other template of a test shares."""
        return f"{self.form}:{self.prompt.name}"

    @property
    def shared(self) -> int:
        """Number of leading ids that do not depend on the token."""
        return int(self.slots.min()) if len(self.slots) else len(self.ids)

    def fill(self, tokens: Int[Tensor, " batch"]) -> Int[Tensor, "batch pos"]:
        """One row per token, all of the same length, that differ in the slots only."""
        rows = self.ids.repeat(len(tokens), 1)
        rows[:, self.slots] = tokens[:, None].expand(-1, len(self.slots))
        return rows

    def spelled(self, pieces: Sequence[int]) -> list[int]:
        """The ids with several tokens in each slot instead of one."""
        slots, row = set(self.slots.tolist()), []
        for place, i in enumerate(self.ids.tolist()):
            row += pieces if place in slots else [i]
        return row


def prompt_hash(templates: Sequence[Template]) -> str:
    """Twelve hex digits of the prompts as ids: the same for the same prompts through the same tokenizer."""
    parts = [(made.name, made.ids.tolist(), made.slots.tolist()) for made in templates]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def template(
    prompt: TokenPrompt, vocabulary: Vocabulary, encode: Callable[[str], Sequence[int]],
    write: Callable[[TokenPrompt, str], str] = TokenPrompt.text, form: Form = "raw",
) -> Template:  # fmt: skip
    """The prompt as ids, made with a placeholder token that provably stays whole in it.

    Placeholders are long, purely alphabetic tokens without a leading space. `encode` gives the ids of a text with what
    the model's tokenizer puts in front of it; `write` gives the prompt with a token as text, in the stated form.

    Raises:
        DegenerateInputError: if no token of the vocabulary stays whole in this prompt.
    """
    texts = vocabulary.text
    plain = [i for i, c in enumerate(vocabulary.category) if c == "ok" and texts[i].isalpha()]
    plain.sort(key=lambda i: (texts[i].isascii(), len(set(texts[i])), len(texts[i]), -i), reverse=True)
    for i in plain[:_MAX_PLACEHOLDERS]:
        ids = torch.as_tensor(list(encode(write(prompt, texts[i]))), dtype=torch.long)
        slots = (ids == i).nonzero().flatten()
        if len(slots) == prompt.occurrences:
            return Template(prompt, ids, slots, form)
    raise DegenerateInputError(
        f"Prompt {prompt.name!r} holds its token {prompt.occurrences} times, but none of the placeholders tried stays "
        "a single token there. Separate the token from its neighbours, for example by quotes."
    )
