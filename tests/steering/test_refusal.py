from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.interventions.builders import NORMALISATIONS, sae_lens_sae
from tests.tiny import n_hooks, tiny_model
from workbench.controls.arms import UNEDITED, Arm, InTurn
from workbench.controls.directions import random_directions
from workbench.core.errors import DegenerateInputError, EditError, InvalidInputError, MismatchError
from workbench.core.progress import task
from workbench.core.stats import wilson
from workbench.core.tokens import TokenBatch
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Where
from workbench.interventions.ops import Add, Map, PerRow
from workbench.interventions.saes import SAEAblate, SAEClamp
from workbench.models.model import Model
from workbench.steering.directions.contrast import TwoByTwo, mean_activations
from workbench.steering.refusal.contrast_features import EVERY_TOKEN_BUT_THE_FIRST, find_refusal_features
from workbench.steering.refusal.data import PromptPair, RefusalData, as_chats, exchanges, refusal_data
from workbench.steering.refusal.measures import first_token_kl, is_refusal, refusal_log_odds, refusal_token_ids
from workbench.steering.refusal.refusal_report import RefusalReport
from workbench.steering.refusal.study import RefusalOptions, refusal_study
from workbench.steering.sweep.arms import EditSummary
from workbench.steering.sweep.rows import ArmRunner, Writing, Written

# ---- metrics


def test_refusal_metric_and_kl_golden_values() -> None:
    p, q = torch.tensor([2.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert refusal_log_odds(p, [0, 3]).item() == pytest.approx(1.62011446, abs=1e-7)
    assert refusal_log_odds(p + 50, [0, 3]).item() == pytest.approx(1.62011446, abs=1e-6)
    assert refusal_log_odds(p, [3, 0, 0]).item() == pytest.approx(1.62011446, abs=1e-7), "a token counts once"
    assert first_token_kl(p, q).item() == pytest.approx(0.24817289, abs=1e-7)
    assert first_token_kl(q, p).item() != pytest.approx(0.24817289, abs=1e-3)
    assert first_token_kl(p, p).item() == 0.0


def test_refusal_metric_saturates_in_double_precision() -> None:
    sure = torch.tensor([100.0, 0.0])
    assert refusal_log_odds(sure, [0]).item() == pytest.approx(18.4207, abs=1e-3)
    assert refusal_log_odds(sure, [1]).item() == pytest.approx(-18.4207, abs=1e-3)


@pytest.mark.parametrize("tokens", [[], [4], [-1]])
def test_refusal_metric_refuses_tokens_that_do_not_exist(tokens: list[int]) -> None:
    with pytest.raises(InvalidInputError, match="vocabulary of 4"):
        refusal_log_odds(torch.zeros(4), tokens)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I’m sorry, but no.", True),
        ("As for that, I\ncannot  help.", True),
        ("Unfortunately, I'm UNABLE to do it.", True),
        ("Sure! Here is how.", False),
        ("I can help with that.", False),
        ("", False),
    ],
)
def test_refusal_phrases(text: str, refuses: bool) -> None:
    assert is_refusal(text) == refuses


def test_every_given_refusal_is_recognised_and_no_compliant_opening() -> None:
    data = refusal_data()
    missed = [text for text in data.refusals if not is_refusal(text)]
    assert not missed
    assert not [text for text in data.compliant if is_refusal(text)]


def test_refusal_tokens_are_first_tokens_that_compliance_does_not_share() -> None:
    model = tiny_model()
    tokens = refusal_token_ids(model, ["No way", "I won't", "Yes but no"], ["Yes", "Sure"])
    assert [model.tokenizer.decode([t]) for t in tokens] == ["N", "I"]
    with pytest.raises(DegenerateInputError, match="begin differently"):
        refusal_token_ids(model, ["Yes, no"], ["Yes"])


def test_wilson_at_the_edge() -> None:
    none = wilson(0, 16)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.1936, abs=1e-3)  # z^2 / (n + z^2) = 3.8415 / 19.8415


# ---- data


def test_prompts_are_paired_and_split_without_overlap() -> None:
    data = refusal_data()
    assert len(data.pairs) >= 40
    requests = [text for pair in data.pairs for text in (pair.harmful, pair.harmless)]
    assert len(set(requests)) == len(requests)
    split = data.split(16, 8, 16, seed=1)
    parts = [set(split.train), set(split.val), set(split.test)]
    assert [len(part) for part in parts] == [16, 8, 16]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert split == data.split(16, 8, 16, seed=1) != data.split(16, 8, 16, seed=2)
    with pytest.raises(InvalidInputError, match="there are"):
        data.split(40, 8, 16)


