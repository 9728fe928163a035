from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.glitch.tiny_copy import VOCABULARY as COPY_VOCABULARY
from tests.glitch.tiny_copy import wordy_model
from tests.glitch.tiny_vocab import WORDS, byte_level
from tests.tiny import FP32_LOGITS, tiny_model
from workbench.core.codec import FastCodec
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.stats import clopper_pearson
from workbench.core.tokens import TokenBatch
from workbench.engine.log import Log
from workbench.glitch.scanning.scanner import ScanOptions, scan
from workbench.glitch.verification.prompts import PROMPTS, Template, TokenPrompt, prompt_set, prompts_from, template
from workbench.glitch.verification.scoring import VerifyOptions, greedy_logits, score, target_probabilities
from workbench.glitch.verification.verify import journal_key, verdict, verify, with_spliced
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.hooks.sites import Site
from workbench.interventions.bytoken import ReplaceTokens
from workbench.interventions.intervention import Edit, Intervention
from workbench.interventions.scopes import TokenIs
from workbench.models.model import Model

TOKENIZER = byte_level()
CODEC = FastCodec.of(TOKENIZER)
VOCABULARY = analyse(CODEC)
N = len(VOCABULARY)
AT = TOKENIZER.token_to_id


def _encode(text: str) -> list[int]:
    return CODEC.encode([text])[0]


QUICK = VerifyOptions(stop_at=0.01)
TEMPLATES = tuple(template(prompt, VOCABULARY, _encode) for prompt in PROMPTS)


class Parrot(Model):
    """Says the token of the first slot with a probability given per token; `late` ones only at the second step."""

    dtype, fingerprint = torch.float32, "parrot"

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
        assert len(made.slots) == made.prompt.occurrences >= 1


def test_filling_changes_the_slots_only_and_equals_the_text_of_a_word() -> None:
    words = torch.tensor([AT("ember"), AT("harbor")])
    for made in TEMPLATES:
        rows = made.fill(words)
        assert rows.shape == (2, len(made.ids))
        rest = np.setdiff1d(np.arange(len(made.ids)), made.slots.numpy())
        assert torch.equal(rows[0, rest], made.ids[rest]) and torch.equal(rows[:, made.slots[0]], words)
        if made.prompt.name != "row":
            assert rows[0].tolist() == _encode(made.prompt.text("ember"))


def test_a_probe_in_which_no_token_stays_whole_is_refused() -> None:
    glued = TokenPrompt("glued", "", "{token}", "{token}", shots=1)
    with pytest.raises(DegenerateInputError, match="glued"):
        template(glued, VOCABULARY, lambda text: [0, 1])
    with pytest.raises(InvalidInputError, match="token"):
        TokenPrompt("no slot", "", "x", "{token}")


def test_probes_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"name": "a", "preamble": "", "shown": "say {token}:", "answer": " {token}"}]))
    assert prompts_from(file) == (TokenPrompt("a", "", "say {token}:", " {token}"),)
    file.write_text("[]")
    with pytest.raises(InvalidInputError, match="no prompts"):
        prompts_from(file)


def test_verdicts_follow_the_highest_probability() -> None:
    ids = [AT(word) for word in WORDS[:5]]
    says = dict(zip(ids, (1e-5, 0.004, 0.05, 0.5, 0.95), strict=True))
    result = verify(Parrot(says), CODEC, TEMPLATES, ids, [], QUICK)
    assert [t.verdict for t in result.tested] == [
        "strong_verified", "weak_verified", "borderline", "weak_rejected", "strong_rejected",
    ]  # fmt: skip
    assert [t.max_prob for t in result.tested] == pytest.approx(list(says.values()), rel=1e-4)
    assert [t.passes for t in result.tested] == [9, 9, 1, 1, 1]
    assert result.passes == 21 and result.control_failures is None


def test_a_token_that_comes_at_a_later_step_is_not_verified() -> None:
    late = AT("ember")
    parrot = Parrot({late: 0.8}, late=frozenset([late]))
    (tested,) = verify(parrot, CODEC, TEMPLATES, [late], [], QUICK).tested
    assert tested.max_prob == pytest.approx(0.8, rel=1e-4) and tested.passes == 2
    cheapest = min(TEMPLATES, key=lambda made: len(made.ids) - made.shared)
    assert [(s.prompt, s.step) for s in tested.scores] == [(cheapest.prompt.name, 1)], (
        "the prompt of the fewest own ids"
    )
    (first_only,) = verify(parrot, CODEC, TEMPLATES, [late], [], VerifyOptions(steps=1)).tested
    assert first_only.verified


