from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from tests.tiny import tiny_tokenizer
from workbench.core.codec import token_bytes
from workbench.models.model import Model
from workbench.models.stopping import StopStrings


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Spaces as ▁, bytes as <0xNN>, one leading space taken off a text."""
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁", "▁the", "the", ".", ".\n", "▁a", "a", "b", "ab",
              "▁.", "..", "a.b", *"cdefth", "é"]  # fmt: skip
    backend = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_token_bytes_keep_the_leading_space_and_stray_bytes() -> None:
    tokenizer = sentencepiece_like()
    found = dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), token_bytes(tokenizer), strict=True))
    assert found["▁the"] == b" the" and found["the"] == b"the" and found["▁"] == b" "
    assert found["<0x0A>"] == b"\n" and found["<0xC3>"] == b"\xc3" and found["a.b"] == b"a.b"
    tiny = token_bytes(tiny_tokenizer())
    assert sorted(tiny[2:]) == [bytes([i]) for i in range(256)]
    assert tiny[0] == b"<bos>"


def _first_end(stops: StopStrings, ids: torch.Tensor) -> int | None:
    for n in range(1, len(ids) + 1):
        ends = stops.ends(ids[:n])
        assert not ends or bool(stops.may_end(ids[n - 1 : n])), "the look-up must not miss an end"
        if ends:
            return n
    return None


STOPS = [(".",), ("ab",), ("aab", "b\n"), ("\n\n",), ("é",), (" the",), (". a", "a.b."), ("the the",), ("..",)]


@pytest.mark.parametrize("stops", STOPS, ids=repr)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_the_end_is_that_of_hugging_face(kind: str, stops: tuple[str, ...]) -> None:
    tokenizer = tiny_tokenizer() if kind == "byte_level" else sentencepiece_like()
    mine, theirs = StopStrings(tokenizer, stops, len(tokenizer)), StopStringCriteria(tokenizer, list(stops))
    pool = list(range(3, len(tokenizer)))
    if kind == "byte_level":
        pool = tokenizer("aaabb.. \n\nthe é", add_special_tokens=False)["input_ids"]
    generator, n_ended = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        ids = torch.tensor(pool)[torch.randint(len(pool), (40,), generator=generator)]
        if torch.rand((), generator=generator) < 0.3:
            own = tokenizer(stops[0], add_special_tokens=False)["input_ids"]
            ids[20 : 20 + len(own)] = torch.tensor(own)
        want = next((n for n in range(1, 41) if bool(theirs(ids[None, :n], None)[0])), None)
        assert _first_end(mine, ids) == want
        n_ended += want is not None
    assert n_ended > 5


def test_almost_every_token_is_settled_by_the_look_up() -> None:
    may_end = StopStrings(tiny_tokenizer(), ("ab", "\n\n"), 300)
    marked = may_end.may_end(torch.arange(300)).nonzero().flatten()
    assert sorted(token_bytes(tiny_tokenizer())[int(i)] for i in marked) == [b"\n", b"b"]


PROMPTS = ["Findings show that", "I once heard that", "The weather was", "Then the man said:"]


@pytest.mark.slow
@pytest.mark.embedded
def test_sentences_of_the_embedded_model_end_where_hugging_face_ends_them(embedded: Model) -> None:
    batch = embedded.tokens(PROMPTS)
    stops = [".", "\n\n", " the"]
    mine = embedded.generate(batch, 20, temperature=0.0, stop=stops)
    for i, prompt in enumerate(PROMPTS):
        one = embedded.tokens(prompt)
        theirs = embedded.hf.generate(
            **one.hf(), max_new_tokens=20, do_sample=False, stop_strings=stops, tokenizer=embedded.tokenizer
        )[0, one.ids.shape[1] :]
        kept = theirs[: len(theirs) - (mine.ended[i] == "stop_token")]
        assert mine.ids[i].tolist() == kept.tolist()
    assert "stop_string" in mine.ended
