from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from tests.tiny import tiny_model, tiny_tokenizer
from workbench.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.tokens import TokenBatch, encode


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