def test_exact_mode_runs_everything_and_agrees_on_who_is_verified() -> None:
    ids = [AT(word) for word in WORDS]
    says = {i: 0.001 * 3**k for k, i in enumerate(ids[:7])}
    quick = verify(Parrot(says), CODEC, TEMPLATES, ids, [], QUICK)
    exact = verify(Parrot(says), CODEC, TEMPLATES, ids, [])
    assert [t.verified for t in quick.tested] == [t.verified for t in exact.tested]
    assert {t.passes for t in exact.tested} == {9} and exact.passes == 9 * len(ids) > quick.passes


def test_controls_give_the_error_rate() -> None:
    ids = [AT(word) for word in WORDS]
    result = verify(Parrot({ids[0]: 1e-4, ids[9]: 1e-4}), CODEC, TEMPLATES, ids[:4], ids[4:])
    assert len(result.candidates) == 4 and len(result.controls) == 7
    assert result.control_failures is not None and result.expected_false is not None
    assert (result.control_failures.value, result.control_failures.n) == (1 / 7, 7)
    assert result.control_failures.high == pytest.approx(0.5787, abs=1e-3)
    false = result.expected_false
    assert (false.value, false.n) == (pytest.approx(4 / 7), 7)
    assert (false.low, false.high) == pytest.approx((4 * 0.0036, 4 * 0.5787), abs=4e-3)


def test_each_token_is_placed_among_the_controls() -> None:
    ids = [AT(word) for word in WORDS]
    says = dict(zip(ids, (0.001, 0.3, 0.2, 0.25, 0.4, 0.5), strict=False))
    result = verify(Parrot(says), CODEC, TEMPLATES, ids[:2], ids[2:6])
    assert [t.p_value for t in result.candidates] == [1 / 5, 3 / 5]  # none below; 0.2 and 0.25 below, and one more
    assert result.control_quantiles["50%"] == pytest.approx((0.25 + 0.4) / 2, rel=1e-4)
    assert all(t.p_value is None for t in result.controls)
    quick = verify(Parrot(says), CODEC, TEMPLATES, ids[:2], ids[2:6], QUICK)
    assert all(t.p_value is None for t in quick.tested) and quick.control_quantiles == {}


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


def _made(ids: list[int], slots: list[int], name: str = "p") -> Template:
    return Template(TokenPrompt(name, "", "{token}", "{token}"), torch.tensor(ids), torch.tensor(slots))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "gpt_oss"])
def test_batches_and_shared_prefixes_do_not_change_the_probabilities(family: str) -> None:
    model = tiny_model(family)
    made = _made([3, 8, 4, 7, 9, 7, 9], [3, 5])
    assert made.shared == 3
    tokens = torch.arange(11)
    one = score(model, [made], tokens, VerifyOptions(batch_size=1, share_prefix=False))
    for options in (VerifyOptions(batch_size=4), VerifyOptions(batch_size=4, share_prefix=False)):
        many = score(model, [made], tokens, options)
        assert np.allclose(one.p, many.p, rtol=0, atol=1e-5) and many.ran.all()
    assert not np.allclose(one.p[:, 0, 0], one.p[:, 0, 1], atol=1e-5)


