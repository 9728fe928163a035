"""SAEs and tables that do not fit, SAEs with their own units, and vocabularies smaller than the unembedding."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.features.test_input_score import make_store
from tests.features.toys import random_sae
from tests.glitch.tiny_vocab import sentencepiece
from tests.tiny import D_MODEL, tiny_model, tiny_tokenizer
from workbench.activations.store import ActivationStore
from workbench.bases.sae import as_basis
from workbench.cli.features_show import load_cards
from workbench.controls.matching import matched_features
from workbench.core.codec import token_bytes
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, MissingFileError
from workbench.features import ContextOptions, ScoreOptions, feature_cards, output_scores, rank_score, score_features
from workbench.features.cards.cardmaking import CardOptions
from workbench.features.cards.tablecards import table_cards
from workbench.features.explain.examples import ExampleOptions
from workbench.features.passes.contexts import _texts, marked, unmarked
from workbench.features.passes.windows import WindowOptions
from workbench.features.token_classes import TokenTexts
from workbench.interventions.intervention import Intervention
from workbench.interventions.saes import SAEAddMax
from workbench.interventions.scopes import Last
from workbench.models.model import Model
from workbench.models.tiny import tiny_hf
from workbench.steering import SteerOptions, steer

PROMPT = "From my experience,"
OPTIONS = CardOptions(
    shown=2, lens_k=3, windows=WindowOptions(top=4, sample=20, before=3, after=3), examples=ExampleOptions(fewest=3)
)
FEW = ScoreOptions(k=5, rows=16, random_directions=4)


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm_rescale"])
def test_output_scores_push_as_far_as_the_edit_that_steers(normalise: str) -> None:
    model, sae = tiny_model(), random_sae()
    sae.cfg.normalize_activations = normalise
    found = output_scores(model, sae, [3])
    edit = Intervention.at("resid_post.1", SAEAddMax(sae, sae.W_dec[3], 10.0), Last())
    with model.plan(edit):
        logits = model.hf(**model.tokens(PROMPT).hf()).logits[:, -1].float()
    assert float(found.score) == pytest.approx(float(rank_score(logits, found.lens.ids)[0]), abs=1e-5)
    if normalise != "none":
        assert abs(found.a_max - float(output_scores(model, random_sae(), [3]).a_max)) > 0.01


def test_a_transcoder_is_not_scored_or_steered_where_it_reads() -> None:
    model, sae = tiny_model(), random_sae(site="resid_mid.1")
    sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    prompts = ("one day", "the", "for now, I", "he said")
    for call in (
        lambda: output_scores(model, sae, [3]),
        lambda: score_features(model, sae, scores=("output",), options=FEW),
        lambda: steer(model, sae, [3], (1.0,), prompts, options=SteerOptions(new_tokens=2)),
    ):
        with pytest.raises(MismatchError, match=r"transcoder: it reads resid_mid\.1 and writes mlp_out\.1"):
            call()


@pytest.mark.parametrize("site", ["z.1", "mlp_post.1"])
def test_tokens_are_read_off_rows_of_the_residual_stream_alone(site: str, tmp_path: Path) -> None:
    model = tiny_model()
    width = model.width(model.resolve(site))
    sae = random_sae(d_in=width)
    sae.cfg.metadata.hook_name = {"z.1": "blocks.1.attn.hook_z", "mlp_post.1": "blocks.1.mlp.hook_post"}[site]
    with pytest.raises(MismatchError, match=f"rows at {site} are not in the coordinates of the residual stream"):
        output_scores(model, sae, [3])
    store = make_store(tmp_path / "s", rows=40, site=site)
    cards = list(feature_cards(model, sae, store, options=dataclasses.replace(OPTIONS, explain=False)))
    assert any(card.windows for card in cards), "what a feature reads is shown all the same"
    assert not any(card.promoted or card.suppressed for card in cards)


def test_an_unembedding_may_have_more_rows_than_the_tokenizer_has_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = Model(tiny_hf("llama", len(tokenizer) + 400), tokenizer, "padded")
    sae = random_sae()
    store = make_store(tmp_path / "s", rows=40, model=model)
    cards = list(feature_cards(model, sae, store, features=range(12), options=OPTIONS))
    promoted = {token.token_id: token.token for card in cards for token in card.promoted}
    beyond = {i: text for i, text in promoted.items() if i >= len(TokenTexts.of(tokenizer))}
    assert beyond and all(text == f"⟨{i}⟩" for i, text in beyond.items())
    assert len(score_features(model, sae, store, options=FEW)) == 40


def test_a_feature_that_writes_nothing_has_no_score_and_stops_nobody() -> None:
    model, sae = tiny_model(), random_sae()
    whole = score_features(model, sae, scores=("output",), options=FEW).df
    sae.W_dec[7] = 0.0
    df = score_features(model, sae, scores=("output",), options=FEW).df
    assert math.isnan(df.output_score[7]) and math.isnan(df.confidence_delta[7])
    assert (df.best_token[7], list(df.top_tokens[7]), list(df.top_token_ids[7])) == ("", [], [])
    others = [i for i in range(40) if i != 7]
    assert df.output_score[others].tolist() == pytest.approx(whole.output_score[others].tolist(), abs=1e-6)


def test_cards_are_not_completed_by_the_table_of_another_sae(token_store: ActivationStore, tmp_path: Path) -> None:
    model, sae = tiny_model(), random_sae()
    cards = feature_cards(model, sae, token_store, options=dataclasses.replace(OPTIONS, explain=False))
    cards.save(tmp_path / "cards")
    table = score_features(model, sae, scores=("output",), options=FEW)
    table.save(tmp_path / "own")
    assert load_cards(tmp_path / "cards", tmp_path / "own")[1] is not None
    for m, other in ((model, random_sae(seed=1)), (tiny_model(seed=1), sae)):
        strange = score_features(m, other, scores=("output",), options=FEW)
        strange.save(tmp_path / "other")
        with pytest.raises(MismatchError, match=r"feature table belongs to other features"):
            load_cards(tmp_path / "cards", tmp_path / "other")
        with pytest.raises(MismatchError, match=r"feature table belongs to other features"):
            strange.check(model, sae)
    table.check(model, sae)
    with pytest.raises(MissingFileError, match=r"no folder .*nothere"):
        load_cards(tmp_path / "cards", tmp_path / "nothere")
    with pytest.raises(MissingFileError, match=r"no folder .*nothere"):
        load_cards(tmp_path / "nothere")


def test_the_text_of_contexts_keeps_its_spaces_and_ends_with_the_document() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=sentencepiece())
    parts = token_bytes(tokenizer)
    spaced = [i for i, part in enumerate(parts) if part[:1] == b" " and len(part) > 1][:3]
    assert len(spaced) == 3
    end, beyond = 0, len(parts) + 5
    row = [*spaced, beyond, spaced[0], end, spaced[1]]
    one, (start,) = torch.zeros(1, 1, dtype=torch.long), [torch.tensor([[1]])]
    ((text,),) = _texts(lambda _: row, parts, frozenset({end}), one, one + 2, start, ContextOptions(before=8, after=4))
    words = [parts[i].decode() for i in spaced]
    assert text == f"{words[1]}«{words[2]}»⟨{beyond}⟩{words[0]}"
    hostile = ("a\u2063«", "b\u2063", "\u2063» c")
    assert unmarked(marked(*hostile)) == tuple(part.replace("\u2063", "") for part in hostile)


def test_a_table_of_another_sae_is_refused() -> None:
    model, sae = tiny_model(), random_sae()
    table = score_features(model, sae, scores=("output",), options=FEW)
    table.check(model, sae)
    with pytest.raises(MismatchError, match="sae .* \\(here"):
        table.check(model, random_sae(seed=1))
    with pytest.raises(MismatchError, match=r"model tiny-llama \(here tiny-gpt2\)"):
        table.check(tiny_model("gpt2"), sae)
    prompts = ("one day", "the", "for now, I", "he said")
    with pytest.raises(MismatchError, match="Name those of this SAE"):
        steer(model, random_sae(seed=1), [3], (1.0,), prompts, options=SteerOptions(new_tokens=2, table=table))


def test_products_in_fp32_keep_the_bound_of_screening_above_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.models.head._ROWS", 128)
    hf = tiny_hf("llama", 300).bfloat16()
    model = Model(hf, tiny_tokenizer(), "half")
    hidden = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0)).bfloat16() * 6
    ids = torch.arange(300)
    exact = model.head.exact(hidden)
    torch.testing.assert_close(exact, model.head.shared(hidden, ids), rtol=1e-5, atol=1e-5)
    assert (exact - model.head.all(hidden)).abs().max() > 1e-3, "the model's own products are rounded"


def test_marks_in_a_context_do_not_hide_its_token() -> None:
    from tests.features.test_tablecards import make_table
    from workbench.features.passes.contexts import marked

    table = make_table()
    table.df.at[0, "contexts"] = [marked("Il dit « oui » et le ", "chat", " dort")]
    window = next(iter(table_cards(table))).windows[0]
    assert window.tokens[window.peak] == "chat" and window.tokens[0] == "Il dit « oui » et le "


def test_a_number_too_large_for_a_feature_is_refused_in_words() -> None:

    sae: Any = random_sae()
    with pytest.raises(InvalidInputError, match="no feature numbers"):
        as_basis(sae).features([2**70])


def test_a_zero_row_of_an_sae_in_units_of_its_decoder_norms_spoils_no_other() -> None:
    model, sae = tiny_model(), random_sae()
    sae.cfg.rescale_acts_by_decoder_norm = True
    sae.W_dec[7] = 0.0
    rows = as_basis(sae).rows()
    assert rows[7].abs().max() == 0 and torch.allclose(rows.norm(dim=1)[:7], torch.ones(7))
    x = torch.randn(3, D_MODEL)
    acts = as_basis(sae).encode(x)
    assert acts[:, 7].abs().max() == 0 and as_basis(sae).decode(acts, x).isfinite().all()
    assert math.isnan(score_features(model, sae, scores=("output",), options=FEW).df.output_score[7])


def test_steering_with_what_writes_nothing_is_refused_by_number_and_controls_write_something() -> None:
    model, sae = tiny_model(), random_sae()
    sae.W_dec[torch.arange(40) % 4 != 3] = 0.0
    prompts = ("one day", "the", "for now, I", "he said")
    with pytest.raises(DegenerateInputError, match=r"features \[4\] are zero"):
        steer(model, sae, [3, 4], (1.0,), prompts, options=SteerOptions(new_tokens=2))
    norm = sae.W_dec.detach().norm(dim=1)
    found = matched_features([3, 7], torch.full((40,), torch.nan), norm=norm, seed=1)[0]
    assert all(f % 4 == 3 for f in found) and len(found) == 2
