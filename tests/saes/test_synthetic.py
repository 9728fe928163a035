from __future__ import annotations

import itertools

import pytest
import torch

from workbench.bases.base import Dictionary
from workbench.bases.sae import as_basis
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.core.metrics import matched_cosine, mean_max_cosine
from workbench.saes.evaluation.synthetic import SyntheticOptions, SyntheticTruth, evaluate_on_synthetic
from workbench.saes.formats.load import sae_lens_module

EASY = SyntheticTruth.make(SyntheticOptions(n_features=12, d_in=16, mean_active=2.0))


@pytest.mark.parametrize("seed", range(4))
def test_mcc_and_mmcs_equal_brute_force(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g)
    cosine = [[float(torch.dot(u, v) / (u.norm() * v.norm())) for v in b] for u in a]
    best = max(sum(cosine[i][p[i]] for i in range(6)) for p in itertools.permutations(range(6))) / 6
    assert matched_cosine(a, b) == pytest.approx(best, abs=1e-6)
    assert mean_max_cosine(a, b) == pytest.approx(sum(map(max, cosine)) / 6, abs=1e-6)
    assert matched_cosine(a, -a) < 0.9, "signed"
    assert matched_cosine(a, 3 * a[[5, 2, 0, 1, 4, 3]]) == pytest.approx(1, abs=1e-6)
    assert matched_cosine(a, a[:3]) == pytest.approx(0.5, abs=1e-6)


def test_the_oracle_is_perfect_where_features_do_not_overlap_and_the_random_sae_is_not() -> None:
    report = evaluate_on_synthetic(EASY.oracle(), EASY, n_tokens=3000)
    s, random = report.scores, report.controls["random SAE"]
    assert (s.mmcs.value, s.mcc.value, s.f1.value) == pytest.approx((1, 1, 1), abs=1e-5)
    assert s.fvu < 1e-8
    assert s.shrinkage == pytest.approx(1, abs=1e-4)
    assert s.l0 == pytest.approx(2, abs=0.2)
    assert s.dead == 0
    assert random.mmcs.value < 0.7 and random.mcc.value < s.mcc.value - 0.3
    assert random.f1.value < 0.7
    assert "a random one" in report.findings()[0]
    assert len(report.section().blocks[0].rows) == 9  # type: ignore[union-attr]


def test_defects_show_in_the_number_that_is_theirs() -> None:
    D = EASY.directions
    oracle = EASY.oracle()
    half = Dictionary.of(oracle.encode, 0.5 * D)
    assert evaluate_on_synthetic(half, EASY, n_tokens=2000).scores.shrinkage == pytest.approx(0.5, abs=1e-4)

    def deaf(x: torch.Tensor) -> torch.Tensor:
        acts = oracle.encode(x)
        acts[:, 0] = 0
        return acts

    s = evaluate_on_synthetic(Dictionary.of(deaf, D), EASY, n_tokens=2000).scores
    assert s.dead == pytest.approx(1 / 12)
    assert s.recall.value == pytest.approx(11 / 12)
    assert s.mcc.value == pytest.approx(1, abs=1e-5), "the direction is there"
    eager = Dictionary.of(lambda x: oracle.encode(x) + 1e-6, D)
    s = evaluate_on_synthetic(eager, EASY, n_tokens=2000).scores
    assert s.recall.value == 1
    assert s.precision.value == pytest.approx(2 / 12, abs=0.03)


def test_codes_are_reproducible_positive_and_as_sparse_as_asked() -> None:
    truth = SyntheticTruth.make()
    codes = truth.codes(4000, seed=3)
    assert torch.equal(codes, truth.codes(4000, seed=3))
    assert not torch.equal(codes, truth.codes(4000, seed=4))
    on = codes[codes > 0]
    assert float(on.min()) >= 0.5 and float(on.max()) <= 1.5
    assert float((codes > 0).sum(1).double().mean()) == pytest.approx(4, abs=0.15)


def test_any_sae_of_sae_lens_is_accepted_and_another_width_refused() -> None:
    lens = sae_lens_module()
    sae = lens.StandardSAE(lens.StandardSAEConfig(d_in=16, d_sae=20))
    assert evaluate_on_synthetic(sae, EASY, n_tokens=500).scores.mmcs.value < 0.9
    with pytest.raises(ShapeError, match="width 16"):
        evaluate_on_synthetic(sae, SyntheticTruth.make(), n_tokens=100)
    with pytest.raises(InvalidInputError):
        SyntheticOptions(low=2.0)
    with pytest.raises(InvalidInputError, match="not an SAE"):
        as_basis("path")
