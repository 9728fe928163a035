from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.glitch import planted as plan
from tests.glitch.planted import planted, truth
from tests.glitch.tiny_copy import AT, VOCABULARY, N, wordy_model
from tests.glitch.tiny_vocab import WORDS
from workbench.core.codec import FastCodec
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.tokens import TokenBatch
from workbench.glitch import ScanOptions, VerifyOptions, scan
from workbench.glitch.scanning import scanner
from workbench.glitch.verification import scoring
from workbench.glitch.verification.contexts import LINE, Contexts, InContext, in_contexts, make_lines
from workbench.glitch.verification.prompts import TokenPrompt, template
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.model import Model

ODD, COMMON, *PLAIN = (AT(space + word) for space in ("", "Ġ") for word in WORDS)


class Typist(Model):
    """Copies the third word of the last line with the probability that `says` names for it, else 0.6."""

    dtype, fingerprint, tokenizer = torch.float32, "typist", None

    def __init__(self, says: dict[int, float]) -> None:
        self.says, self.rows = says, []

    def tokens(self, text: str) -> TokenBatch:
        return TokenBatch.of_rows(torch.tensor([self._codec().encode([text])[0]]))

    def _codec(self) -> FastCodec:
        return FastCodec.of(wordy_model().tokenizer.backend_tokenizer)

    def logits(self, batch: TokenBatch, keep: str = "all") -> Tensor:
        p = torch.full((len(batch), N), 1e-9)
        slots = template(LINE, VOCABULARY, lambda text: self._codec().encode([text])[0]).slots
        for row, ids in enumerate(batch.ids.tolist()):
            words = [ids[k] for k in slots]
            assert words[:2] == words[5:], "the copy repeats the first two words"
            self.rows.append(tuple(words[:5]))
            p[row, words[2]], p[row, 0] = self.says.get(words[2], 0.6), 1 - self.says.get(words[2], 0.6)
        return p.log()


def _asked(model: Any, n: int = 6, seed: int = 0, **options: Any) -> Contexts:
    lines = make_lines(model, VOCABULARY, PLAIN[5:], n, seed)
    return in_contexts(model, lines, [ODD, COMMON], PLAIN[:5], VerifyOptions(**options))


def test_a_token_that_is_lost_among_words_is_told_from_others() -> None:
    model = Typist({ODD: 0.004, PLAIN[0]: 0.002})
    found = _asked(model)
    odd, common = found.candidates
    assert (odd.token_id, odd.failed) == (ODD, True) and odd.median == pytest.approx(0.004, rel=1e-4)
    assert not common.failed and common.median == pytest.approx(0.6, rel=1e-4)
    assert found.control_failures is not None and found.control_failures.value == 0.2 and found.control_failures.n == 5
    lines = {(*row[:2], *row[3:]) for row in model.rows}
    assert lines == set(found.lines) and len(lines) == 6, "all tokens get the same lines"
    assert not {i for line in lines for i in line} & {ODD, COMMON, *PLAIN[:5]}, "no tested token stands beside another"
    other = Typist({})
    _asked(other, seed=1)
    assert {(*row[:2], *row[3:]) for row in other.rows} != lines


def test_batches_and_the_shared_beginning_change_nothing() -> None:
    model = wordy_model()
    one, many = (_asked(model, 3, batch_size=size) for size in (1, 32))
    assert np.allclose([c.p for c in one.tested], [c.p for c in many.tested], atol=1e-6)
    made = template(LINE, VOCABULARY, lambda text: model.tokens(text).ids[0].tolist())
    row = made.fill(torch.tensor([ODD]))
    a, b, c, d = many.lines[0]
    row[0, made.slots] = torch.tensor([a, b, ODD, c, d, a, b])
    p = model.logits(TokenBatch.of_rows(row), keep="last").softmax(1)[0, ODD]
    assert many.tested[0].p[0] == pytest.approx(float(p), abs=1e-6)


def test_a_model_that_gives_no_number_fails_nothing() -> None:
    found = _asked(Typist({ODD: float("nan"), PLAIN[1]: float("nan")}))
    assert not found.candidates[0].failed and np.isnan(found.candidates[0].median)
    assert found.control_failures is not None and found.control_failures.n == 4


def test_the_median_over_lines_decides_and_lines_without_a_number_are_left_out() -> None:
    nan = float("nan")
    assert InContext(1, False, (0.001, 0.002, 0.9)).failed and not InContext(1, False, (0.001, 0.02, 0.9)).failed
    part = InContext(1, False, (nan, 0.1, 0.3, nan))
    assert part.median == pytest.approx(0.2) and part.span == (0.1, 0.3)
    assert InContext(1, False, (nan,)).span == (None, None)


