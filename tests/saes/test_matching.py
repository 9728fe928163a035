from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.saes.comparison.matching import CoActivation, MatchOptions, match_by_activations
from workbench.saes.comparison.shared import shared_features


def _random(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


class ToySAE:
    """ReLU features with tied weights."""

    def __init__(self, W: Tensor, bias: float = -1.0) -> None:
        self.W_dec, self.W_enc, self.bias = W, W.T, bias

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.W_enc + self.bias).relu()


def test_the_ratio_of_a_dictionary_with_itself_is_1_and_with_its_mirror_0() -> None:
    a = _random(64, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    same = shared_features(a, a)
    assert same.ratio.value == same.top1.value == 1.0 and same.method == "exact"
    assert shared_features(a, 3 * a[order]).ratio.value == 1.0
    assert shared_features(a, -a).ratio.value == 0.0, "the cosine is signed"
    half = torch.cat([a[:32], -a[32:]])
    assert shared_features(a, half).ratio.value == 0.5


def test_random_dictionaries_of_the_usual_size_share_nothing() -> None:
    found = shared_features(_random(4096, 576), _random(4096, 576, 1), draws=1)
    assert found.ratio.value == found.top1.value == 0.0
    assert found.overlap.verdict == "no better than null"


def test_the_top1_ratio_counts_partners_twice_and_the_ratio_does_not() -> None:
    a = torch.eye(4, 8)
    twins = a[[0, 0, 0, 0]] + 0.01 * _random(4, 8)
    found = shared_features(twins, a)
    assert found.top1.value == 1.0 and found.ratio.value == 0.25


def test_encoder_and_decoder_are_told_apart() -> None:
    a, b = ToySAE(_random(20, 8)), ToySAE(_random(20, 8))
    b.W_enc = _random(20, 8, 5).T
    assert shared_features(a, b).ratio.value == 1.0
    assert shared_features(a, b, which="encoder").ratio.value < 0.5
    with pytest.raises(ShapeError, match="width 8 and 5"):
        shared_features(a, _random(20, 5))


def test_a_report_puts_the_nulls_beside_the_ratio() -> None:
    section = shared_features(_random(30, 4), _random(30, 4, 1)).section()
    table, _ = section.blocks
    assert [row[0].split()[0] for row in table.rows] == ["these", *["random"] * 3, *["permuted"] * 3]
    assert table.rows[1][2].value > 0, "in four dimensions chance reaches the threshold"
    assert "no better than null" in section.findings[0]
    assert {"sfr", "top1", "mean_max_cosine"} <= section.metrics.keys()


def test_streamed_correlations_are_those_of_the_whole() -> None:
    a, b = _random(300, 5).relu(), _random(300, 7, 1).relu()
    b[:, 2] = a[:, 3] * 2
    b[:, 6] = 0
    sums = CoActivation(5, 7)
    for start in range(0, 300, 64):
        sums.add(a[start : start + 64], b[start : start + 64])
    found = sums.result()
    expected = np.nan_to_num(np.corrcoef(a.double().T.numpy(), b.double().T.numpy()[:6])[:5, 5:])
    np.testing.assert_allclose(found.correlation.toarray()[:, :6], expected, atol=1e-9)
    assert not found.correlation.toarray()[:, 6].any()
    both = ((a > 0).float().T @ (b > 0).float()) / ((a[:, :, None] > 0) | (b[:, None, :] > 0)).sum(0).clamp_min(1)
    np.testing.assert_allclose(found.jaccard.toarray(), both.numpy(), atol=1e-6)
    assert torch.equal(found.fired_b, (b > 0).sum(0))
    values, partners = found.best()
    assert float(values[3]) == pytest.approx(1.0) and int(partners[3]) == 2
    assert int(found.assignment().columns[3]) == 2
    with pytest.raises(ShapeError, match=r"\(5, 7\) features"):
        sums.add(a[:4], b[:4, :6])
    with pytest.raises(DegenerateInputError, match="0 tokens"):
        CoActivation(1, 1).result()


def test_a_permuted_sae_matches_by_activations_and_an_independent_one_does_not() -> None:
    W = _random(48, 16)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    x = _random(3000, 16, 2)
    same = match_by_activations(ToySAE(W), ToySAE(W[order]), [x[:1000], x[1000:]])
    assert same.correlation.value == pytest.approx(1.0) and same.shared.value == same.jaccard.value == 1.0
    assert same.null.value < 0.2 and same.null_shared.value == 0.0 and same.better
    assert same.n_tokens == 3000
    split = torch.cat([W[:, :8], torch.zeros(48, 8)], 1), torch.cat([torch.zeros(48, 8), W[:, 8:]], 1)
    apart = match_by_activations(ToySAE(split[0], -0.5), ToySAE(split[1], -0.5), [x])
    assert apart.verdict == "no better than null" and apart.shared.value == 0.0
    assert "no better than null" in apart.findings()[0]
    json.dumps(apart.to_json())
    assert {"correlation", "jaccard"} <= apart.section().metrics.keys()


def test_a_scaled_space_changes_cosines_and_not_the_match_by_activations() -> None:
    W, stretch = _random(48, 16), torch.logspace(-1.5, 1.5, 16)
    x = _random(2000, 16, 2)
    twin = SimpleNamespace(W_dec=W * stretch, W_enc=(W / stretch).T, encode=lambda y: ToySAE(W).encode(y))
    assert shared_features(ToySAE(W), twin).ratio.value < 0.9
    assert match_by_activations(ToySAE(W), twin, [x]).shared.value == 1.0


def test_features_that_fired_once_together_are_not_called_the_same() -> None:
    acts = torch.zeros(200, 2)
    acts[5, 0] = acts[5, 1] = 1.0
    acts[::2, 1] += 0
    first = SimpleNamespace(encode=lambda x: torch.cat([x[:, :1], x[:, 1:2]], 1))
    acts[::3, 1] = 1.0
    found = match_by_activations(first, first, [acts])
    assert found.alive == 1 and found.d_sae == 2
    with pytest.raises(DegenerateInputError, match="fired on 100"):
        match_by_activations(first, first, [acts], options=MatchOptions(min_fired=100))
    with pytest.raises(DegenerateInputError, match="no activations"):
        match_by_activations(first, first, [])


def test_saes_of_another_width_are_named() -> None:
    right, wrong, x = ToySAE(_random(12, 6)), ToySAE(_random(12, 5)), _random(40, 6)
    with pytest.raises(ShapeError, match=r"b reads d_in=5, and the activations have shape \(40, 6\)"):
        match_by_activations(right, wrong, [x])
    with pytest.raises(ShapeError, match="a reads d_in=6"):
        match_by_activations(right, right, [x[:, :3]])


def test_no_more_tokens_are_read_than_asked_for() -> None:
    W = _random(8, 4)
    blocks = [_random(700, 4, i) for i in range(4)]
    assert match_by_activations(ToySAE(W), ToySAE(W), blocks, options=MatchOptions(max_tokens=1500)).n_tokens == 1500
