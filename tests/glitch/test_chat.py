from __future__ import annotations

import datetime

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from tests.glitch.tiny_vocab import SPECIAL, byte_level, sentencepiece
from workbench.core.codec import FastCodec
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.tokens import TokenBatch, encode
from workbench.glitch.verification.prompts import PROMPTS, SYSTEM, TokenPrompt, chat_text, prompt_hash, prompt_set
from workbench.glitch.vocabulary.tokenizer import Vocabulary, analyse
from workbench.models.model import Model

PLAIN = (
    "{% for m in messages %}<u>{{ m.role }}: {{ m.content }}</u>\n{% endfor %}"
    "{% if add_generation_prompt %}<u>assistant: {% endif %}"
)
REFUSES_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
)
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<u>assistant<c>final<m>{{ m.content }}</u>"
    "{% else %}<u>{{ m.role }}<m>{{ m.content }}</u>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<u>assistant{% endif %}"
)
PARTS = "{% for m in messages %}<u>{{ m.role }}: {% for p in m.content %}{{ p.text + '' }}{% endfor %}</u>{% endfor %}"
TRIMS = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"


class Asked(Model):
    """As much of a model as prompts need."""

    d_vocab = None  # as many rows as are needed

    def __init__(self, backend: Tokenizer, template: str | None, bos: bool = False) -> None:
        extra = {"bos_token": SPECIAL} if backend.token_to_id(SPECIAL) is not None else {}
        if bos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{SPECIAL} $A", special_tokens=[(SPECIAL, backend.token_to_id(SPECIAL))]
            )
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **extra)
        self.tokenizer.chat_template = template

    def tokens(self, text: str) -> TokenBatch:
        return encode(self.tokenizer, text)

    @property
    def vocabulary(self) -> Vocabulary:
        return analyse(FastCodec.of(self.tokenizer.backend_tokenizer))


