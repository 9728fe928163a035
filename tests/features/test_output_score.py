from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.features.toys import constant_sae, identity_model, random_sae
from tests.tiny import D_MODEL, FAMILIES, n_hooks, tiny_model
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.features.scores.last_token import LastToken
from workbench.features.scores.logit_lens import feature_ids, lens_tokens
from workbench.features.scores.output_score import (
    OutputOptions,
    confidence,
    output_score,
    output_score_delta,
    output_scores,
    rank_score,
    score_hidden,
)
from workbench.interventions.intervention import Intervention
from workbench.interventions.saes import SAEAddMax
from workbench.interventions.scopes import All, Last
from workbench.models.model import Model


def hooked(model: Model, sae: Any, feature: int, site: str, lens_ids: torch.Tensor, options: OutputOptions) -> float:
    """The same score by one hooked forward pass of the whole prompt."""
    edit = Intervention.at(site, SAEAddMax(sae, sae.W_dec[feature], options.strength), Last())
    with model.plan(edit):
        logits = model.logits(options.prompt)
    p = logits.softmax(1)[0]
    best = lens_ids[p[lens_ids].argmax()]
    rank = int((p > p[best]).sum())
    return float((1 - rank / len(p)) * p[best])


@pytest.mark.parametrize(
    ("last", "direction", "a_max", "k", "expected"),
    [
        ((1.0, 1, 1, 1), (1.0, 0, 0, 0), 9.0, 1, 0.66261746),
        ((5.0, 1, 1, 1), (0.0, 1, 0, 0), 3.0, 1, 0.23751756),  # rank 1 of 4: (1 - 1/4) * .316690
        ((1.0, 1, 1, 3), (0.0, 0.8, 0.6, 0), 2.5, 2, 0.30574866),  # tokens 1 and 3 tie: rank 0, not 1
    ],
)
def test_closed_forms(last: tuple, direction: tuple, a_max: float, k: int, expected: float) -> None:
    model = identity_model(torch.tensor(last))
    sae = constant_sae(torch.tensor(direction), a_max)
    scores = output_scores(model, sae, options=OutputOptions(strength=1.0, k=k))
    assert float(scores.score) == pytest.approx(expected, abs=1e-6)
    assert scores.a_max == pytest.approx(a_max)


def test_delta_subtracts_the_score_of_the_unsteered_model() -> None:
    model = identity_model(torch.tensor([1.0, 1, 1, 1]))
    sae = constant_sae(torch.tensor([1.0, 0, 0, 0]), 9.0)
    options = OutputOptions(strength=1.0, k=1)
    # All four tokens tie without steering: p = 1/4, rank 0.
    assert output_score(model, sae, 0, options=options) == pytest.approx(0.66261746, abs=1e-6)
    assert output_score_delta(model, sae, 0, options=options) == pytest.approx(0.66261746 - 0.25, abs=1e-6)


def test_lens_uses_the_norm_weight_and_not_the_length() -> None:
    direction = torch.tensor([[1.0, 1.1, 0.0, 0.0]])
    plain, weighted = identity_model(torch.ones(4)), identity_model(torch.ones(4), torch.tensor([2.0, 1, 1, 1]))
    assert lens_tokens(plain, direction, 1).ids.tolist() == [[1]]
    assert lens_tokens(weighted, direction, 1).ids.tolist() == [[0]]
    orders = [lens_tokens(weighted, c * direction, 2).ids.tolist() for c in (1e-2, 1.0, 1e2)]
    assert orders[0] == orders[1] == orders[2] == [[0, 1]]


def test_lens_does_not_add_the_decoder_bias() -> None:
    model, sae = tiny_model(), random_sae()
    before = output_scores(model, sae, [0, 1], options=OutputOptions(k=5)).lens.ids
    sae.b_dec += 100.0
    sae.b_enc += 500.0
    assert torch.equal(output_scores(model, sae, [0, 1], options=OutputOptions(k=5)).lens.ids, before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["resid_pre.1", "resid_post.2", "mlp_out.1"])
def test_equals_one_hooked_forward_per_feature(family: str, site: str) -> None:
    model, sae = tiny_model(family), random_sae()
    options = OutputOptions(rows=7, k=5)
    scores = output_scores(model, sae, range(17), site, options)
    assert scores.skipped_blocks
    expected = [hooked(model, sae, f, site, scores.lens.ids[f], options) for f in range(17)]
    assert scores.score.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3, "the features must differ for this test to mean anything"
    assert n_hooks(model.hf) == 0


