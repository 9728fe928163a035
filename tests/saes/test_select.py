from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.saes.kernels import select
from workbench.saes.kernels.select import Encoder, Ranking, select_above, select_batch_topk, select_topk, topk_indices
from workbench.saes.kernels.sparse import SparseActs
from workbench.saes.kernels.weights import SAEWeights

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def make_weights(d: int, m: int, *, bias: float = 0.0, dtype: torch.dtype = torch.float64) -> SAEWeights:
    g = torch.Generator().manual_seed(0)
    W_enc, W_dec, b_enc, b_dec = (torch.randn(*s, generator=g, dtype=dtype) for s in ((m, d), (m, d), (m,), (d,)))
    return SAEWeights(W_enc / d**0.5, bias + 0.3 * b_enc, W_dec / d**0.5, b_dec)


def make_x(n: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=dtype)


def chosen_values(pre: Tensor, k: int) -> Tensor:
    found = topk_indices(pre, k)
    assert all(len(set(row)) == k for row in found.tolist())
    return pre.gather(1, found).float().sort(dim=1).values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "k"), [(1024, 6), (1040, 32), (1031, 6), (1031, 65), (100, 6), (24, 24), (2048, 1)])
def test_top_k_is_that_of_torch_to_the_bit(dtype: torch.dtype, width: int, k: int) -> None:
    pre = torch.randn(37, width, generator=torch.Generator().manual_seed(4)).to(dtype)
    pre[0] = 1.0
    pre[1, : width - k // 2 - 1] = float("-inf")
    pre[2] = float("-inf")
    pre[3, ::7] = float("inf")
    pre[4, :] = pre[4, :1]
    assert torch.equal(chosen_values(pre, k), pre.float().topk(k).values.sort(dim=1).values)


@pytest.mark.parametrize("column", [7, 4607])
def test_one_nan_in_one_wide_row_is_found(column: int) -> None:
    for seed in range(20):
        pre = torch.randn(1, 4608, generator=torch.Generator().manual_seed(seed))
        pre[0, column] = float("nan")
        assert column in topk_indices(pre, 32)[0].tolist()


def test_nan_counts_as_largest_in_narrow_and_wide_rows() -> None:
    for width in (50, 2048):
        pre = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
        pre[2, 7] = float("nan")
        pre[3] = float("nan")
        found = topk_indices(pre, 3)
        assert 7 in found[2]
        assert len(set(found[3].tolist())) == 3


def test_bits_of_bf16_are_compared_only_where_they_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor | None] = []
    real = select._topk_above_bound

    def seen(pre: Tensor, k: int, least: int | None = None) -> Tensor | None:
        found = real(pre, k, least)
        taken.append(found if pre.dtype == torch.int16 else None)
        return found

    monkeypatch.setattr(select, "_topk_above_bound", seen)
    pre = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    signed_nan = pre.clone()
    signed_nan.view(torch.int16)[5, 9] = -64
    assert torch.isnan(signed_nan[5, 9])
    few = pre.clone()
    few[3, 40:] = -few[3, 40:].abs()
    few[3, :40] = -1.0
    few[3, 7] = 2.0
    for case, quick in ((pre, True), (signed_nan, False), (few, False)):
        taken.clear()
        found = topk_indices(case, 8)
        assert any(one is not None for one in taken) == quick
        wanted = case.float().nan_to_num(nan=torch.inf).topk(8).values.sort(1).values
        assert torch.equal(case.float().nan_to_num(nan=torch.inf).gather(1, found).sort(1).values, wanted)


def test_a_bound_from_groups_alone_would_not_be_exact() -> None:
    """The k largest may share one group: taking one per group is wrong, which this case tells apart."""
    pre = torch.zeros(1, 1024)
    pre[0, [0, 64, 128]] = torch.tensor([5.0, 4.0, 3.0])  # the same strided group of 64
    pre[0, 1] = 1.0
    assert sorted(topk_indices(pre, 3)[0].tolist()) == [0, 64, 128]


@pytest.mark.parametrize("by_norm", [False, True])
def test_chosen_values_have_the_precision_of_the_data(by_norm: bool) -> None:
    weights, x = make_weights(32, 1031), make_x(70, 32)
    acts = select_topk(weights, x, 8, Ranking(torch.bfloat16, by_norm))
    pre = (x @ weights.W_enc.T + weights.b_enc).relu()
    torch.testing.assert_close(acts.values, pre[acts.rows(), acts.indices], rtol=1e-12, atol=1e-12)
    exact = select_topk(weights, x, 8, Ranking(torch.float64, by_norm))
    same = (acts.dense() > 0) == (exact.dense() > 0)
    assert 0.97 < float(same.double().mean()) < 1, "bf16 ranks a few features otherwise"


def test_ranking_by_norm_takes_large_decoders_and_survives_a_zero_one() -> None:
    weights, x = make_weights(16, 40), make_x(30, 16)
    weights.W_dec[5] *= 1000
    weights.W_dec[6] = 0
    acts = select_topk(weights, x, 4, Ranking(torch.float64, True))
    pre = x @ weights.W_enc.T + weights.b_enc
    assert torch.equal(acts.dense()[:, 5] > 0, pre[:, 5] > 0)
    assert not (acts.dense()[:, 6] > 0).any()
    assert acts.values.isfinite().all()


