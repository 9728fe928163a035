from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.glitch.tiny_vocab import SPECIAL, WORDS, byte_level
from tests.saes.handmade import relu_sae
from tests.tiny import D_MODEL
from workbench.cli import main
from workbench.core.codec import codec_of, token_bytes
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.tokens import TokenBatch
from workbench.glitch.scanning.sae_feature_report import GlitchFeatures
from workbench.glitch.scanning.sae_features import CONTEXTS, FeatureOptions, _drawn, glitch_features
from workbench.glitch.vocabulary.tokenizer import analyse, matched_controls
from workbench.interventions.scopes import Last
from workbench.models.model import Model
from workbench.models.tiny import tiny_hf

BACKEND = byte_level()
GLITCH = [BACKEND.token_to_id(word) for word in WORDS[:9]]
SITE, N_FEATURES, PLANTED = "resid_post.1", 12, 4
OPTIONS = FeatureOptions(controls=3)


@functools.cache
def _model() -> Model:
    """Glitch tokens share one direction of the embedding, as rows do that training never moved."""
    hf = tiny_hf("qwen2", BACKEND.get_vocab_size())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        rows = hf.get_input_embeddings().weight
        rows[GLITCH] = 3 * torch.randn(D_MODEL, generator=generator) + 0.3 * torch.randn(
            9, D_MODEL, generator=generator
        )
        rows[GLITCH[8]] = rows[GLITCH[7]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=SPECIAL, pad_token=SPECIAL)
    return Model(hf, tokenizer, name="tiny")


def _read(model: Model, ids: list[int]) -> torch.Tensor:
    """Tokens x contexts x width."""
    found = []
    for text in CONTEXTS:
        begun = model.tokens(text).ids[0].tolist()
        rows = TokenBatch.of_rows(torch.tensor([[*begun, i] for i in ids]))
        found.append(model.capture(rows, [SITE], positions=Last())[SITE])
    return torch.stack(found, 1)


@functools.cache
def _sae(model: Model) -> Any:
    ordinary = [i for i in range(20, 200) if i not in GLITCH]
    shift = _read(model, GLITCH).mean((0, 1)) - _read(model, ordinary).mean((0, 1))
    directions = torch.randn(N_FEATURES, D_MODEL, generator=torch.Generator().manual_seed(4))
    directions -= (directions @ shift)[:, None] * shift / shift.square().sum()
    directions[PLANTED] = shift
    directions = directions / directions.norm(dim=1, keepdim=True)
    bias = torch.full((N_FEATURES,), -0.5)
    bias[PLANTED] = (
        -float(_read(model, ordinary).flatten(0, 1).matmul(directions[PLANTED]).mean()) - float(shift.norm()) / 2
    )
    return relu_sae(model, directions, bias, SITE)


@functools.cache
def _report() -> GlitchFeatures:
    return glitch_features(_model(), _sae(_model()), GLITCH, options=OPTIONS)


def test_the_planted_feature_is_found_and_chance_finds_none() -> None:
    report = _report()
    assert report.rows[0].feature == PLANTED and report.rows[0].difference.low > 0
    assert report.rows[0].fires_glitch == 1 and report.rows[0].fires_control < 0.3 and report.rows[0].q < 0.01
    assert report.shuffled[0] < 1 <= len(report.more) and report.tested <= N_FEATURES
    assert (report.asked, report.distinct, len(report.ids)) == (9, 8, 8) and GLITCH[8] not in report.ids
    assert f"feature {PLANTED}" in report.findings()[0] and "same input row" in report.findings()[-1]
    assert report.frame().feature[0] == PLANTED


def test_without_a_difference_nothing_is_found() -> None:
    hf = tiny_hf("qwen2", BACKEND.get_vocab_size())
    model = Model(hf, _model().tokenizer, name="plain")
    directions = torch.randn(N_FEATURES, D_MODEL, generator=torch.Generator().manual_seed(4))
    sae = relu_sae(model, directions / directions.norm(dim=1, keepdim=True), torch.zeros(N_FEATURES), SITE)
    report = glitch_features(model, sae, GLITCH, options=OPTIONS)
    assert report.rows == () and "No feature" in report.findings()[0]


