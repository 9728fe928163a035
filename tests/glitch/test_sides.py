from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.glitch.tiny_vocab import WORDS, byte_level
from workbench.core.codec import codec_of, token_bytes
from workbench.core.tokens import TokenBatch
from workbench.glitch.verification.sides import measure_sides, which
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.model import Model
from workbench.models.tiny import tiny_hf

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=byte_level())
CODEC = codec_of(TOKENIZER)
VOCABULARY = analyse(CODEC)
AT = byte_level().token_to_id
TEXTS = token_bytes(TOKENIZER)
SPELLED = [i for i, t in enumerate(TEXTS) if len(t) > 1 and VOCABULARY.category[i] == "ok" and t.isalpha()]
LONG = [AT(word) for word in WORDS[:6]]
CONTROLS = [i for i in SPELLED if i not in LONG][:40]


class Reader(Model):
    """What follows depends on the text alone, however it is cut, and the last text in « » is the most probable."""

    def __init__(self, unread: set[int] = frozenset(), unwritten: set[int] = frozenset(), deaf: bool = False) -> None:  # type: ignore[assignment]  # empty
        self.tokenizer, self.unread, self.unwritten, self.deaf = TOKENIZER, unread, unwritten, deaf

    def tokens(self, text: str) -> TokenBatch:
        return TokenBatch.of_rows(torch.tensor(CODEC.encode([text])))

    def logits(self, batch: TokenBatch, keep: str = "all") -> Tensor:
        assert keep == "last"
        return torch.stack([self._after(row.tolist()) for row in batch.rows()])

    def _after(self, ids: list[int]) -> Tensor:
        text = b"".join(b"?" if i in self.unread else TEXTS[i] for i in ids)
        seed = 0 if self.deaf else zlib.crc32(text)
        logits = torch.randn(len(TEXTS), generator=torch.Generator().manual_seed(seed))
        shown = text.split("«".encode())[-2].split("»".encode())[0] if text.count("«".encode()) > 1 else b""
        if shown in TEXTS and not self.deaf:
            logits[TEXTS.index(shown)] = logits.logsumexp(0) + len(shown)  # longer texts are surer
        logits[list(self.unwritten)] = -20.0
        return logits


def test_a_broken_side_is_told_from_the_other_and_from_both() -> None:
    reader = Reader(unread={LONG[0], LONG[1], LONG[4]}, unwritten={LONG[2], LONG[3], LONG[4]})
    sides = measure_sides(reader, CODEC, VOCABULARY, LONG, CONTROLS, batch_size=7)
    assert [side.broken for side in sides.candidates] == ["input", "input", "output", "output", "both", "neither"]
    assert [side.token_id for side in sides.tested] == [*LONG, *CONTROLS]
    assert sides.read_auc == sides.write_auc == 1.0 and sides.n_controls == len(CONTROLS)
    assert sides.candidates[5].read_kl == 0 and sides.candidates[5].read_agreement == 1
    assert sides.failing["read"].value <= 0.1 and sides.failing["write"].value <= 0.1
    assert (sides.count("input"), sides.count("both")) == (2, 1)


def test_pieces_write_the_same_text_without_the_token_and_without_suspects() -> None:
    suspect = AT("embe")
    sides = measure_sides(Reader(), CODEC, VOCABULARY, [AT("ember")], CONTROLS, suspects=[suspect])
    (ember,) = sides.candidates
    assert b"".join(TEXTS[i] for i in ember.pieces) == b"ember"
    assert AT("ember") not in ember.pieces and suspect not in ember.pieces
    for side in sides.tested:
        assert not side.pieces or b"".join(TEXTS[i] for i in side.pieces) == TEXTS[side.token_id]


def test_a_token_that_nothing_else_spells_gets_no_verdict() -> None:
    sides = measure_sides(Reader(), CODEC, VOCABULARY, [AT("z"), AT("ember")], CONTROLS)
    lone, ember = sides.candidates
    assert lone.broken == "unknown" and lone.pieces == () and np.isnan(lone.read_kl) and ember.broken == "neither"


def test_a_measure_that_does_not_work_on_the_model_gives_no_verdict() -> None:
    sides = measure_sides(Reader(deaf=True), CODEC, VOCABULARY, LONG, CONTROLS)
    assert sides.read_auc == pytest.approx(0.5) and {side.broken for side in sides.candidates} == {"unknown"}
    few = measure_sides(Reader(), CODEC, VOCABULARY, LONG, CONTROLS[:5])
    assert {side.broken for side in few.candidates} == {"unknown"} and few.n_controls == 5
    none = measure_sides(Reader(), CODEC, VOCABULARY, LONG, [])
    assert {side.broken for side in none.candidates} == {"unknown"} and none.failing == {}


def test_batches_do_not_change_the_measures() -> None:
    model = Model(tiny_hf("llama", len(TEXTS), 0), TOKENIZER, name="tiny")
    one, many = (measure_sides(model, CODEC, VOCABULARY, LONG, LONG, batch_size=size) for size in (1, 5))
    for a, b in zip(one.tested, many.tested, strict=True):
        assert a.pieces == b.pieces
        assert np.allclose([a.read_kl, a.write_logp], [b.read_kl, b.write_logp], rtol=0, atol=1e-5)


def test_the_broken_side_follows_from_both_limits() -> None:
    assert which(0.0, 0.0) == "neither" and which(0.5, float("nan")) == "unknown"