def expected_batch(pre: Tensor, count: int) -> Tensor:
    order = pre.flatten().sort(descending=True, stable=True).indices[:count]
    mask = torch.zeros(pre.numel(), dtype=torch.bool)
    mask[order] = True
    return pre * (mask.view_as(pre) & (pre > 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("start", [None, 0.1, 1.2, 1.6, 50.0])
@pytest.mark.parametrize("count", [1, 600, 2000])
def test_batch_top_k_keeps_exactly_the_largest_wherever_the_search_begins(
    dtype: torch.dtype, start: float | None, count: int
) -> None:
    weights, x = make_weights(16, 64), make_x(600, 16)
    acts = select_batch_topk(weights, x, count, Ranking(dtype), start)
    assert int((acts.values > 0).sum()) == count
    expected = expected_batch(x @ weights.W_enc.T + weights.b_enc, count)
    torch.testing.assert_close(acts.dense(), expected, rtol=1e-12, atol=1e-12)


def test_batch_top_k_keeps_all_positive_ones_if_there_are_too_few() -> None:
    weights, x = make_weights(16, 64, bias=-5.0), make_x(300, 16)
    pre = x @ weights.W_enc.T + weights.b_enc
    n_positive = int((pre > 0).sum())
    assert 0 < n_positive < 3000
    acts = select_batch_topk(weights, x, 3000, Ranking(torch.float64), 2.0)
    torch.testing.assert_close(acts.dense(), pre.relu(), rtol=1e-12, atol=1e-12)


def test_of_equal_activations_the_first_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, x = make_weights(8, 20), make_x(2, 8).repeat(150, 1)
    pre = x @ weights.W_enc.T + weights.b_enc
    expected = expected_batch(pre, 777).nonzero()
    for factor in (select.POOL_FACTOR, 1):
        monkeypatch.setattr(select, "POOL_FACTOR", factor)
        acts = select_batch_topk(weights, x, 777, Ranking(torch.float64))
        assert torch.equal(torch.stack([acts.rows(), acts.indices], 1), expected)


def test_bf16_search_refines_its_candidates() -> None:
    weights, x = make_weights(32, 512, dtype=torch.float32), make_x(300, 32, torch.float32)
    exact = select_batch_topk(weights, x, 2400, Ranking(torch.float32))
    rough = select_batch_topk(weights, x, 2400, Ranking(torch.bfloat16), float(exact.values.min()))
    assert int(((rough.dense() > 0) != (exact.dense() > 0)).sum()) <= 4
    torch.testing.assert_close(rough.values.min(), exact.values.min(), rtol=1e-3, atol=0)


def test_entries_above_a_cut_per_feature() -> None:
    weights, x = make_weights(16, 50), make_x(300, 16)
    cut = torch.linspace(-0.1, 3, 50, dtype=torch.float64)
    pre = x @ weights.W_enc.T + weights.b_enc
    found = select_above(Encoder(weights, x, Ranking(torch.float64)), cut)
    assert found is not None
    torch.testing.assert_close(found.dense(), pre * (pre > cut), rtol=1e-12, atol=1e-12)
    assert select_above(Encoder(weights, x, Ranking(torch.float64)), cut, limit=2) is None


@pytest.mark.parametrize("k", [0, 41])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(InvalidInputError, match="d_sae=40"):
        select_topk(make_weights(16, 40), make_x(3, 16), k)


def ragged() -> tuple[SparseActs, Tensor]:
    dense = torch.randn(9, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dense[dense < 1] = 0
    dense[4] = 0
    dense[:, 11] = 0
    return SparseActs.of_dense(dense), dense


def test_products_with_ragged_rows_and_empty_lists_equal_dense_ones() -> None:
    acts, dense = ragged()
    W, x = make_x(30, 5), make_x(9, 5)
    torch.testing.assert_close(acts.dense(), dense)
    torch.testing.assert_close(acts.decode(W), dense @ W)
    torch.testing.assert_close(acts.products(x, W), (x @ W.T)[dense != 0])
    lists = acts.by_feature()
    torch.testing.assert_close(lists.weighted_sum(acts.values, x), dense.T @ x)
    torch.testing.assert_close(lists.sum(acts.values), dense.sum(0))
    torch.testing.assert_close(acts.between(7, 19).dense(), dense[:, 7:19])


def test_products_in_a_dtype_without_a_sparse_kernel() -> None:
    acts, dense = ragged()
    W, x = make_x(30, 5).bfloat16(), make_x(9, 5).bfloat16()
    torch.testing.assert_close(acts.products(x, W).float(), (x.float() @ W.float().T)[dense != 0], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("size", [300, 2**16 + 70_000])
def test_features_are_ordered_stably_beyond_16_bits(size: int) -> None:
    indices = torch.randint(0, size, (5000,), generator=torch.Generator().manual_seed(0))
    indices[::3] = indices[0]
    acts = SparseActs(torch.tensor([0, 5000]), indices, torch.ones(5000), size)
    lists = acts.by_feature()
    assert torch.equal(lists.order, torch.from_numpy(np.argsort(indices.numpy(), kind="stable")))
    assert torch.equal(lists.offsets.diff(), torch.bincount(indices, minlength=size))