def test_numbers_equal_the_plain_computation() -> None:
    model, vocabulary = _model(), analyse(codec_of(_model().tokenizer))
    sae, distinct, report = _sae(model), GLITCH[:8], _report()
    groups = matched_controls(model, vocabulary, distinct, set(GLITCH), OPTIONS.controls, OPTIONS.seed)
    own, other = _read(model, distinct), _read(model, [i for group in groups for i in group])
    acts = [torch.relu(x @ sae.W_enc + sae.b_enc) for x in (own, other)]
    means = [a.mean(1)[:, PLANTED] for a in acts]
    row = report.rows[0]
    assert row.glitch == pytest.approx(float(means[0].mean()), rel=1e-4)
    assert row.control == pytest.approx(float(means[1].mean()), rel=1e-3, abs=1e-5)
    matched = means[1].view(8, 3).mean(1)
    assert row.difference.value == pytest.approx(float((means[0] - matched).mean()), rel=1e-4)
    centre = other.double().flatten(0, 1).mean(0)
    for x, a, found in ((own, acts[0], report.fvu_glitch), (other, acts[1], report.fvu_control)):
        error = (x - a @ sae.W_dec).double().square().sum()
        assert found.value == pytest.approx(float(error / (x.double() - centre).square().sum()), rel=1e-4)
    assert report.l0[0].value == pytest.approx(float((acts[0].mean(1) > 0).sum(1).double().mean()))


def test_controls_are_alike_and_never_twice() -> None:
    model, vocabulary = _model(), analyse(codec_of(_model().tokenizer))
    tokens = [BACKEND.token_to_id("ember"), BACKEND.token_to_id("Ġharbor")]
    groups = matched_controls(model, vocabulary, tokens, set(GLITCH) | set(tokens), 5, seed=0)
    texts = token_bytes(model.tokenizer)
    assert len({i for group in groups for i in group}) == 10 and not {i for g in groups for i in g} & set(GLITCH)
    assert all(len(texts[i]) in (4, 5, 6) and texts[i][:1] != b" " for i in groups[0])
    assert all(texts[i][:1] == b" " for i in groups[1])
    with pytest.raises(DegenerateInputError, match="Ask for fewer"):
        matched_controls(model, vocabulary, tokens, set(), 1000, seed=0)


def test_of_many_tokens_some_are_drawn() -> None:
    few, other = (
        glitch_features(_model(), _sae(_model()), GLITCH, options=FeatureOptions(controls=3, most=6, seed=seed))
        for seed in (0, 1)
    )
    assert few.ids != other.ids
    assert (
        len(few.ids) == 6 and few.n_controls == 18 and set(few.ids) < set(GLITCH) and list(few.ids) == sorted(few.ids)
    )
    assert few.more[0].feature == PLANTED
    assert any("Of 8 different glitch tokens 6 were drawn" in finding for finding in few.findings())
    assert not any("drawn" in finding for finding in _report().findings())
    with pytest.raises(InvalidInputError, match="most=4.*most is at least 5"):
        FeatureOptions(most=4)


def test_the_draw_is_of_all_of_them_and_depends_on_the_seed() -> None:
    tokens = list(range(100, 200))
    drawn = [_drawn(tokens, FeatureOptions(most=20, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(set(d)) == 20 and d == sorted(d) for d in drawn)
    assert all(min(d) < 120 and max(d) > 180 for d in drawn) and set(drawn[0]) <= set(tokens)


def test_too_few_tokens_are_refused() -> None:
    model = _model()
    with pytest.raises(DegenerateInputError, match="at least 5"):
        glitch_features(model, _sae(model), GLITCH[:4])
    with pytest.raises(DegenerateInputError, match="1 with a row of their own"):
        glitch_features(model, _sae(model), GLITCH[7:])
    with pytest.raises(InvalidInputError, match="no row"):
        glitch_features(model, _sae(model), [10**6] * 6)


def test_the_command_reads_a_scan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    model = _model()
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    _sae(model).save_model(tmp_path / "sae")
    tested = [{"token_id": i, "control": False, "max_prob": 0.0, "verdict": "strong_verified"} for i in GLITCH]
    scan = {"model": "tiny", "candidates": [], "tokenizer": {}, "verification": {"tested": tested}}
    (tmp_path / "glitch.json").write_text(json.dumps(scan))
    words = ["glitch", "features", str(tmp_path / "sae"), "--model", str(tmp_path / "model"), "--json", "--controls", "3",
             "--out", str(tmp_path / "runs"), "--scan", str(tmp_path / "glitch.json")]  # fmt: skip
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"][0]["feature"] == PLANTED
    lines = (Path(shown["run"]) / "artifacts" / "features.csv").read_text().splitlines()
    assert len(lines) == 1 + len(shown["rows"])
