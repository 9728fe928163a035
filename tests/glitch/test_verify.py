from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.glitch.tiny_vocab import WORDS, byte_level
from tests.tiny import FP32_LOGITS, tiny_model
from workbench.codec import FastCodec
from workbench.errors import DegenerateInputError, InvalidInputError
from workbench.glitch.prompts import PROBES, Probe, Template, probes_from, template
from workbench.glitch.tokenizer import analyse
from workbench.glitch.verify import VerifyOptions, greedy_logits, max_probabilities, verdict, verify
from workbench.tokens import TokenBatch

TOKENIZER = byte_level()
CODEC = FastCodec.of(TOKENIZER)
VOCABULARY = analyse(CODEC)
N = len(VOCABULARY)
AT = TOKENIZER.token_to_id


def _encode(text: str) -> list[int]:
    return CODEC.encode([text])[0]


TEMPLATES = tuple(template(probe, VOCABULARY, _encode) for probe in PROBES)


class Parrot:
    """Says the token of the first slot with a probability given per token; `late` ones only at the second step."""

    dtype = torch.float32

    def __init__(self, says: dict[int, float], late: frozenset[int] = frozenset()) -> None:
        self.says, self.late, self.rows = says, late, 0
        self.lengths = {len(t.ids): t for t in TEMPLATES}

    def logits(self, batch: TokenBatch, keep: str = "all") -> Tensor:
        assert keep == "last"
        self.rows += len(batch)
        steps = next(k for k in range(3) if batch.ids.shape[1] - k in self.lengths)
        asked = batch.ids[:, self.lengths[batch.ids.shape[1] - steps].slots[0]]
        p = torch.full((len(batch), N), 1e-9)
        p[:, AT("z")] = 1.0
        for row, i in enumerate(asked.tolist()):
            value = 1e-6 if i in self.late and steps == 0 else self.says.get(i, 0.5)
            p[row, i], p[row, AT("z")] = value, 1 - value
        return p.log()


def test_probes_are_distinct_in_length_and_hold_the_token_as_often_as_they_say() -> None:
    assert len({len(t.ids) for t in TEMPLATES}) == len(TEMPLATES)
    for made in TEMPLATES:
        assert len(made.slots) == made.probe.occurrences >= 1


def test_filling_changes_the_slots_only_and_equals_the_text_of_a_word() -> None:
    words = torch.tensor([AT("ember"), AT("harbor")])
    for made in TEMPLATES:
        rows = made.fill(words)
        assert rows.shape == (2, len(made.ids))
        rest = np.setdiff1d(np.arange(len(made.ids)), made.slots.numpy())
        assert torch.equal(rows[0, rest], made.ids[rest]) and torch.equal(rows[:, made.slots[0]], words)
        if made.probe.name != "row":
            assert rows[0].tolist() == _encode(made.probe.text("ember"))


def test_a_probe_in_which_no_token_stays_whole_is_refused() -> None:
    glued = Probe("glued", "", "{token}", "{token}", shots=1)
    with pytest.raises(DegenerateInputError, match="glued"):
        template(glued, VOCABULARY, lambda text: [0, 1])
    with pytest.raises(InvalidInputError, match="token"):
        Probe("no slot", "", "x", "{token}")


def test_probes_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "probes.json"
    file.write_text(json.dumps([{"name": "a", "preamble": "", "shown": "say {token}:", "answer": " {token}"}]))
    assert probes_from(file) == (Probe("a", "", "say {token}:", " {token}"),)
    file.write_text("[]")
    with pytest.raises(InvalidInputError, match="no prompts"):
        probes_from(file)


def test_verdicts_follow_the_highest_probability() -> None:
    ids = [AT(word) for word in WORDS[:5]]
    says = dict(zip(ids, (1e-5, 0.004, 0.05, 0.5, 0.95), strict=True))
    result = verify(Parrot(says), CODEC, TEMPLATES, ids, [])
    assert [t.verdict for t in result.tested] == [
        "strong_verified", "weak_verified", "borderline", "weak_rejected", "strong_rejected",
    ]  # fmt: skip
    assert [t.max_prob for t in result.tested] == pytest.approx(list(says.values()), rel=1e-4)
    assert [t.passes for t in result.tested] == [9, 9, 1, 1, 1]
    assert result.passes == 21 and result.control_failures is None