def test_a_token_that_is_impossible_is_in_the_findings() -> None:
    report = scan(wordy_model("neox"), "top", options=ScanOptions(top=4, controls=6, contexts=2, sides=False))
    assert report.contexts is not None and report.verification is not None
    first, *rest = report.contexts.tested
    said = next(t for t in report.verification.tested if t.token_id == first.token_id)
    tested = tuple(
        replace(t, max_prob=0.5, verdict="weak_rejected") if t is said else t for t in report.verification.tested
    )
    zero = replace(report.contexts, tested=(replace(first, p=(0.0, 0.0)), *rest))
    changed = replace(report, contexts=zero, verification=replace(report.verification, tested=tested))
    assert any(line.startswith("Said alone, not among other tokens: 1 token:") for line in changed.findings())


def test_too_few_words_are_refused() -> None:
    with pytest.raises(DegenerateInputError, match="ordinary tokens of at least three letters"):
        make_lines(Typist({}), VOCABULARY, PLAIN[:7], 2)
    with pytest.raises(InvalidInputError, match="contexts=-1"):
        ScanOptions(contexts=-1)


def test_trained_tokens_are_copied_among_others_and_planted_ones_are_not() -> None:
    made, known = planted(tied=True, decay=0.1), truth()
    vocabulary = analyse(FastCodec.of(plan.tokenizer()))
    controls = np.random.default_rng(0).choice(known.trained, 24, replace=False).tolist()
    lines = make_lines(made.model, vocabulary, sorted(set(known.trained) - set(controls)), 5)
    found = in_contexts(made.model, lines, known.never, controls)
    assert all(c.failed for c in found.candidates)
    never, other = ([c.median for c in found.tested if c.control == control] for control in (False, True))
    assert max(never) < np.median(other), "copying from five words is hard for two layers, but not as hard"


def test_the_scan_says_it_beside_the_verdict_alone() -> None:
    model: Model = wordy_model("neox")
    report = scan(model, "top", options=ScanOptions(top=4, controls=6, contexts=2, sides=False))
    assert report.contexts is not None and len(report.contexts.tested) == 10
    said = " ".join(report.findings())
    assert "Among other tokens (2 lines to copy)" in said and "Of the controls fail" in said
    tables = [b for b in report.section().blocks if "among other tokens" in getattr(b, "caption", "")]
    assert len(tables) == 1 and len(tables[0].rows) == 10
    column = report.frame().set_index("token_id")["context_p"]
    assert column.notna().sum() == 10 and report.metrics()["n_fail_in_context"] is not None
    json.dumps(report.to_json(), allow_nan=False)


def test_a_stopped_scan_goes_on_among_the_lines_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wordy_model("neox")
    options = ScanOptions(top=4, controls=6, contexts=3, sides=False, journal=tmp_path / "tested.jsonl")
    whole = scan(model, "top", options=options)
    file = tmp_path / "tested-lines.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 3 * 10
    file.write_text("\n".join(lines[:12]) + "\n")
    ran: list[int] = []
    real = scoring._steps
    monkeypatch.setattr(scoring, "_steps", lambda *a: (ran.append(len(a[2])), real(*a))[1])
    again = scan(model, "top", options=options)
    assert again.contexts == whole.contexts and sum(ran) == 3 * 10 - 11
    assert whole.contexts is not None
    tested = {c.token_id for c in whole.contexts.tested}
    assert not tested & {i for line in whole.contexts.lines for i in line}, "no tested token stands beside another"


def test_the_words_of_the_lines_are_drawn_from_ordinary_tokens_that_are_not_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pools: list[set[int]] = []

    def few(model: Any, vocabulary: Any, pool: list[int], n: int, seed: int) -> None:
        pools.append(set(pool))
        raise DegenerateInputError("too few")

    monkeypatch.setattr(scanner, "make_lines", few)
    report = scan(wordy_model("neox"), "top", options=ScanOptions(top=4, controls=6, contexts=2, sides=False))
    tested = {t.token_id for t in report.verification.tested} if report.verification else set()
    assert len(tested) >= 10 and len(pools[0]) > 20 and not pools[0] & tested


def test_a_line_longer_than_the_positions_is_a_note_and_the_verification_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wordy_model("neox")
    need = len(make_lines(model, VOCABULARY, PLAIN, 1).templates[0].ids)
    short = TokenPrompt("short", "", "{token}", "{token}", shots=2)
    monkeypatch.setattr(scanner, "PROMPTS", (short,))
    monkeypatch.setattr(type(model), "max_tokens", property(lambda self: need - 1))
    report = scan(model, "top", options=ScanOptions(top=4, controls=6, contexts=2, sides=False))
    assert report.verification is not None and report.contexts is None
    assert any("Not measured: contexts" in note and f"{need} positions" in note for note in report.notes)