def test_exchanges_mark_exactly_the_reply() -> None:
    model = tiny_model()
    exchange = exchanges(model, ["one", "a longer request"], ["No.", "I won't do it."])
    for ids, mask, is_reply, reply in zip(
        exchange.tokens.ids, exchange.tokens.mask, exchange.is_reply, ("No.", "I won't do it."), strict=True
    ):
        assert model.tokenizer.decode(ids[is_reply]) == reply
        assert model.tokenizer.decode(ids[mask & ~is_reply]).endswith("assistant")


# ---- clamps: the operator of this library beside its five relatives


def _golden_sae() -> Any:
    decoder = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    return SimpleNamespace(W_dec=decoder, encode=lambda x: torch.relu(x @ decoder.T - 0.5))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (SAEClamp(_golden_sae(), [0], 5.0), [5.5, 1.0]),  # not (5.9, 1.2): error kept; not (5, 1): not the projection
        (SAEClamp(_golden_sae(), [0], 1.0), [1.5, 1.0]),  # not (2, 1): also downwards
        (SAEClamp(_golden_sae(), [0], 1.5), [2.0, 1.0]),
        (SAEClamp(_golden_sae(), [0, 1], torch.tensor([5.0, 1.5])), [5.5, 1.0]),
        (SAEAblate(_golden_sae(), [0]), [0.5, 1.0]),
    ],
)
def test_clamp_golden_vectors(op: Any, expected: list[float]) -> None:
    found = op(torch.tensor([[2.0, 1.0]]))
    assert torch.allclose(found, torch.tensor([expected]), atol=1e-6)


def test_clamp_switches_on_an_inactive_feature() -> None:
    found = SAEClamp(_golden_sae(), [0], 5.0)(torch.tensor([[0.0, 1.0]]))
    assert torch.allclose(found, torch.tensor([[5.0, 1.0]]))


# ---- arms


def test_per_row_edits_each_row_by_its_own_op() -> None:
    ops = (Add(torch.tensor([1.0, 0.0])), Add(torch.tensor([0.0, 1.0]), 10.0))
    edit = PerRow(ops, torch.tensor([1, -1, 0]))
    h, rows = torch.zeros(4, 2), torch.tensor([0, 1, 2, 2])
    assert edit(h, Where(rows, 0 * rows)).tolist() == [[0, 10], [0, 0], [1, 0], [1, 0]]
    assert not h.any(), "the input is left as it is"
    assert edit.take(torch.tensor([2, 1]))(h, Where(torch.tensor([0, 0, 1, 1]), 0 * rows)).tolist() == [
        [1, 0],
        [1, 0],
        [0, 0],
        [0, 0],
    ]
    assert edit.must_change and not edit.take(torch.tensor([1])).must_change
    with pytest.raises(InvalidInputError, match="PerRow"):
        PerRow(ops, torch.tensor([2]))


def replies_of(model: Model, arm: Arm, prompts: TokenBatch, new_tokens: int, site: str = "resid_post.1") -> Written:
    """Greedy replies in an arm, as the study writes them, with the first logits as a measure."""
    how = Writing(new_tokens=new_tokens, scope=EVERY_TOKEN_BUT_THE_FIRST, edits_prompt=True)
    runner = ArmRunner(model, site, prompts, how)
    with task(total=None, description="x", unit="replies") as progress:
        return runner.write(arm, lambda logits, base, _: {"logits": logits, "base": base}, progress)


def test_replies_and_first_logits_of_an_arm() -> None:
    model = tiny_model()
    prompts = model.tokens(["first prompt", "second", "and a third one"])
    vectors = random_directions(torch.ones(16) * 3, 3, seed=0, orthogonal=True)
    plain = model.generate(prompts, 6, temperature=0.0).texts
    base = replies_of(model, UNEDITED, prompts, 6)
    assert base.texts == plain and EditSummary.of(0.0, base.reports).share == 0.0
    assert torch.allclose(base.first["logits"], model.logits(prompts), atol=1e-4)
    arm = Arm(name="many", kind="r", strength=1.0, edits=InTurn(tuple(Add(v, 2.0) for v in vectors)))
    found = replies_of(model, arm, prompts, 6)
    edit = Intervention.at("resid_post.1", Add(vectors, 2.0), EVERY_TOKEN_BUT_THE_FIRST)
    assert found.texts == model.generate(prompts, 6, intervention=edit, temperature=0.0).texts != plain
    with model.plan(edit):
        assert torch.allclose(found.first["logits"], model.logits(prompts), atol=1e-4)
    assert torch.allclose(found.first["base"], base.first["logits"], atol=1e-4)
    assert not torch.allclose(found.first["logits"], base.first["logits"], atol=0.1)
    assert EditSummary.of(1.0, found.reports).mean_norm == pytest.approx(2 * 12.0, rel=1e-4)  # norm of 3 * ones(16)
    assert n_hooks(model.hf) == 0


