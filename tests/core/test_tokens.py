from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from tests.tiny import prefixed_tokenizer, spaced_tokenizer, tiny_model, tiny_tokenizer
from workbench.core.codec import token_bytes
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.tokens import TokenBatch, encode
from workbench.interventions.scopes import NotPrefix
from workbench.models.model import Model


def test_bos_follows_the_tokenizer_and_is_never_doubled() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.bos_token_id not in encode(tokenizer, "ab").ids
    assert "adds none" in encode(tokenizer, "ab").note
    assert encode(tokenizer, "ab", bos=True).ids[0, 0] == tokenizer.bos_token_id
    doubled = encode(tokenizer, "<bos>ab", bos=True)
    assert doubled.ids.tolist()[0].count(tokenizer.bos_token_id) == 1
    assert "already" in doubled.note


def test_padding_is_on_the_left_and_known_from_the_mask() -> None:
    batch = encode(tiny_tokenizer(), ["abcd", "<eos>b"])
    assert batch.mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert batch.ids[1].tolist()[0] == batch.ids[1].tolist()[2] == 1  # pad id == a real token's id
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch.n_tokens == 6
    assert batch.str_tokens[1] == ("<eos>", "b")
    assert batch.special is not None and batch.special.tolist() == [[False] * 4, [False, False, True, False]]


def test_a_slice_drops_columns_that_only_the_others_needed() -> None:
    batch = encode(tiny_tokenizer(), ["abcd", "ab", "a"])[slice(1, 3)]
    assert batch.ids.shape == (2, 2)
    assert batch.str_tokens == (("a", "b"), ("a",))
    assert batch[torch.tensor([1])].str_tokens == (("a",),)


def test_chats_use_the_template() -> None:
    chat = [{"role": "user", "content": "hi"}]
    batch = encode(tiny_tokenizer(), chat)
    assert "".join(batch.str_tokens[0]) == "<bos>user\nhi<eos>\n<bos>assistant"
    assert len(encode(tiny_tokenizer(), [chat, chat])) == 2


@pytest.mark.parametrize("bad", [[], "", ["a", ""]])
def test_empty_input_is_refused(bad) -> None:
    with pytest.raises(DegenerateInputError):
        encode(tiny_tokenizer(), bad)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises((ShapeError, TypeCheckError)):
        TokenBatch(torch.ones(3, dtype=torch.long), torch.ones(3, dtype=torch.bool))
    with pytest.raises((ShapeError, TypeCheckError)):
        tiny_model().capture(torch.ones(3, dtype=torch.long), ["embed"])
    with pytest.raises((InvalidInputError, TypeCheckError)):
        encode(tiny_tokenizer(), [3])  # type: ignore[list-item]


def test_html_is_escaped() -> None:
    shown = encode(tiny_tokenizer(), "<b>")._repr_html_()
    assert "<b>" not in shown and "&lt;" in shown


@pytest.mark.parametrize("kind", ["template", "sequence", "bert", "roberta"])
def test_all_that_the_tokenizer_puts_in_front_is_put_there(kind: str) -> None:
    tokenizer = prefixed_tokenizer(kind)
    ends = [] if kind in ("template", "sequence") else [tokenizer.convert_tokens_to_ids("[SEP]")]
    own = tokenizer("Hi")["input_ids"]
    batch = encode(tokenizer, "Hi")
    assert batch.ids[0].tolist() + ends == own == encode(tokenizer, "Hi", bos=True).ids[0].tolist() + ends
    start = "[CLS]" if ends else "[gMASK]<sop>"
    assert f"prefix {start} added" in batch.note and ("[SEP] of the tokenizer left off" in batch.note) == bool(ends)
    assert "".join(batch.str_tokens[0]) == f"{start}Hi"
    assert encode(tokenizer, "Hi", bos=False).ids[0].tolist() == own[len(own) - 2 - len(ends) :][:2]
    assert batch.special is not None and batch.special[0].tolist() == [True] * (len(own) - 2 - len(ends)) + [False] * 2
    again = encode(tokenizer, f"{start}Hi")
    assert torch.equal(again.ids, batch.ids) and "already starts with" in again.note
    assert torch.equal(encode(tokenizer, start.removeprefix("[gMASK]") + "Hi").ids, batch.ids), "the end of it is there"


def test_the_strings_of_a_sentencepiece_row_keep_their_spaces_and_whole_characters() -> None:
    batch = encode(spaced_tokenizer(), "the dog. ran 日本")
    assert batch.str_tokens[0][:5] == ("<s>", " the", " dog", ".", " ran")
    assert batch.str_tokens[0][5:] == (" ", "", "", "日", "", "", "本")
    long = encode(spaced_tokenizer(), "the dog ran. " * 30 + "é")
    assert "".join(long.str_tokens[0]) == "<s> " + "the dog ran. " * 30 + "é"
    assert set(long.str_tokens[0][1:9]) == {" the", " dog", " ran", "."}


