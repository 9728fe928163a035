from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.errors import InvalidInputError, ShapeError
from workbench.saes.kernels import AuxTask, encode_sparse, topk_indices, topk_step
from workbench.saes.weights import SAEWeights

Gradients = list[Tensor]


def _weights(d: int, m: int, bias: float = 0.0, seed: int = 0) -> SAEWeights:
    g = torch.Generator().manual_seed(seed)
    W_enc, W_dec = (torch.randn(m, d, generator=g) / d**0.5 for _ in range(2))
    return SAEWeights(W_enc, bias + 0.3 * torch.randn(m, generator=g), W_dec, torch.randn(d, generator=g))


def dense_oracle(
    weights: SAEWeights, x: Tensor, indices: Tensor, aux: AuxTask | None = None
) -> tuple[Tensor, Tensor, Gradients]:
    """Losses and gradients by dense autograd in fp64, for a given choice of features."""
    leaves = [t.detach().double().requires_grad_() for t in weights.tensors()]
    W_enc, b_enc, W_dec, b_dec = leaves
    pre = (x.double() - b_dec) @ W_enc.T + b_enc
    acts = torch.zeros_like(pre).scatter(1, indices, pre.gather(1, indices).relu())
    error = acts @ W_dec + b_dec - x.double()
    loss = error.square().sum() / len(x)
    aux_loss = loss.new_zeros(())
    if aux is not None:
        residual, dead = -error.detach(), pre[:, aux.dead]
        if aux.k < len(aux.dead):
            top = dead.topk(aux.k)
            dead = torch.zeros_like(dead).scatter(1, top.indices, top.values)
        variance = (residual - residual.mean(0)).square().sum()
        aux_loss = aux.coefficient * (dead.relu() @ W_dec[aux.dead] - residual).square().sum() / variance
    (loss + aux_loss).backward()
    return loss.detach(), aux_loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


CASES = {
    "plain": (300, 32, 1024, 8, 0.0),
    "fewer than k positive": (300, 32, 1024, 8, -3.0),
    "batch not a multiple of the chunk": (257, 16, 128, 4, 0.0),
    "width not a multiple of the group": (20, 16, 1031, 4, 0.0),
    "one feature": (40, 16, 64, 1, 0.0),
    "all features": (40, 16, 24, 24, 0.0),
    "one row": (1, 16, 64, 4, 0.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_aux", [False, True])
@pytest.mark.parametrize("by_norm", [False, True])
def test_gradients_equal_dense_autograd(case: str, with_aux: bool, by_norm: bool) -> None:
    n, d, m, k, bias = CASES[case]
    weights = _weights(d, m, bias)
    x = 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    aux = AuxTask(torch.arange(0, m, 3), 5, 1.0) if with_aux else None
    indices = encode_sparse(weights, x, k, by_decoder_norm=by_norm).indices
    loss, aux_loss, expected = dense_oracle(weights, x, indices, aux)
    result = topk_step(weights, x, k, aux=aux, by_decoder_norm=by_norm)
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-5)
    if n > 1:
        assert float(result.aux_loss) == pytest.approx(float(aux_loss), rel=1e-4)
        for mine, oracle in zip(result.gradients.tensors(), expected, strict=True):
            assert float((mine - oracle).norm()) <= 1e-5 * float(oracle.norm()) + 1e-12


def test_ties_and_duplicate_rows_give_the_gradient_of_the_chosen_features() -> None:
    weights = _weights(8, 32)
    weights.W_enc[16:] = weights.W_enc[:16]
    weights.b_enc[16:] = weights.b_enc[:16]
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)).repeat(3, 1)
    indices = encode_sparse(weights, x, 5).indices
    result = topk_step(weights, x, 5)
    for mine, oracle in zip(result.gradients.tensors(), dense_oracle(weights, x, indices)[2], strict=True):
        assert float((mine - oracle).norm()) <= 1e-5 * float(oracle.norm())


def test_the_auxiliary_loss_reaches_the_encoder_of_dead_features() -> None:
    weights, dead = _weights(16, 64), torch.tensor([1, 5])
    weights.b_enc[dead] = -5.0
    x = 5 * torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    plain = topk_step(weights, x, 2).gradients.W_enc[dead]
    helped = topk_step(weights, x, 2, aux=AuxTask(dead, 2, 10.0)).gradients.W_enc[dead]
    assert float(plain.norm()) == 0
    assert float(helped.norm()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1024, 1040, 1031, 100])
def test_top_k_is_exact(dtype: torch.dtype, width: int) -> None:
    pre = torch.randn(37, width, generator=torch.Generator().manual_seed(4)).to(dtype)
    pre[0] = 1.0
    pre[1, : width // 2] = float("-inf")
    found = pre.gather(1, topk_indices(pre, 6)).float().sort(dim=1).values
    assert torch.equal(found, pre.float().topk(6).values.sort(dim=1).values)
    assert all(len(set(row)) == 6 for row in topk_indices(pre, 6).tolist())


def test_bf16_selection_computes_the_chosen_values_in_fp32() -> None:
    weights, x = _weights(32, 1024), torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
    acts = encode_sparse(weights, x, 8, dtype=torch.bfloat16)
    exact = ((x - weights.b_dec) @ weights.W_enc.T + weights.b_enc).gather(1, acts.indices).relu()
    torch.testing.assert_close(acts.values, exact, rtol=1e-5, atol=1e-5)


def test_firing_counts_are_those_of_positive_values() -> None:
    weights, x = _weights(16, 48, bias=-2.0), torch.randn(50, 16, generator=torch.Generator().manual_seed(6))
    acts = encode_sparse(weights, x, 12)
    expected = torch.bincount(acts.indices[acts.values > 0], minlength=48)
    assert int(expected.sum()) < acts.indices.numel(), "the case needs some zeros among the chosen"
    assert torch.equal(topk_step(weights, x, 12).fired, expected)


def test_wrong_width_and_wrong_k_are_refused() -> None:
    weights = _weights(16, 48)
    with pytest.raises(ShapeError, match="d_in=16"):
        topk_step(weights, torch.zeros(3, 15), 4)
    with pytest.raises(InvalidInputError, match="d_sae=48"):
        topk_step(weights, torch.zeros(3, 16), 49)