def test_an_arm_that_changes_nothing_raises() -> None:
    model = tiny_model()
    for op in (Add(torch.ones(16), 1e-30), Map(lambda h: h)):
        with pytest.raises(EditError, match="strength"):
            arm = Arm(name="nothing", kind="d", strength=1.0, edits=InTurn((op,)))
            replies_of(model, arm, model.tokens(["some prompt"]), 2)


# ---- a model with a planted refusal direction

WORDS = (
    "I",
    "Sorry",
    "Sure",
    "Here",
    "can't",
    "help",
    "wait",
    "now",
    "go",
    "on",
    "bomb",
    "cake",
    "dog",
    "cat",
    "make",
    "find",
)
MARKS = ("<pad>", "<s>", "user", "assistant", "</s>")
D = 64


def _toy_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate((*MARKS, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} {% endfor %}assistant"
    return tokenizer


def _toy_model() -> Model:
    """Blocks do nothing; words of refusals hold +e0, words of compliance -e0; the tokens I and Sorry are read from e0."""
    tokenizer = _toy_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=D, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=8, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=4,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in hf.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    ids = tokenizer.get_vocab()
    noise = torch.Generator().manual_seed(1)
    embed, head = hf.model.embed_tokens.weight, hf.lm_head.weight
    embed.copy_(0.1 * torch.randn(embed.shape, generator=noise))
    embed[:, :6] = 0.0
    head.zero_()
    for word in ("I", "Sorry", "can't", "help", "wait"):
        embed[ids[word], 0] = 1.0
    for word in ("Sure", "Here", "now", "go", "on"):
        embed[ids[word], 0] = -1.0
    # unsteered: assistant -> Sure -> now; steered: I and on with I
    for axis, (seen, said) in enumerate((("assistant", "Sure"), ("Sure", "now")), 1):
        embed[ids[seen], axis] = 1.0
        head[ids[said], axis] = 3.0
    head[ids["I"], 0], head[ids["Sorry"], 0] = 2.5, 1.5
    return Model(hf, tokenizer, name="toy")


def _toy_sae(model: Model, site: str = "blocks.0.hook_resid_post") -> Any:
    decoder = torch.cat([torch.eye(D), -torch.eye(D)])
    metadata = {"hook_name": site, "model_fingerprint": model.fingerprint, "model_name": model.name}
    return SimpleNamespace(
        W_dec=decoder, encode=lambda x: torch.relu(x @ decoder.T - 0.1), cfg=SimpleNamespace(d_in=D, metadata=metadata)
    )


def _toy_data() -> RefusalData:
    verbs, things = ("make", "find", "go", "wait"), ("bomb", "cake", "dog", "cat")
    pairs = [PromptPair(f"{verb} bomb {thing}", f"{verb} cake {thing}") for verb in verbs for thing in things]
    return RefusalData(
        tuple(pairs),
        ("I can't help wait", "Sorry can't help"),
        ("Sure now go", "Here go on now"),
        ("cat dog make cake", "dog go on cat"),
        phrases=("i i",),
    )


OPTIONS = RefusalOptions(
    n_train=6, n_val=4, n_test=6, strengths=(0.5, 4.0), clamps=(4.0,), n_features=1, n_candidates=3, new_tokens=6
)


@pytest.fixture(scope="module")
def toy_report() -> RefusalReport:
    model = _toy_model()
    return refusal_study(model, _toy_sae(model), data=_toy_data(), options=OPTIONS)


def test_planted_direction_is_found_and_makes_the_model_refuse(toy_report: RefusalReport) -> None:
    strong = toy_report.arm("refusal direction x4")
    assert toy_report.site == "resid_post.0"
    assert toy_report.refusal_tokens == ("I", "Sorry")
    assert strong.refused_harmful.value == 1.0
    assert strong.control_harmful is not None and strong.control_harmful.low > 2.0
    assert strong.example_harmful.startswith(" I I")
    weak = toy_report.arm("refusal direction x0.5")
    assert toy_report.arms[0].log_odds_harmful.value < weak.log_odds_harmful.value < strong.log_odds_harmful.value
    assert strong.norm == pytest.approx(4 * toy_report.contrast.reply, rel=1e-3), "strength 1 adds the difference once"


def test_random_directions_do_not_make_it_refuse(toy_report: RefusalReport) -> None:
    control, strong = toy_report.arm("random direction x4"), toy_report.arm("refusal direction x4")
    assert control.refused_harmful.value == control.refused_harmless.value == 0.0
    assert control.norm == pytest.approx(strong.norm, rel=1e-3)
    assert control.log_odds_harmful.value < 0 < strong.log_odds_harmful.value


def test_base_rate_and_lack_of_selectivity_are_said(toy_report: RefusalReport) -> None:
    findings = toy_report.findings()
    assert "0 of 6 harmful prompts" in findings[0] and "0 of 6 harmless" in findings[0]
    assert any("not selective" in finding for finding in findings), "this model does not read the topic at all"
    strong = toy_report.arm("refusal direction x4")
    assert strong.refused_harmless.value == 1.0
    assert strong.selective is not None and not strong.selective.excludes(0.0)


def test_the_two_by_two_separates_topic_from_refusal(toy_report: RefusalReport) -> None:
    # blocks do nothing, so reply tokens know nothing of the prompt
    assert toy_report.contrast.prompt < 1e-5 < 1.0 < toy_report.contrast.reply


def test_planted_feature_is_found_and_its_matched_controls_do_nothing(toy_report: RefusalReport) -> None:
    best = toy_report.features[0]
    assert best.feature == 0 and best.auroc == 1.0 and best.cosine > 0.9 and best.reply_tokens >= 2
    assert best.screened is not None and best.screened > 2.0
    clamped, control = toy_report.arm("refusal features at 4 max"), toy_report.arm("random features at 4 max")
    assert clamped.refused_harmful.value == 1.0
    assert clamped.control_harmful is not None and clamped.control_harmful.low > 0
    assert control.refused_harmful.value == 0.0


def test_the_unsteered_arm_has_no_comparison_and_costs_compare_with_it(toy_report: RefusalReport) -> None:
    base = toy_report.arms[0]
    assert base.name == "unsteered" and base.share == 0.0
    assert base.control_harmful is base.text_change is base.kl_harmless is None
    strong = toy_report.arm("refusal direction x4")
    assert strong.text_change is not None and strong.text_change.value == pytest.approx(
        strong.text_loss.value - base.text_loss.value, abs=1e-6
    )
    assert strong.kl_harmless is not None and strong.kl_harmless.value > 0.5


def test_report_shows_itself(toy_report: RefusalReport) -> None:
    json.dumps(toy_report.to_json(), allow_nan=False)
    section = toy_report.section()
    assert section.findings == toy_report.findings()
    assert "unsteered/refused_harmful" in section.metrics
    assert "refusal direction x4" in toy_report._repr_html_()


def test_same_seed_same_report_and_without_sae_only_the_direction(toy_report: RefusalReport) -> None:
    model = _toy_model()
    assert refusal_study(model, _toy_sae(model), data=_toy_data(), options=OPTIONS) == toy_report
    with pytest.raises(InvalidInputError, match="new ones included"):
        refusal_study(
            model, None, site="resid_post.1", data=_toy_data(), options=dataclasses.replace(OPTIONS, new_tokens=10**5)
        )
    alone = refusal_study(model, None, site="resid_post.1", data=_toy_data(), options=OPTIONS)
    assert not alone.features and not alone.family("refusal features")
    assert any("No SAE feature" in finding for finding in alone.findings())


def test_test_prompts_do_not_reach_direction_or_features() -> None:
    model = _toy_model()
    data = _toy_data()
    split = data.split(6, 4, 6)
    swapped = [PromptPair("dog dog dog", "cat cat") if pair in split.test else pair for pair in data.pairs]
    one = refusal_study(model, _toy_sae(model), data=data, options=OPTIONS)
    two = refusal_study(model, _toy_sae(model), data=dataclasses.replace(data, pairs=tuple(swapped)), options=OPTIONS)
    assert one.contrast == two.contrast and one.features == two.features
    assert one.arms != two.arms


def test_wrong_use_is_refused() -> None:
    model = _toy_model()
    with pytest.raises(InvalidInputError, match="neither an SAE nor a site"):
        refusal_study(model, None, data=_toy_data(), options=OPTIONS)
    with pytest.raises(InvalidInputError, match="the SAE reads"):
        refusal_study(model, _toy_sae(model), site="resid_post.1", data=_toy_data(), options=OPTIONS)
    foreign = _toy_sae(model)
    foreign.cfg.metadata["model_fingerprint"] = "000000000000"
    with pytest.raises(MismatchError, match="trained on"):
        refusal_study(model, foreign, data=_toy_data(), options=OPTIONS)
    transcoder = _toy_sae(model)
    transcoder.cfg.metadata["hook_name_out"] = "blocks.1.hook_mlp_out"
    with pytest.raises(MismatchError, match=r"refusal_study needs an SAE .* writes mlp_out\.1"):
        refusal_study(model, transcoder, data=_toy_data(), options=OPTIONS)
    with pytest.raises(InvalidInputError, match="positive"):
        RefusalOptions(strengths=(0.0,))


# ---- features


def test_candidates_need_two_tokens_of_one_refusal() -> None:
    model = _toy_model()
    model.hf.model.embed_tokens.weight[model.tokenizer.get_vocab()["help"], 3] = 1.0
    sae = _toy_sae(model)
    prompts = ["make bomb dog", "find bomb cat"]
    yes, no = exchanges(model, prompts, ["I can't help wait"]), exchanges(model, prompts, ["Sure now go"])
    found = find_refusal_features(model, sae, "resid_post.0", yes, no, torch.eye(D)[0], min_tokens=2)
    assert {row.feature for row in found.candidates} >= {0}
    assert all(row.reply_tokens >= 2 and row.mean_difference > 0 for row in found.candidates)
    assert 3 not in {row.feature for row in found.candidates}, "active on one token of the refusal only"
    loose = find_refusal_features(model, sae, "resid_post.0", yes, no, torch.eye(D)[0], min_tokens=1)
    assert 3 in {row.feature for row in loose.candidates}
    assert found.frequency[0] == pytest.approx(4 / 7)  # four tokens of each refusal, none of three compliant ones


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_features_rank_by_what_they_add_to_the_stream(normalisation: str) -> None:
    model, sae = _toy_model(), sae_lens_sae("topk_rescaled", normalisation, d_in=D)
    yes, no = exchanges(model, ["make bomb dog"], ["I can't help wait"]), exchanges(model, ["make bomb dog"], ["Sure"])
    added = []
    for exchange in (yes, no):
        x = model.capture(exchange.tokens, ["resid_post.0"])["resid_post.0"][exchange.is_reply]
        kept = sae.decode(acts := sae.encode(x))
        without = []
        for f in range(40):
            sae.encode(x)
            without.append(sae.decode(acts.index_fill(1, torch.tensor([f]), 0.0)))
        added.append(torch.stack([(kept - part).mean(0) for part in without]))
    size = (added[0] - added[1]).norm(dim=1)
    found = find_refusal_features(model, sae, "resid_post.0", yes, no, torch.eye(D)[0], min_tokens=1)
    assert len(found.candidates) > 2
    for row in found.candidates:
        assert row.mean_difference * float(found.decoder_norm[row.feature]) == pytest.approx(
            float(size[row.feature]), rel=1e-4
        )
    assert [row.feature for row in found.candidates] == sorted(
        (row.feature for row in found.candidates), key=lambda f: -size[f]
    )


# ---- the real model


@pytest.mark.embedded
def test_direction_raises_the_refusal_log_odds_of_the_embedded_model(embedded: Model) -> None:
    data, site = refusal_data(), "resid_post.15"
    split = data.split(4, 1, 3)
    harmful, harmless = [p.harmful for p in split.train], [p.harmless for p in split.train]
    cells = [exchanges(embedded, who, what) for who in (harmful, harmless) for what in (data.refusals, data.compliant)]
    effects = TwoByTwo.of(*(mean_activations(embedded, c.tokens, [site], c.is_reply)[site] for c in cells))
    tokens = refusal_token_ids(embedded, data.refusals, data.compliant)
    prompts = embedded.tokens(as_chats([p.harmful for p in split.test]))
    odds = []
    for vector in (effects.reply, random_directions(effects.reply, 1, orthogonal=True)[0]):
        arm = Arm(name="a", kind="d", strength=1.0, edits=InTurn((Add(vector),)))
        said = replies_of(embedded, arm, prompts, 2, site)
        applied = EditSummary.of(1.0, said.reports)
        odds.append(refusal_log_odds(said.first["logits"], tokens))
        assert applied.mean_norm == pytest.approx(float(effects.reply.norm()), rel=1e-3)
        assert 0.05 < applied.share < 1.0, "the attention sink is no part of the norm"
    assert bool((odds[0] > odds[1] + 0.5).all())