def test_a_shared_prefix_goes_through_the_model_once() -> None:
    model, fed = tiny_model("llama"), []
    handle = model.hf.register_forward_pre_hook(
        lambda _, __, kw: fed.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    score(model, [_made([3, 8, 4, 7, 9], [3])], torch.arange(4), VerifyOptions(steps=2))
    handle.remove()
    assert fed == [(1, 3), (4, 2), (4, 1)]


def test_an_intervention_is_part_of_what_is_tested() -> None:
    model = tiny_model("llama")
    made, tokens = _made([3, 8, 7, 9], [2]), torch.tensor([5, 6])
    row = model.hf.get_input_embeddings().weight[20:21].detach().clone()
    edit = Edit(Site("embed"), ReplaceTokens(torch.tensor([5]), row), TokenIs(5))
    plain = score(model, [made], tokens, VerifyOptions())
    with model.plan(Intervention((edit,))):
        edited = score(model, [made], tokens, VerifyOptions())
        alone = score(model, [made], tokens[:1], VerifyOptions(batch_size=1, share_prefix=False))
    assert np.allclose(edited.p[1], plain.p[1], atol=1e-6) and not np.allclose(edited.p[0], plain.p[0], atol=1e-6)
    assert np.allclose(edited.p[0], alone.p[0], atol=1e-6)


def test_permuting_ids_permutes_the_probabilities() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    order = torch.randperm(model.d_vocab, generator=torch.Generator().manual_seed(1))  # new id of each old one
    with torch.no_grad():
        for side in ("get_input_embeddings", "get_output_embeddings"):
            getattr(other.hf, side)().weight[order] = getattr(model.hf, side)().weight.clone()
    made, tokens = _made([3, 8, 4, 7, 9], [3]), torch.arange(20)
    moved = Template(made.prompt, order[made.ids], made.slots)
    expected = score(model, [made], tokens, VerifyOptions())
    found = score(other, [moved], order[tokens], VerifyOptions())
    assert np.allclose(found.p, expected.p, rtol=0, atol=1e-6)
    assert not np.allclose(score(other, [moved], tokens, VerifyOptions()).p, expected.p, rtol=0, atol=1e-6)


def test_probabilities_are_exact_beyond_one_block_of_the_vocabulary() -> None:
    logits = torch.randn(3, 40_000, generator=torch.Generator().manual_seed(0)) * 4
    targets = torch.tensor([0, 20_000, 39_999])
    expected = logits.double().softmax(1)[torch.arange(3), targets]
    assert torch.allclose(target_probabilities(logits, targets).double(), expected, rtol=1e-5)
    assert target_probabilities(logits + 1e4, targets).isfinite().all()


def test_an_interrupted_test_goes_on_where_it_was(tmp_path: Path) -> None:
    ids = [AT(word) for word in WORDS]
    says = {i: 0.001 * 3**k for k, i in enumerate(ids[:7])}
    for options in (VerifyOptions(batch_size=3), VerifyOptions(batch_size=3, stop_at=0.01)):
        key = journal_key(Parrot(says), TEMPLATES, options)
        file = tmp_path / f"{options.stop_at}.jsonl"

        class Tiring(Parrot):
            def logits(self, batch: TokenBatch, keep: str = "all") -> Tensor:
                if self.rows > 20:
                    raise KeyboardInterrupt
                return super().logits(batch, keep)

        with pytest.raises(KeyboardInterrupt):
            verify(Tiring(says), CODEC, TEMPLATES, ids, [], options, Log(file, key))
        whole, rest = Parrot(says), Parrot(says)
        expected = verify(whole, CODEC, TEMPLATES, ids, [], options)
        assert verify(rest, CODEC, TEMPLATES, ids, [], options, Log(file, key)) == expected
        assert 0 < rest.rows < whole.rows - 5
        again = Parrot(says)
        assert verify(again, CODEC, TEMPLATES, ids, [], options, Log(file, key)) == expected and again.rows == 0


def test_a_model_that_gives_no_number_gives_no_verdict() -> None:
    broken, fine = AT("ember"), AT("harbor")

    class Broken(Parrot):
        def logits(self, batch: TokenBatch, keep: str = "all") -> Tensor:
            found = super().logits(batch, keep)
            found[(batch.ids == broken).any(1)] = float("nan")
            return found

    result = verify(Broken({}), CODEC, TEMPLATES, [broken, fine], [])
    assert [t.verdict for t in result.tested] == ["not_finite", "weak_rejected"]
    assert not result.tested[0].verified and np.isnan(result.tested[0].max_prob)
    other, silent = AT("harbor"), AT("delta")
    beside = verify(Broken({silent: 1e-5}), CODEC, TEMPLATES, [fine], [broken, other, silent])
    assert beside.counted_controls == beside.controls[1:]
    assert beside.control_failures == clopper_pearson(1, 2, unit="control tokens")
    assert beside.failures_by_form == {"raw": beside.control_failures}
    assert beside.candidates[0].p_value == 3 / 3
    with pytest.raises(DegenerateInputError, match="output matrix"):
        verify(Broken({}), CODEC, TEMPLATES, [broken], [broken])


def test_a_token_is_cleared_by_the_form_in_which_the_model_says_it() -> None:
    raw, chat = _made([3, 7, 9], [1], "copy"), replace(_made([4, 7, 9, 9], [1], "copy"), form="chat")
    silent, chatty, plain = (AT(word) for word in WORDS[:3])

    class Formal(Model):
        dtype, fingerprint = torch.float32, "formal"

        def __init__(self) -> None: ...

        def logits(self, batch: TokenBatch, keep: str = "all") -> Tensor:
            says = {(3, plain): 0.5, (4, plain): 1e-4, (4, chatty): 0.2}
            p = torch.full((len(batch), N), 1e-9)
            for row, ids in enumerate(batch.ids.tolist()):
                p[row, ids[1]] = says.get((ids[0], ids[1]), 1e-5)
                p[row, AT("z")] = 1 - p[row, ids[1]]
            return p.log()

    for options in (VerifyOptions(steps=1), VerifyOptions(steps=1, stop_at=0.01)):
        done = verify(Formal(), CODEC, (raw, chat), [silent, chatty, plain], [silent, chatty], options)
        assert [(t.verdict, t.form) for t in done.candidates] == [
            ("strong_verified", "raw"), ("weak_rejected", "chat"), ("weak_rejected", "raw"),
        ]  # fmt: skip
        assert [t.cleared_by_chat for t in done.candidates] == [False, True, False]
        assert done.forms == ("raw", "chat") and done.control_failures is not None
        assert done.control_failures.value == 1 / 2
    exact = verify(Formal(), CODEC, (raw, chat), [plain], [silent, chatty, plain], VerifyOptions(steps=1))
    assert {form: rate.value for form, rate in exact.failures_by_form.items()} == {"raw": 2 / 3, "chat": 2 / 3}
    assert exact.candidates[0].best_in("chat") == pytest.approx(1e-4, rel=1e-3)


def test_spliced_tokens_are_tested_but_in_no_count() -> None:
    half, other = AT("Ã"), AT("ember")
    done = verify(Parrot({half: 1e-5}), CODEC, TEMPLATES, [other], [AT("harbor")])
    more = with_spliced(done, Parrot({half: 1e-5}), TEMPLATES, [half])
    assert more.candidates == done.candidates and more.controls == done.controls
    assert more.expected_false == done.expected_false
    (tested,) = more.spliced
    assert tested.verdict == "strong_verified" and not tested.encodable and tested.p_value == 1 / 2


def test_later_steps_follow_the_greedy_continuation() -> None:
    model = tiny_model("gpt2")
    made = Template(TokenPrompt("p", "", "{token}", "{token}"), torch.tensor([3, 7, 9]), torch.tensor([1]))
    tokens = torch.tensor([5, 20, 100])
    scores = score(model, [made], tokens, VerifyOptions(stop_at=None))
    assert scores.passes.tolist() == [3, 3, 3]
    for k, token in enumerate(tokens.tolist()):
        ids, seen = torch.tensor([[3, token, 9]]), []
        for _ in range(3):
            p = model.hf(input_ids=ids).logits[0, -1].softmax(-1)
            seen.append(float(p[token]))
            ids = torch.cat([ids, p.argmax()[None, None]], 1)
        assert scores.best[k] == pytest.approx(max(seen), abs=1e-6)


def test_prompts_longer_than_the_positions_of_a_model_are_left_out_or_refused() -> None:
    model = wordy_model("gpt2")
    room = model.n_positions
    assert room is not None
    with pytest.raises(InvalidInputError, match=f"{room} positions"):
        next(greedy_logits(model, torch.zeros(1, room - 1, dtype=torch.long), 3))
    assert next(greedy_logits(model, torch.zeros(1, room - 2, dtype=torch.long), 3)).shape[0] == 1
    made = prompt_set(model, COPY_VOCABULARY, PROMPTS, "raw")
    assert [t.prompt.name for t in made.templates] == ["row"] and len(made.notes) == 2
    assert all(f"the model has {room}" in note for note in made.notes)
    fitting = room - len(made.templates[0].ids) + 1
    assert prompt_set(model, COPY_VOCABULARY, PROMPTS[1:2], "raw", steps=fitting).templates
    with pytest.raises(DegenerateInputError, match="positions"):
        prompt_set(model, COPY_VOCABULARY, PROMPTS[1:2], "raw", steps=fitting + 1)
    with pytest.raises(DegenerateInputError, match="positions"):
        prompt_set(model, COPY_VOCABULARY, PROMPTS, "raw", strict=True)
    report = scan(model, "top", options=ScanOptions(top=4, controls=4, sides=False))
    assert report.verification is not None and any("'copy' was left out" in said for said in report.findings())
