from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.saes.handmade import relu_sae
from tests.tiny import D_MODEL, tiny_model, tiny_tokenizer
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.records import to_jsonable
from workbench.models.model import Model
from workbench.saes.comparison.faithful import (
    FakeFeatureOptions,
    common_site,
    fake_features,
    firing_rates,
    quality,
    random_rows,
    seed_difference,
    verdict,
)
from workbench.saes.evaluation.evaluate import EvalOptions

SITE = "resid_post.1"
SMALL = FakeFeatureOptions(tokens=400, context=10, batch_rows=7)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _text(n: int = 20) -> Tensor:
    """Rows of two tokens only, beside the start token."""
    ids = torch.randint(40, 42, (n, 10), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = tiny_tokenizer().bos_token_id
    return ids


def _random(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed))


def test_the_ratio_is_0_for_features_that_never_fire_and_1_for_those_that_always_do(model: Model) -> None:
    saes = {
        name: relu_sae(model, _random(6), torch.full((6,), bias), tied=False)
        for name, bias in (("never", -1.0), ("always", 1.0))
    }
    found = fake_features(model, saes, _text(), options=SMALL)
    for tau in ("0.001", "0.01", "0.1"):
        assert found["never"].ratio[tau].value == 0 and found["always"].ratio[tau].value == 1
        assert found["always"].alive_ratio[tau].value == 1
    assert found["always"].more_on_random.value == 0.5, "always on both: as often"
    assert found["never"].more_on_random.n == 0
    assert found["never"].alive == 0 and found["never"].alive_ratio["0.1"].n == 0
    json.dumps([part.to_json() for part in found.values()])
    assert [part.section().metrics["alive"] for part in found.values()] == [0, 6]


def test_the_ratio_counts_features_above_the_threshold_on_kept_random_tokens(model: Model) -> None:
    sae = relu_sae(model, _random(30), -torch.linspace(0, 40, 30))
    found = fake_features(model, {"a": sae}, _text(), options=SMALL)["a"]
    rates = []
    for seed in range(3):
        rows = random_rows(model, 400, 10, seed)
        x = torch.cat([model.capture(part, [SITE])[SITE] for part in rows.split(7)])
        rule = TokenPolicy.estimate(model.capture(_text()[:7], [SITE])[SITE], _text()[:7], (0, 1))
        assert bool((x.norm(dim=-1) < rule.max_norm).all())
        rates.append((sae.encode(x[:, 1:].flatten(0, 1)) > 0).double().mean(0))
    for tau in (1e-3, 1e-2, 0.1):
        shares = [float((rate > tau).double().mean()) for rate in rates]
        assert [seed[str(tau)] for seed in found.per_seed] == pytest.approx(shares)
        assert found.ratio[str(tau)].value == pytest.approx(sum(shares) / 3)
    assert 0 < found.ratio["0.1"].value < found.ratio["0.001"].value < 1
    text = model.capture(_text(), [SITE])[SITE][:, 1:].flatten(0, 1)
    on_text = (sae.encode(text) > 0).double().mean(0)
    alive = on_text > 0
    assert found.alive == int(alive.sum()) and found.text_tokens == 180 and found.random_tokens == (360,) * 3
    expected = torch.stack([(rate > 0.1)[alive] for rate in rates]).double().mean()
    assert found.alive_ratio["0.1"].value == pytest.approx(float(expected))
    assert found.more_on_random.n == int((alive | (torch.stack(rates) > 0).any(0)).sum())


