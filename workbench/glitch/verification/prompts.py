"""Prompts that a token has to be copied in, raw or through a chat template, built by splicing its id."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal  # Any: tokenizers of transformers have no common type

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.core.errors import DegenerateInputError, InvalidInputError, require_known
from workbench.core.records import from_jsonable, load_json
from workbench.glitch.vocabulary.tokenizer import Vocabulary
from workbench.models.model import Model

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


Forms = Literal["auto", "raw", "chat", "both"]
FORMS: dict[str, tuple[Form, ...]] = {"raw": ("raw",), "chat": ("chat",), "both": ("raw", "chat")}
SYSTEM = "Answer the user."
"""The system message for templates that demand one."""
_DAY, _DIRECTIVES = datetime.datetime(2025, 1, 1), "aAbBdHIjmMpSyY"
"""What day it is for templates that write the date, and what they may ask of it."""
_MARK = "\u2402\u2403reply\u2403\u2402"


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts as ids, form after form; `notes` say what was left out and why."""

    templates: tuple[Template, ...]
    notes: tuple[str, ...] = ()

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms that are present, in the order of the templates."""
        return tuple(dict.fromkeys(made.form for made in self.templates))


def prompt_set(
    model: Model, vocabulary: Vocabulary, prompts: Sequence[TokenPrompt] = PROMPTS, forms: Forms = "auto", *,
    strict: bool = False, steps: int = 1,
) -> PromptSet:  # fmt: skip
    """The prompts as ids, raw and through the model's chat template.

    Form "auto" is both for a model with a chat template that can be used, else raw. `steps` is the number of tokens
    that the model gives after a prompt: a prompt that does not fit into the model's positions with them can't be built.
    Such prompts are left out with a note, or raise with `strict`.

    Raises:
        UnknownNameError: for other forms.
        InvalidInputError: if a chat form is asked for and there is no template, or it accepts no user message.
        DegenerateInputError: if no prompt (with `strict`: one of them) can be built.
    """
    require_known("prompt form", forms, ("auto", *FORMS))
    made: list[Template] = []
    notes: list[str] = []
    for form in _usable(model.tokenizer, forms, notes):
        for prompt in prompts:
            try:
                made.append(_built(model, vocabulary, prompt, form, steps))
            except DegenerateInputError as error:
                if strict:
                    raise DegenerateInputError(f"The {form} prompt {prompt.name!r} can't be used: {error}") from error
                notes.append(f"The {form} prompt {prompt.name!r} was left out: {error}")
    if not made:
        raise DegenerateInputError(
            "No prompt could be built: " + " ".join(notes) + " Give other prompts in a file (ScanOptions.prompts)."
        )
    return PromptSet(tuple(made), tuple(notes))


def _usable(tokenizer: Any, forms: Forms, notes: list[str]) -> tuple[Form, ...]:
    if forms == "raw" or (forms == "auto" and not getattr(tokenizer, "chat_template", None)):
        return ("raw",)
    try:
        chat_text(tokenizer, "a", "b")
    except InvalidInputError as error:
        if forms != "auto":
            raise
        notes.append(f"Raw prompts only: {error}")
        return ("raw",)
    return FORMS["both" if forms == "auto" else forms]


def _built(model: Model, vocabulary: Vocabulary, prompt: TokenPrompt, form: Form, steps: int) -> Template:
    if form == "raw":
        made = template(prompt, vocabulary, lambda text: model.tokens(text).ids[0].tolist())
    else:
        made = template(
            prompt, vocabulary, lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"],
            lambda asked, token: chat_text(model.tokenizer, *asked.turns(token)), "chat",
        )  # fmt: skip
    rows, largest = getattr(model, "d_vocab", None), int(made.ids.max())
    if rows is not None and largest >= rows:
        raise DegenerateInputError(f"it holds id {largest}, and the model has rows for ids 0 to {rows - 1} only.")
    room, need = getattr(model, "max_tokens", None), len(made.ids) + steps - 1
    if room is not None and need > room:
        raise DegenerateInputError(f"it needs {need} positions for itself and the reply; the model has {room}.")
    return made


def chat_text(tokenizer: Any, user: str, reply: str) -> str:
    """A user's message and the beginning of the assistant's reply, as the chat template writes them.

    The reply is rendered as a finished message and cut where its text so far ends, so it stands where the template puts
    what the assistant finally says, behind any channel or empty thoughts. No system message is given, unless the
    template demands one: then a short one. A template that writes the date gets the same day always. BOS is left to the
    template.

    Raises:
        InvalidInputError: if there is no template, or it takes no such messages.
    """
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError("The tokenizer has no chat template. Use raw prompts, or set tokenizer.chat_template.")
    problem = "it changes or drops the text of the reply"
    # content as a list is what templates of models with images want
    for with_system, as_list in ((False, False), (False, True), (True, False), (True, True)):
        turns = [*([("system", SYSTEM)] if with_system else []), ("user", user), ("assistant", reply + _MARK)]
        messages = [
            {"role": role, "content": [{"type": "text", "text": said}] if as_list else said} for role, said in turns
        ]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=_timeless(tokenizer))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            problem = str(error).strip() or type(error).__name__
            continue
        if (reply + _MARK) in text:
            return text[: text.rindex(_MARK)]
    raise InvalidInputError(
        f"The chat template can't be used with a user's message and a reply ({problem}). Use raw prompts."
    )


def _timeless(tokenizer: Any) -> str:
    """The chat template with a clock that stands still: prompts, and so results, have to be the same tomorrow."""
    written = tokenizer.get_chat_template()
    if "strftime_now" not in written:
        return written
    # A macro, since transformers lets no function reach a template; the line break is the one that Jinja drops.
    shown = "".join(f" | replace('%{letter}', '{_DAY.strftime('%' + letter)}')" for letter in _DIRECTIVES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{shown} }}}}{{% endmacro %}}\n{written}"
