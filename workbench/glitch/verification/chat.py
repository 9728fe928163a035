"""Prompts in the forms that a model knows: plain text, and where it has one, its chat template."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal  # Any: tokenizers of transformers have no common type

from workbench.core.errors import DegenerateInputError, InvalidInputError, require_known
from workbench.glitch.verification.prompts import PROMPTS, Form, Template, TokenPrompt, template
from workbench.glitch.vocabulary.tokenizer import Vocabulary
from workbench.models.model import Model

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
                made.append(_fitting(model, _built(model, vocabulary, prompt, form), steps))
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


def _built(model: Model, vocabulary: Vocabulary, prompt: TokenPrompt, form: Form) -> Template:
    if form == "raw":
        return template(prompt, vocabulary, lambda text: model.tokens(text).ids[0].tolist())
    return template(
        prompt, vocabulary, lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"],
        lambda asked, token: chat_text(model.tokenizer, *asked.turns(token)), "chat",
    )  # fmt: skip


def _fitting(model: Model, made: Template, steps: int) -> Template:
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