def test_neighbouring_layer_gives_other_scores() -> None:
    model, sae = tiny_model(), random_sae()
    here, next_ = (
        output_scores(model, sae, site=f"resid_post.{layer}", options=OutputOptions(k=5)) for layer in (0, 1)
    )
    assert (here.score - next_.score).abs().max() > 1e-2


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_batching_does_not_matter(rows: int) -> None:
    model, sae = tiny_model(), random_sae()
    together = output_scores(model, sae, options=OutputOptions(k=5)).score
    assert torch.allclose(output_scores(model, sae, options=OutputOptions(k=5, rows=rows)).score, together, atol=1e-6)


def test_one_token_prompt() -> None:
    model, sae, options = tiny_model(), random_sae(), OutputOptions(prompt="F", k=5)
    scores = output_scores(model, sae, [3], options=options)
    assert float(scores.score) == pytest.approx(
        hooked(model, sae, 3, "resid_post.1", scores.lens.ids[0], options), abs=1e-5
    )


def test_lower_precision_is_scored_in_fp32() -> None:
    full, half, sae = tiny_model(), tiny_model(), random_sae()
    half.hf.to(torch.bfloat16)
    full.hf.to(torch.bfloat16).float()
    same = output_scores(half, sae, options=OutputOptions(k=5)).score
    assert torch.allclose(same, output_scores(full, sae, options=OutputOptions(k=5)).score, atol=1e-5)
    rough = output_scores(half, sae, options=OutputOptions(k=5, precision="model")).score
    assert 1e-5 < (rough - same).abs().max() < 0.2
    assert half.dtype == torch.bfloat16


def test_screening_rejects_only_what_is_below_and_changes_nothing_else() -> None:
    model, sae = tiny_model(), random_sae()
    exact = output_scores(model, sae, options=OutputOptions(k=5))
    tau = float(exact.score.median())
    screened = output_scores(model, sae, options=OutputOptions(k=5, screen=tau))
    rejected = screened.score.isnan()
    assert 0 < int(rejected.sum()) < len(rejected)
    assert bool((exact.score[rejected] < tau).all())
    assert torch.equal(screened.score[~rejected], exact.score[~rejected])
    assert bool((screened.bound >= exact.score).all())


def test_edit_is_the_scaled_decoder_row_at_the_last_position_only() -> None:
    model, sae, site = tiny_model(), random_sae(), "resid_post.1"
    before = model.capture("From my", [site])[site][0]
    a_max = float(sae.encode(before[-1:]).max())
    with model.plan(Intervention.at(site, SAEAddMax(sae, sae.W_dec[3], 10.0), Last())):
        after = model.capture("From my", [site])[site][0]
    assert torch.allclose(after[-1] - before[-1], 10 * a_max * sae.W_dec[3], atol=1e-4)
    assert torch.equal(after[:-1], before[:-1])


def test_a_max_is_that_of_the_row() -> None:
    model, sae, site = tiny_model(), random_sae(), "resid_post.1"
    prompts = ["one", "two!", "threes", "4"]
    directions, strengths = sae.W_dec[[5, 6, 7, 8]], torch.tensor([1.0, 2.0, 4.0, 8.0])
    with model.plan(Intervention.at(site, SAEAddMax(sae, directions, strengths), All())):
        together = model.logits(prompts)
    for i, prompt in enumerate(prompts):
        with model.plan(Intervention.at(site, SAEAddMax(sae, directions[i], float(strengths[i])), All())):
            assert torch.allclose(model.logits(prompt)[0], together[i], atol=1e-4)


def test_wrong_input_is_refused() -> None:
    model, sae = tiny_model(), random_sae()
    with pytest.raises(InvalidInputError, match="Feature 40 does not exist"):
        output_scores(model, sae, [1, 40])
    with pytest.raises(DegenerateInputError, match="chooses no feature"):
        output_scores(model, sae, [])
    with pytest.raises(InvalidInputError, match=r"5\.7 is no whole number"):
        feature_ids(sae, [3, 5.7])
    assert feature_ids(sae, [3.0]).tolist() == [3]
    with pytest.raises(InvalidInputError, match="given twice"):
        output_scores(model, sae, [1, 1])
    with pytest.raises(MismatchError, match="writes 8 values"):
        output_scores(model, random_sae(d_in=8), site="resid_post.1")
    silent = random_sae()
    silent.b_enc -= 1e6
    with pytest.raises(DegenerateInputError, match="active at the last token"):
        output_scores(model, silent)
    sae.cfg.metadata.model_fingerprint = "another"
    with pytest.raises(MismatchError, match="another"):
        output_scores(model, sae)


