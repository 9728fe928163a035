from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.features.cards import neighbours
from workbench.features.cards.neighbours import NeighbourOptions, activation_neighbours, decoder_neighbours
from workbench.features.passes.coactivation import CoSample


def sample_of(acts: Tensor) -> CoSample:
    token, feature = acts.nonzero(as_tuple=True)
    return CoSample(
        token=token,
        feature=feature,
        value=acts[token, feature],
        n_tokens=len(acts),
        share=1.0,
        n_features=acts.shape[1],
    )


def sparse_acts(tokens: int = 600, features: int = 20) -> Tensor:
    random = torch.Generator().manual_seed(0)
    acts = torch.rand(tokens, features, generator=random) * (torch.rand(tokens, features, generator=random) < 0.1)
    acts[:, 7] = 2 * acts[:, 3]
    acts[:, 11] = acts[:, 3] * (torch.rand(tokens, generator=random) < 0.5)
    return acts


@pytest.mark.parametrize("block_entries", [2**22, 40])
def test_correlations_and_overlaps_equal_dense_ones(monkeypatch: pytest.MonkeyPatch, block_entries: int) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_ENTRIES", block_entries)
    acts = sparse_acts()
    found = activation_neighbours(sample_of(acts), torch.arange(100, 120), NeighbourOptions(n=4))
    exact = torch.corrcoef(acts.double().T).fill_diagonal_(-2)
    fires = (acts > 0).double()
    together = fires.T @ fires
    for i, near in enumerate(found):
        assert len(near) == 4
        values = exact[i].masked_fill(together[i] == 0, -2).topk(4).values
        assert [n.value for n in near] == pytest.approx(values.tolist())
        for n in near:
            j = n.feature - 100
            assert n.value == pytest.approx(float(exact[i, j]))
            assert n.jaccard == pytest.approx(float(together[i, j] / (fires[:, i] + fires[:, j] > 0).sum()))
    assert found[3][0].feature == 107
    assert found[3][0].value == pytest.approx(1.0)
    assert found[3][0].jaccard == 1.0
    assert 0.4 < (found[3][1].jaccard or 0) < 0.6


def test_the_null_is_what_shuffled_tokens_give() -> None:
    acts = sparse_acts(tokens=2000)
    found = activation_neighbours(sample_of(acts), torch.arange(20))
    null = found[0][0].null
    assert 0.02 < null < 0.2
    assert {n.null for near in found for n in near} == {null}
    assert found[3][0].value > 5 * null
    chance = sorted(found[i][0].value for i in range(20) if i not in (3, 7, 11))
    assert chance[len(chance) // 2] < 1.5 * null


def test_features_that_fire_too_rarely_are_not_compared() -> None:
    acts = torch.zeros(100, 3)
    acts[5, :2] = 1.0
    acts[:50, 2] = 1.0
    assert activation_neighbours(sample_of(acts), torch.arange(3)) == [(), (), ()]
    twins = activation_neighbours(sample_of(acts), torch.arange(3), NeighbourOptions(min_fired=1))
    assert twins[0][0].feature == 1
    with pytest.raises(InvalidInputError):
        NeighbourOptions(min_fired=0)


def test_an_empty_sample_has_no_neighbours() -> None:
    assert activation_neighbours(sample_of(torch.zeros(0, 3)), torch.arange(3)) == [(), (), ()]


def test_decoder_neighbours_are_the_largest_cosines_among_all_rows() -> None:
    W = torch.randn(60, 16, generator=torch.Generator().manual_seed(1))
    W[40] = 3 * W[2] + 0.1 * W[3]
    W[41] = -W[2]
    (near,) = decoder_neighbours(W, torch.tensor([2]), NeighbourOptions(n=3))
    unit = W / W.norm(dim=1, keepdim=True)
    exact = (unit[2] @ unit.T).index_fill(0, torch.tensor([2]), -2).topk(3)
    assert [n.feature for n in near] == exact.indices.tolist()
    assert near[0].feature == 40, "the opposite direction is no neighbour"
    assert [n.value for n in near] == pytest.approx(exact.values.tolist(), abs=1e-6)
    assert near[0].jaccard is None


def test_a_row_of_zeros_has_no_neighbours_and_is_nobodys() -> None:
    W = -torch.eye(6)[:3].repeat(2, 1)
    W[1], W[4] = 0.0, 0.0
    found = decoder_neighbours(W, torch.arange(6), NeighbourOptions(n=5))
    assert [near[0].feature if near else None for near in found] == [3, None, 5, 0, None, 2]
    assert [len(near) for near in found] == [3, 0, 3, 3, 0, 3]
    assert not {1, 4} & {n.feature for near in found for n in near}
    assert decoder_neighbours(W * 0, torch.tensor([0])) == [()]


def test_the_decoder_null_depends_on_width_and_holds_outlier_dimensions() -> None:
    random = torch.Generator().manual_seed(2)
    narrow, wide = (torch.randn(80, d, generator=random) for d in (4, 256))
    nulls = [decoder_neighbours(W, torch.tensor([0]))[0][0].null for W in (narrow, wide)]
    assert nulls[0] > 0.9 > 0.5 > nulls[1]
    wide[:, 0] += 60
    assert decoder_neighbours(wide, torch.tensor([0]))[0][0].null > 0.9, "random directions alone would not say so"