@pytest.mark.parametrize("n", [40, 400, 4000])
def test_text_of_the_random_distribution_shows_no_difference_however_much_of_it_there_is(model: Model, n: int) -> None:
    sae = relu_sae(model, _random(400), -torch.linspace(0, 14, 400))
    found = fake_features(model, {"a": sae}, random_rows(model, n, 10, seed=99), options=SMALL)["a"]
    assert found.more_on_random.value == pytest.approx(0.5, abs=0.05)
    assert "0.5 if both are alike" in found.findings()[0]
    rare = fake_features(model, {"a": sae}, _text(n // 10), options=SMALL)["a"]
    assert rare.more_on_random.low > 0.53, "rows of two tokens, on which many features never fire"


def test_the_rule_of_an_sae_from_elsewhere_is_that_of_the_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, seen = relu_sae(model, _random(4), torch.zeros(4)), []
    monkeypatch.setattr(TokenPolicy, "mask", lambda self, x, _: seen.append(self) or torch.ones(x.shape[:2]).bool())
    for batch_rows in (1, 7):
        fake_features(model, {"a": sae}, _text(), options=replace(SMALL, batch_rows=batch_rows))
    assert len(seen) > 20 and len(set(seen)) == 1


def test_random_rows_are_uniform_over_ordinary_tokens_after_a_start_token(model: Model) -> None:
    tokenizer = tiny_tokenizer()
    rows = random_rows(model, 20_000, 20, 0)
    assert rows.shape == (1000, 20) and bool((rows[:, 0] == tokenizer.bos_token_id).all())
    rest = rows[:, 1:]
    assert not torch.isin(rest, torch.tensor(tokenizer.all_special_ids)).any()
    counts = torch.bincount(rest.flatten(), minlength=258)[2:]
    assert int(counts.min()) > 30 and int(counts.max()) < 140, "19,000 tokens over 256 ids"
    assert torch.equal(rows, random_rows(model, 20_000, 20, 0))
    assert not torch.equal(rows, random_rows(model, 20_000, 20, 1))


def test_rates_do_not_depend_on_how_rows_are_batched(model: Model) -> None:
    sae = relu_sae(model, _random(30), -torch.linspace(0, 12, 30))
    sae.cfg.metadata["workbench"] = {"keep": {"max_norm": 1e6, "special_ids": [0, 1]}}
    one, n = firing_rates(model, {"a": sae}, _text(), batch_rows=1)
    whole, m = firing_rates(model, {"a": sae}, _text(), batch_rows=64)
    torch.testing.assert_close(one["a"], whole["a"], atol=2 / 180, rtol=0)
    assert n == m == {"a": 180}
    sae.cfg.metadata["workbench"] = {"keep": {"max_norm": 1e-6, "special_ids": [0, 1]}}
    with pytest.raises(DegenerateInputError, match="no token is kept for a"):
        firing_rates(model, {"a": sae}, _text())


def test_saes_of_different_sites_or_models_are_refused(model: Model) -> None:
    here = relu_sae(model, _random(4), torch.zeros(4))
    there = relu_sae(model, _random(4), torch.zeros(4), site="resid_post.0")
    with pytest.raises(MismatchError, match="different sites"):
        common_site(model, {"a": here, "b": there})
    with pytest.raises(MismatchError, match="trained on"):
        fake_features(tiny_model(seed=3), {"a": here}, _text(), options=SMALL)
    with pytest.raises(DegenerateInputError, match="no SAE"):
        fake_features(model, {}, _text())
    for bad in ({"taus": (1.0,)}, {"seeds": 0}, {"tokens": 5}):
        with pytest.raises(InvalidInputError):
            FakeFeatureOptions(**bad)


def test_quality_of_a_perfect_sae_and_of_one_that_returns_next_to_nothing(model: Model) -> None:
    options = EvalOptions(max_rows=8, batch_rows=3)
    W = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    perfect = quality(model, relu_sae(model, W, torch.zeros(len(W))), _text(), options=options)
    empty = quality(model, relu_sae(model, 1e-5 * W, torch.zeros(len(W))), _text(), options=options)
    assert perfect.fvu.value == pytest.approx(0, abs=1e-6) and perfect.ev_scalar.value == pytest.approx(1)
    assert perfect.ce_kept.value == pytest.approx(0, abs=1e-4) and perfect.l2.value == pytest.approx(0, abs=1e-8)
    assert empty.recovered.value == pytest.approx(0, abs=1e-3)
    assert empty.ce_sinks.value != pytest.approx(empty.ce_kept.value), "the first token is spliced as well"
    x = model.capture(_text()[:8], [SITE])[SITE]
    assert empty.l2.value == pytest.approx(float(x.square().mean()), rel=1e-5), "the mean over elements"
    assert empty.l2.n == 8 and empty.tokens == 72


def test_differences_over_seeds_are_welch_intervals() -> None:
    from scipy.stats import ttest_ind

    a, b = [0.31, 0.35, 0.30], [0.21, 0.25, 0.29]
    found = seed_difference(a, b)
    low, high = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert verdict(found) == "not clearly different"
    assert verdict(seed_difference([0.31, 0.32, 0.30], [0.11, 0.12, 0.13])) == "more"
    assert verdict(seed_difference([0.11, 0.12, 0.13], [0.31, 0.32, 0.30])) == "less"
    assert verdict(seed_difference([1.0, 1.0], [1.0, 1.0])) == "not clearly different"
    saturated = seed_difference([1.0, 1.0, 1.0], [0.998, 0.998, 0.998])
    assert verdict(saturated) == "not clearly different", "three equal seeds don't show that a fourth is equal"
    assert saturated.value == pytest.approx(0.002) and saturated.high == math.inf
    assert "inf" in json.dumps(to_jsonable(saturated))
    with pytest.raises(DegenerateInputError, match="1 and 3 seeds"):
        seed_difference([1.0], b)