def test_rank_counts_strictly_greater() -> None:
    score, token = rank_score(torch.zeros(2, D_MODEL), torch.tensor([[3], [7]]))
    assert score.tolist() == pytest.approx([1 / D_MODEL] * 2)
    assert token.tolist() == [3, 7]


class CountedExponentials(TorchDispatchMode):
    """Counts the values that go through an exponential, and keeps the least of them."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.least = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("aten.exp.", "aten.exp_.", "softmax", "logsumexp")):
            self.values += args[0].numel()
            if args[0].ndim == 2:  # a vocabulary, not one probability per row
                self.least = min(self.least, float(args[0].min()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("confidence_k", [1, 3])
def test_an_edit_takes_one_exponential_per_token(confidence_k: int) -> None:
    model, n = tiny_model(), 12
    run = LastToken(model, model.tokens("abc").ids, model.resolve("resid_post.0"), n)
    hidden, lens = 50 * run.hidden(torch.randn(n, D_MODEL)), torch.arange(n)[:, None]
    with CountedExponentials() as counted:
        score, sure, _, _ = score_hidden(run, hidden, lens, OutputOptions(rows=n, confidence_k=confidence_k))
    assert n * model.d_vocab <= counted.values <= n * (model.d_vocab + 2)
    logits = run.head.exact(hidden)
    assert float((logits - logits.amax(1, keepdim=True)).min()) < -100
    assert counted.least > -87, "exponentials below this are subnormal: ten times as slow"
    assert torch.allclose(score, rank_score(logits, lens)[0]) and torch.allclose(sure, confidence(logits, confidence_k))


def test_the_unsteered_scores_of_all_features_are_those_of_its_one_row_of_logits() -> None:
    model, sae = tiny_model(), random_sae(D_MODEL, 12)
    options = OutputOptions("abc", k=5)
    found = output_scores(model, sae, site="resid_post.0", options=options)
    expected = rank_score(model.logits("abc").expand(12, -1), found.lens.ids)[0]
    torch.testing.assert_close(found.score - found.delta, expected, atol=1e-6, rtol=0)
    with CountedExponentials() as few:
        output_scores(model, sae, [0], "resid_post.0", options)
    with CountedExponentials() as many:
        output_scores(model, sae, None, "resid_post.0", options)
    assert many.values - few.values < 11 * model.d_vocab * 1.5  # what is done for the unsteered model is done once


@pytest.mark.embedded
@pytest.mark.parametrize("layer", [5, 15, 25])
def test_embedded_equals_hooked_forward(embedded: Model, layer: int) -> None:
    sae = random_sae(d_in=576, d_sae=4608, k=32, site=f"resid_post.{layer}")
    scores = output_scores(embedded, sae, range(24), options=OutputOptions(rows=24))
    assert scores.skipped_blocks
    expected = [
        hooked(embedded, sae, f, f"resid_post.{layer}", scores.lens.ids[f], OutputOptions()) for f in range(0, 24, 4)
    ]
    assert scores.score[::4].tolist() == pytest.approx(expected, abs=1e-5)


def test_several_prompts_give_the_mean_of_each_and_the_change_of_confidence_is_that_of_a_hooked_model() -> None:
    model, site = tiny_model(), "resid_post.0"
    sae = random_sae(D_MODEL, 12)
    prompts = ("abc", "the quick")
    alone = [output_scores(model, sae, site=site, options=OutputOptions(prompt, k=5)) for prompt in prompts]
    both = output_scores(model, sae, site=site, options=OutputOptions(prompts, k=5))
    assert both.by_prompt.shape == (2, 12)
    assert torch.equal(both.by_prompt, torch.stack([one.score for one in alone]))
    torch.testing.assert_close(both.score, (alone[0].score + alone[1].score) / 2)
    torch.testing.assert_close(both.delta, (alone[0].delta + alone[1].delta) / 2)
    assert not torch.allclose(alone[0].score, alone[1].score)
    edit = Intervention.at(site, SAEAddMax(sae, sae.W_dec[3], 10.0), Last())
    expected = []
    for prompt in prompts:
        plain = float(confidence(model.logits(prompt)))
        with model.plan(edit):
            expected.append(float(confidence(model.logits(prompt))) - plain)
    assert float(both.confidence[3]) == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert abs(expected[0]) > 1e-3


def test_no_prompt_or_an_empty_one_is_refused() -> None:
    for wrong in ((), ("abc", "")):
        with pytest.raises(InvalidInputError, match="at least one text"):
            OutputOptions(wrong)
