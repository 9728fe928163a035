"""`TRITON_INTERPRET=1 pytest -m gpu tests/saes/test_triton.py` checks the kernels without a GPU, where Triton is installed."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from workbench.core.errors import ResourceError
from workbench.saes.architectures import Matryoshka, StepOptions, TopK
from workbench.saes.kernels import triton_kernels
from workbench.saes.kernels.sparse import SparseActs
from workbench.saes.kernels.triton_kernels import TritonProducts
from workbench.saes.kernels.weights import SAEWeights
from workbench.saes.training.kernel_choice import available_kernels, with_kernel

from .test_architectures import difference, start
from .test_select import make_x, ragged

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def moved(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.gpu
def test_triton_products_equal_dense_ones() -> None:
    dense, W, x, y = moved(ragged()[1], make_x(30, 5), make_x(9, 5), 3 * make_x(9, 7))
    acts, products = SparseActs.of_dense(dense), TritonProducts()
    lists = acts.by_feature()
    torch.testing.assert_close(products.decode(acts, W), dense @ W)
    torch.testing.assert_close(products.dots(acts, x, W), (x @ W.T)[dense != 0])
    one, two = products.sums(acts, lists, [(acts.values, x), (2 * acts.values, y)])
    torch.testing.assert_close(one, dense.T @ x)
    torch.testing.assert_close(two, 2 * dense.T @ y)
    torch.testing.assert_close(products.sums(acts, lists, [(acts.values, y)])[0], dense.T @ y)


@pytest.mark.gpu
def test_triton_steps_equal_sparse_ones() -> None:
    for kind in (TopK(3), Matryoshka(3, (8, 40))):
        weights, (x,) = SAEWeights(*moved(*start(kind, 40).tensors())), moved(make_x(20, 16))
        found = kind.step(weights, x, options=StepOptions(torch.float64, products=TritonProducts()))
        assert difference(found, kind.step(weights, x, options=StepOptions(torch.float64))) < 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter of Triton has no device to wait for")
@pytest.mark.parametrize("kernel", available_kernels("cuda"))
def test_a_topk_step_never_waits_for_the_device(kernel: str) -> None:
    """BatchTopK does once per step, to learn how many entries a ragged choice has."""
    kind = with_kernel(TopK(3), kernel)
    weights, (x,) = (
        SAEWeights(*moved(*(t.float() for t in start(TopK(3), 40).tensors()))),
        moved(make_x(20, 16).float()),
    )
    kind.step(weights, x)  # compiles, and asks the device what it can do
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kind.step(weights, x)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_without_triton_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "has_triton", lambda: False)
    with pytest.raises(ResourceError, match="kernel='csr'"):
        TritonProducts()