@pytest.mark.parametrize("tail", [[0xE6], [0xE6, 0x97, 0xA5, 0xE6], [0xE6, 0x97, 0xA5, 0xE6, None], [None, 0xFF, None]])
@pytest.mark.parametrize("made", [tiny_tokenizer, spaced_tokenizer])
def test_joined_strings_are_the_text_also_of_broken_characters(made: Any, tail: list[int | None]) -> None:
    tokenizer = made()
    byte = {b: i for i, b in enumerate(token_bytes(tokenizer)) if len(b) == 1}
    ids = [byte[b"a" if b is None else bytes([b])] for b in [None, *tail]]
    batch = replace(TokenBatch.of_rows(torch.tensor([ids])), tokenizer=tokenizer)
    assert "".join(batch.str_tokens[0]) == tokenizer.decode(ids) and len(batch.str_tokens[0]) == len(ids)


def test_half_a_character_is_refused_in_texts_chats_and_stops() -> None:
    for value in ("bad \ud800", ["fine", "\udfff"], [{"role": "user", "content": "x\ud800"}]):
        with pytest.raises(InvalidInputError, match=r"half a character, .ud(800|fff) at"):
            encode(tiny_tokenizer(), value)
    with pytest.raises(InvalidInputError, match="half a character"):
        tiny_model().generate("a", 1, stop="\ud800")


SYSTEMLESS = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
CHATML = "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content | trim }}<eos>\n{% endfor %}<bos>assistant\n"
PARTS = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"
THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' else "
    "m.content }}\n{% endfor %}assistant:{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{% generation %}{% endgeneration %}"
)
COMMANDS = (
    "{% set s = messages[0].content.replace('/no_think', '').rstrip() %}{{ s | upper }}"
    "{% for m in messages[1:] %}{{ m.content | tojson }}{% endfor %}"
)
USER, PARTED = (
    {"role": "user", "content": " Where?\n"},
    {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
)
SYSTEM, SAID = (
    {"role": "system", "content": "x /no_think"},
    {"role": "assistant", "content": "<think>hm</think>\n\nHere"},
)


@pytest.mark.parametrize(
    ("template", "chat", "says"),
    [
        (PARTS, [USER], r"leaves out the text of message 0 \(user\).*list of parts"),
        (CHATML, [USER, SAID, PARTED], r"the parts of message 2 \(user\) as objects.*one text"),
        ("{{ messages[-1].content }}", [SYSTEM, USER], r"text of message 0 \(system\), 'x /no_think'"),
        (SYSTEMLESS + CHATML, [SYSTEM, USER], "roles system, user.*System role not supported"),
        ("{{ 1 / 0 }}", [USER], "ZeroDivisionError"),
        ("{% for m in %}", [USER], "TemplateSyntaxError"),
        ("{% for i in range(10 ** 9) %}a{% endfor %}", [USER], "OverflowError: Range too big"),
        (CHATML, [{"role": "user", "text": "Hi"}], r"message 0 \(user\) has no 'content', but role, text\."),
        (CHATML, [{"role": "user", "content": 3}], "content of message 0.*is a int"),
    ],
)
def test_a_chat_that_the_template_does_not_write_is_refused(template: str, chat: Any, says: str) -> None:
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = template
    with pytest.raises(InvalidInputError, match=says):
        encode(tokenizer, chat)


@pytest.mark.parametrize(
    ("template", "chat"),
    [
        (CHATML, [SYSTEM, USER, SAID, USER]),
        (THINKING, [USER, SAID, USER]),
        (COMMANDS, [SYSTEM, {"role": "user", "content": 'say "a"\nb'}]),
        (PARTS, [PARTED, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]),
        (THINKING, [USER, {"role": "assistant", "content": "", "tool_calls": []}, {"role": "tool", "content": "{}"}]),
    ],
)
def test_a_template_may_change_a_text(template: str, chat: Any) -> None:
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = template
    assert len(encode(tokenizer, chat)) == 1


def test_options_reach_the_template_and_unknown_ones_are_refused() -> None:
    tokenizer = tiny_tokenizer.__wrapped__()
    tokenizer.chat_template = THINKING
    batch = encode(tokenizer, [USER], enable_thinking=False)
    assert "".join(batch.str_tokens[0]).endswith("assistant:<think></think>") and "enable_thinking=False" in batch.note
    with pytest.raises(InvalidInputError, match="no such option. Did you mean enable_thinking?"):
        encode(tokenizer, [USER], enable_thinkin=False)
    with pytest.raises(InvalidInputError, match="'Hi' is a text"):
        encode(tokenizer, "Hi", enable_thinking=False)
    with pytest.raises(InvalidInputError, match="has no options"):
        encode(tiny_tokenizer(), [USER], enable_thinking=False)


def test_the_length_of_a_prefix_is_that_of_the_tokenizer() -> None:
    model = Model(tiny_model().hf, prefixed_tokenizer("template"))
    model.hf.resize_token_embeddings(262)
    model = Model(model.hf, model.tokenizer)
    assert model.capture("Hi", ["resid_post.0"], positions=NotPrefix()).flat("resid_post.0").shape[0] == 2
    assert tiny_model().capture("Hi", ["resid_post.0"], positions=NotPrefix()).flat("resid_post.0").shape[0] == 1
