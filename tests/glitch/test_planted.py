"""Scans of models whose training is known: which tokens it never showed, showed as input only, or showed rarely."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tests.glitch import planted as plan
from tests.glitch.planted import D_VOCAB, N_PADDING, Planted, planted, truth
from tests.glitch.tiny_vocab import EMBED, HEAD, folder
from workbench.controls.area import chance_above
from workbench.core.codec import FastCodec
from workbench.glitch.scanning.glitch_report import GlitchReport
from workbench.glitch.scanning.scanner import scan
from workbench.glitch.verification.prompts import TokenPrompt, template
from workbench.glitch.verification.verify import Verification, verify
from workbench.glitch.vocabulary.tokenizer import analyse

TRUTH = truth()
NEVER, INPUT_ONLY, RARE, TRAINED = (list(x) for x in (TRUTH.never, TRUTH.input_only, TRUTH.rare, TRUTH.trained))
PROMPTS = (TokenPrompt("run", "", "{token}", "{token}", shots=4),)


@pytest.fixture(scope="session")
def tied() -> Planted:
    return planted(tied=True, decay=0.1)


@pytest.fixture(scope="session")
def decayed() -> Planted:
    # So much decay that what was never seen lies well below the rest, however the sums of training are rounded.
    return planted(tied=False, decay=0.3, std=0.2)


@pytest.fixture(scope="session")
def undecayed() -> Planted:
    return planted(tied=False, decay=0.0, std=1.0)


def _auc(report: GlitchReport, name: str, ids: list[int]) -> float:
    values = report.table.norm if name == "norm" else report.table.indicators[name]
    return chance_above(values[TRAINED], values[ids])


def _scan(made: Planted) -> GlitchReport:
    report = scan(made.model)
    assert report.reference.name in ("padding rows", "unused bytes", "identical rows"), report.reference.why
    assert set(report.reference.members) <= set(TRUTH.unseen)
    return report


def test_an_untied_model_with_decay_shrinks_what_it_never_saw(decayed: Planted) -> None:
    E = decayed.hf.get_input_embeddings().weight
    unseen = torch.tensor(TRUTH.unseen)
    expected = decayed.init[unseen].double() * decayed.shrunk
    error = torch.linalg.vector_norm(E[unseen] - expected, dim=1) / torch.linalg.vector_norm(expected, dim=1)
    assert float(error.max()) < 1e-6
    report = _scan(decayed)
    assert not report.tied and report.indicator == "I_in"
    assert _auc(report, "I_in", NEVER) >= 0.999 and _auc(report, "I_cos", NEVER) >= 0.99
    # what was never a target but always an input is told from what was never seen by the input norm alone
    norms, cosines = (report.table.indicators[name] for name in ("I_in", "I_cos"))
    assert chance_above(norms[INPUT_ONLY], norms[NEVER]) >= 0.99
    assert _auc(report, "I_cos", INPUT_ONLY) >= 0.99
    assert 0.2 < chance_above(cosines[INPUT_ONLY], cosines[NEVER]) < 0.8, "neither was ever a target"


def test_an_untied_model_without_decay_needs_the_output_side(undecayed: Planted) -> None:
    E = undecayed.hf.get_input_embeddings().weight
    assert torch.equal(E[TRUTH.unseen], undecayed.init[TRUTH.unseen])
    report = _scan(undecayed)
    assert report.indicator == "I_cos"
    assert 0.3 < _auc(report, "I_in", NEVER) < 0.8 and _auc(report, "I_cos", NEVER) >= 0.99


def test_a_tied_model_pushes_what_it_never_saw_along_one_direction(tied: Planted) -> None:
    report = _scan(tied)
    assert report.tied and report.indicator == "I_cos" and "I_in" not in report.table.indicators
    assert _auc(report, "I_cos", NEVER) >= 0.99
    assert _auc(report, "norm", NEVER) < 0.2, "the norm of a tied matrix says the opposite"
    rows = torch.nn.functional.normalize(tied.hf.get_output_embeddings().weight[NEVER], dim=1)
    assert float((rows @ rows.T).min()) > 0.95
    assert any(set(TRUTH.copies) <= set(ids) for ids in report.identical)
    halves = report.table.indicator[list(TRUTH.partial)]
    assert chance_above(report.table.indicator[TRAINED], halves) >= 0.99
    assert not set(TRUTH.partial) & set(report.candidates())


@pytest.mark.parametrize("name", ["tied", "decayed", "undecayed"])
def test_the_threshold_takes_what_was_not_trained(name: str, request: pytest.FixtureRequest) -> None:
    report = _scan(request.getfixturevalue(name))
    found = set(report.candidates())
    assert "false discovery rate" in report.threshold_why
    # the input norm has a lower tail of its own, into which a few of the planted ones fall
    assert len(found & set(NEVER)) >= (32 if report.indicator == "I_cos" else 26)
    wrong = found - {*NEVER, *INPUT_ONLY, *RARE, *TRUTH.impossible}
    assert len(wrong) <= 0.25 * len(found)


def _verify(made: Planted) -> tuple[Verification, dict[int, float]]:
    model, codec = made.model, FastCodec.of(plan.tokenizer())
    vocabulary = analyse(codec)
    templates = [template(prompt, vocabulary, lambda text: codec.encode([text])[0]) for prompt in PROMPTS]
    controls = np.random.default_rng(0).choice(TRAINED, 200, replace=False).tolist()
    done = verify(model, codec, templates, [*NEVER, *INPUT_ONLY, *RARE], controls)
    return done, {t.token_id: t.max_prob for t in done.tested}


@pytest.mark.parametrize("name", ["tied", "decayed", "undecayed"])
def test_all_planted_tokens_fail_and_no_trained_one(name: str, request: pytest.FixtureRequest) -> None:
    done, p = _verify(request.getfixturevalue(name))
    assert done.control_failures is not None and done.control_failures.value == 0.0 and done.control_failures.n == 200
    verified = {t.token_id for t in done.candidates if t.verified}
    assert set(NEVER) <= verified
    if name != "tied":  # a tied model can say what it has only read: reading trains the same row
        assert set(INPUT_ONLY) <= verified
    never, rare = (np.array([p[i] for i in ids]) for ids in (NEVER, RARE))
    assert max(np.median(never), np.median(rare)) < 0.1 * min(t.max_prob for t in done.controls)
    if name == "tied":  # five hits leave no trace in a row that is not shared: the order of both groups is chance there
        assert np.median(rare) > 2 * np.median(never) and chance_above(rare, never) > 0.75


def _permuted(tokenizer: Tokenizer, order: np.ndarray) -> Tokenizer:
    settings = json.loads(tokenizer.to_str())
    settings["model"]["vocab"] = {text: int(order[i]) for text, i in settings["model"]["vocab"].items()}
    for added in settings["added_tokens"]:
        added["id"] = int(order[added["id"]])
    return Tokenizer.from_str(json.dumps(settings))


def test_permuting_ids_permutes_the_result(decayed: Planted, tmp_path: Path) -> None:
    E, U = (module.weight.detach() for module in (
        decayed.hf.get_input_embeddings(), decayed.hf.get_output_embeddings()))  # fmt: skip
    n = D_VOCAB - N_PADDING
    order = np.random.default_rng(5).permutation(n)
    back = torch.from_numpy(np.concatenate([np.argsort(order), np.arange(n, D_VOCAB)]))
    made = plan.tokenizer()
    first = scan(folder(tmp_path / "a", made, {EMBED: E, HEAD: U}, tied=False))
    second = scan(folder(tmp_path / "b", _permuted(made, order), {EMBED: E[back], HEAD: U[back]}, tied=False))
    assert second.indicator == first.indicator and second.reference.name == first.reference.name
    for name, values in first.table.indicators.items():
        assert np.array_equal(second.table.indicators[name][order], values[:n]), name
    assert set(second.candidates()) == {int(order[i]) for i in first.candidates()}