def test_a_token_that_comes_at_a_later_step_is_not_verified() -> None:
    late = AT("ember")
    parrot = Parrot({late: 0.8}, late=frozenset([late]))
    (tested,) = verify(parrot, CODEC, TEMPLATES, [late], []).tested
    assert tested.max_prob == pytest.approx(0.8, rel=1e-4) and tested.passes == 2
    (first_only,) = verify(parrot, CODEC, TEMPLATES, [late], [], VerifyOptions(steps=1)).tested
    assert first_only.verified


def test_exact_mode_runs_everything_and_agrees_on_who_is_verified() -> None:
    ids = [AT(word) for word in WORDS]
    says = {i: 0.001 * 3**k for k, i in enumerate(ids[:7])}
    quick = verify(Parrot(says), CODEC, TEMPLATES, ids, [])
    exact = verify(Parrot(says), CODEC, TEMPLATES, ids, [], VerifyOptions(stop_at=None))
    assert [t.verified for t in quick.tested] == [t.verified for t in exact.tested]
    assert {t.passes for t in exact.tested} == {9} and exact.passes == 9 * len(ids) > quick.passes


def test_controls_give_the_error_rate() -> None:
    ids = [AT(word) for word in WORDS]
    result = verify(Parrot({ids[0]: 1e-4, ids[9]: 1e-4}), CODEC, TEMPLATES, ids[:4], ids[4:])
    assert len(result.candidates) == 4 and len(result.controls) == 7
    assert result.control_failures is not None and result.expected_false is not None
    assert (result.control_failures.value, result.control_failures.n) == (1 / 7, 7)
    assert result.control_failures.high == pytest.approx(0.5787, abs=1e-3)
    assert result.expected_false == pytest.approx((4 / 7, 4 * result.control_failures.high))


def test_tokens_that_no_text_gives_are_told_apart() -> None:
    half = AT("Ã")
    (tested,) = verify(Parrot({half: 1e-5}), CODEC, TEMPLATES, [half], []).tested
    assert not tested.encodable and tested.verdict == "not_encodable"
    assert verdict(0.5, encodable=False) == "weak_rejected"


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_cached_steps_equal_whole_passes(family: str) -> None:
    model = tiny_model(family)
    rows = torch.randint(0, model.d_vocab, (5, 9), generator=torch.Generator().manual_seed(0))
    cached = list(greedy_logits(model, rows, 3))
    whole = list(greedy_logits(model, rows, 3, cached=False))
    assert len(cached) == 3
    for a, b in zip(cached, whole, strict=True):
        assert torch.allclose(a, b, atol=FP32_LOGITS)
    assert not torch.allclose(cached[0], cached[1], atol=FP32_LOGITS)


def test_batches_do_not_change_the_probabilities() -> None:
    model = tiny_model("llama")
    made = Template(Probe("p", "", "{token}", "{token}"), torch.tensor([3, 7, 9]), torch.tensor([1]))
    tokens = torch.arange(11)
    one = max_probabilities(model, [made], tokens, VerifyOptions(stop_at=None, batch_size=1))
    many = max_probabilities(model, [made], tokens, VerifyOptions(stop_at=None, batch_size=4))
    assert np.allclose(one[0], many[0], atol=1e-5) and np.array_equal(one[2], many[2])


def test_later_steps_follow_the_greedy_continuation() -> None:
    model = tiny_model("gpt2")
    made = Template(Probe("p", "", "{token}", "{token}"), torch.tensor([3, 7, 9]), torch.tensor([1]))
    tokens = torch.tensor([5, 20, 100])
    best, _, passes = max_probabilities(model, [made], tokens, VerifyOptions(stop_at=None))
    assert passes.tolist() == [3, 3, 3]
    for k, token in enumerate(tokens.tolist()):
        ids, seen = torch.tensor([[3, token, 9]]), []
        for _ in range(3):
            p = model.hf(input_ids=ids).logits[0, -1].softmax(-1)
            seen.append(float(p[token]))
            ids = torch.cat([ids, p.argmax()[None, None]], 1)
        assert best[k] == pytest.approx(max(seen), abs=1e-6)