class Tomorrow(datetime.datetime):
    """A clock that is wrong by years."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return cls(2099, 9, 9, tzinfo=tz)


def test_a_template_that_writes_the_date_gives_the_same_prompts_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Asked(byte_level(), "Today is {{ strftime_now('%d %b %Y') }}.\n" + PLAIN)
    today = prompt_set(model, model.vocabulary)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert prompt_hash(prompt_set(model, model.vocabulary).templates) == prompt_hash(today.templates)
    assert "01 Jan 2025" in chat_text(model.tokenizer, "a", "b")


def test_a_template_that_demands_a_system_message_gets_a_short_one() -> None:
    demands = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    model = Asked(byte_level(), demands + PLAIN)
    made = prompt_set(model, model.vocabulary)
    assert made.forms == ("raw", "chat") and made.notes == ()
    assert chat_text(model.tokenizer, "a", "b") == f"<u>system: {SYSTEM}</u>\n<u>user: a</u>\n<u>assistant: b"
    assert "system" not in chat_text(Asked(byte_level(), PLAIN).tokenizer, "a", "b")


@pytest.mark.parametrize("template", [PLAIN, REFUSES_SYSTEM, CHANNELS, PARTS, TRIMS])
@pytest.mark.parametrize("bos", [False, True])
def test_both_forms_hold_the_token_in_equal_places_for_all_candidates(template: str, bos: bool) -> None:
    model = Asked(byte_level(), template, bos)
    made = prompt_set(model, model.vocabulary)
    assert made.forms == ("raw", "chat") and made.notes == () and len(made.templates) == 2 * len(PROMPTS)
    assert len({t.name for t in made.templates}) == 6
    words = torch.tensor([model.tokenizer.backend_tokenizer.token_to_id(w) for w in ("ember", "Ġharbor", "z", "Ã")])
    for t in made.templates:
        assert len(t.slots) == t.prompt.occurrences
        rows = t.fill(words)
        assert rows.shape == (4, len(t.ids)) and torch.equal(rows[:, t.slots[-1]], words)
        n_bos = int((t.ids == model.tokenizer.bos_token_id).sum())
        assert n_bos == (1 if (t.form == "raw" and bos) or (t.form == "chat" and template is REFUSES_SYSTEM) else 0)


def test_the_reply_stands_where_the_template_puts_what_is_finally_said() -> None:
    prompt = TokenPrompt("p", "Say it back. ", "In «{token}» ", "Out «{token}»", request="Now.")
    for template, expected in (
        (PLAIN, "<u>user: Say it back. In «ember» Now.</u>\n<u>assistant: Out «"),
        (CHANNELS, "<u>user<m>Say it back. In «ember» Now.</u><u>assistant<c>final<m>Out «"),
        (PARTS, "<u>user: Say it back. In «ember» Now.</u><u>assistant: Out «"),
        (TRIMS, "[user] Say it back. In «ember» Now.\n[assistant] Out «"),
    ):
        assert chat_text(Asked(byte_level(), template).tokenizer, *prompt.turns("ember")) == expected


def test_a_reply_may_begin_with_the_token_itself() -> None:
    prompt = TokenPrompt("p", "", "Say «{token}»", "{token}")
    assert chat_text(Asked(byte_level(), TRIMS).tokenizer, *prompt.turns("ember")).endswith("[assistant] ")


def test_without_a_usable_template_there_are_raw_prompts_only() -> None:
    none = Asked(byte_level(), None)
    assert prompt_set(none, none.vocabulary).forms == ("raw",)
    with pytest.raises(InvalidInputError, match="no chat template"):
        prompt_set(none, none.vocabulary, forms="chat")
    deaf = Asked(byte_level(), "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    made = prompt_set(deaf, deaf.vocabulary)
    assert made.forms == ("raw",) and "Raw prompts only" in made.notes[0]
    with pytest.raises(InvalidInputError, match="changes or drops"):
        prompt_set(deaf, deaf.vocabulary, forms="both")


def test_forms_are_as_asked_and_change_the_hash() -> None:
    model = Asked(sentencepiece(), PLAIN)
    made = {forms: prompt_set(model, model.vocabulary, forms=forms) for forms in ("raw", "chat", "both")}
    assert [m.forms for m in made.values()] == [("raw",), ("chat",), ("raw", "chat")]
    assert len({prompt_hash(m.templates) for m in made.values()}) == 3
    assert prompt_hash(made["both"].templates) == prompt_hash(prompt_set(model, model.vocabulary).templates)


def test_a_probe_that_cannot_be_built_is_left_out_and_named_or_refused() -> None:
    model = Asked(byte_level(), None)
    every = "\n".join(text for text in model.vocabulary.text if text.isalpha())
    full = TokenPrompt(
        "full", every, "\n{token}\n", "{token}"
    )  # whatever stands in for the token is there once too often
    made = prompt_set(model, model.vocabulary, (*PROMPTS, full))
    assert len(made.templates) == len(PROMPTS) and "'full' was left out" in made.notes[0]
    with pytest.raises(DegenerateInputError, match="full"):
        prompt_set(model, model.vocabulary, (*PROMPTS, full), strict=True)
    with pytest.raises(DegenerateInputError, match="No prompt could be built"):
        prompt_set(model, model.vocabulary, (full,))


def test_a_prompt_with_ids_that_the_model_has_no_row_for_is_left_out_or_refused() -> None:
    model = Asked(byte_level(), None)
    made = prompt_set(model, model.vocabulary)
    largest = [int(t.ids.max()) for t in made.templates]
    setattr(model, "d_vocab", max(largest))  # noqa: B010  # a vocabulary larger than the matrix
    fewer = prompt_set(model, model.vocabulary)
    assert [t.name for t in fewer.templates] == [
        t.name for t, i in zip(made.templates, largest, strict=True) if i < max(largest)
    ]
    assert f"rows for ids 0 to {max(largest) - 1} only" in fewer.notes[0]
    with pytest.raises(DegenerateInputError, match=r"raw prompt .* can't be used: it holds id"):
        prompt_set(model, model.vocabulary, strict=True)
