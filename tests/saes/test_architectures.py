from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.core.errors import InvalidInputError, ShapeError
from workbench.saes.architectures import (
    Architecture,
    AuxTask,
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    ReLU,
    StepOptions,
    StepResult,
    TopK,
)
from workbench.saes.architectures.dense_reference import reference_step
from workbench.saes.kernels.sparse import DenseProducts, Products, SparseProducts
from workbench.saes.kernels.weights import SAEWeights

from .test_select import make_weights, make_x

F64 = torch.float64


def kinds(m: int, k: int) -> dict[str, Architecture]:
    """Every architecture, with thresholds and windows of the size of the activations."""
    widths = (max(1, m // 8), max(2, m // 2), m)
    return {
        "topk": TopK(k), "topk by norm": TopK(k, by_decoder_norm=True),
        "batchtopk": BatchTopK(k), "batchtopk by norm": BatchTopK(k, by_decoder_norm=True),
        "matryoshka": Matryoshka(k, widths), "matryoshka by norm": Matryoshka(k, widths, by_decoder_norm=True),
        "relu": ReLU(), "jumprelu": JumpReLU(0.5, 0.4), "jumprelu tanh": JumpReLU(0.5, 0.4, "tanh"),
        "gated": Gated(), "gated frozen": Gated(frozen_decoder=True),
    }  # fmt: skip


NAMES = tuple(kinds(16, 1))
# rows, d_sae, k, bias of the encoder
CASES = {
    "plain": (40, 1024, 8, 0.0),
    "some features active": (40, 1024, 8, -3.0),
    "fewer than k positive": (40, 1024, 8, -6.0),
    "batch not a multiple of the chunk": (257, 128, 4, 0.0),
    "width not a multiple of the group": (20, 1031, 4, -1.0),
    "one feature": (40, 64, 1, 0.0),
    "all features": (40, 24, 24, 0.0),
    "one row": (1, 64, 4, 0.0),
    "nothing active": (30, 64, 4, -50.0),
}


def start(kind: Architecture, m: int, bias: float = 0.0, d_out: int | None = None) -> SAEWeights:
    """Weights with every parameter random."""
    weights = make_weights(16, m, bias=bias)
    if d_out is not None:
        other = make_weights(d_out, m)
        weights = replace(weights, W_dec=other.W_dec, b_dec=other.b_dec)
    weights = kind.start(weights)
    noise = torch.randn(2, m, generator=torch.Generator().manual_seed(7), dtype=F64)
    for name, values in (("threshold", 0.05 * noise[0].abs()), ("r_mag", 0.2 * noise[0]), ("b_mag", 0.2 * noise[1])):
        parameter = getattr(weights, name)
        if parameter is not None:
            parameter.add_(values)
    return weights


SCALARS = ("loss", "aux_loss", "sparsity_loss", "threshold")


def difference(found: StepResult, expected: StepResult, scalars: tuple[str, ...] = SCALARS) -> float:
    """Largest relative difference of the gradients, by norm, and of the scalars."""
    pairs = list(zip(found.gradients.tensors(), expected.gradients.tensors(), strict=True))
    for name in scalars:
        pairs.append((getattr(found, name).nan_to_num(-1.0), getattr(expected, name).nan_to_num(-1.0)))
    return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) if bool((a != b).any()) else 0.0 for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_dense_autograd(name: str, case: str) -> None:
    check_step(name, case)


@pytest.mark.parametrize("case", ["some features active", "fewer than k positive"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_of_transcoders_equal_dense_autograd(name: str, case: str) -> None:
    check_step(name, case, d_out=12)


def check_step(name: str, case: str, d_out: int | None = None) -> None:
    """Compares a step, with and without AuxK, with the reference."""
    n, m, k, bias = CASES[case]
    kind = kinds(m, k)[name]
    weights, x = start(kind, m, bias, d_out), make_x(n, 16)
    target = 3 * make_x(n, d_out) if d_out else None
    for aux in (None, AuxTask(torch.arange(0, m, 3), 5, 1.0)) if kind.revives else (None,):
        options = StepOptions(F64, aux, sparsity=0.7)
        found, expected = kind.step(weights, x, target, options), reference_step(kind, weights, x, target, options)
        assert difference(found, expected) < 1e-10
        assert torch.equal(found.fired, expected.fired)


@pytest.mark.parametrize("name", NAMES)
def test_fp32_steps_equal_dense_autograd_in_fp64(name: str) -> None:
    kind = kinds(1040, 8)[name]
    exact, x = start(kind, 1040, -1.0), make_x(300, 16)
    weights = SAEWeights(**{name: t.float() for name, t in exact.named().items()})
    options = StepOptions(aux=AuxTask(torch.arange(0, 1040, 3), 5, 1.0) if kind.revives else None, sparsity=0.7)
    expected = reference_step(kind, exact, x, options=options)
    found = kind.step(weights, x.float(), options=options)
    assert difference(found, expected, SCALARS[:3]) < 1e-5


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_ties_and_duplicate_rows_give_the_gradient_of_the_chosen_features(name: str) -> None:
    kind = kinds(32, 5)[name]
    weights, x = start(kind, 32), make_x(6, 16).repeat(3, 1)
    weights.W_enc[16:], weights.b_enc[16:] = weights.W_enc[:16].clone(), weights.b_enc[:16].clone()
    found = kind.step(weights, x, options=StepOptions(F64))
    mask = kind.encode(weights, x, dtype=F64).dense() > 0
    leaves = {name: t.clone().requires_grad_() for name, t in weights.named().items()}
    w = SAEWeights(**leaves)
    acts = ((x - w.b_dec) @ w.W_enc.T + w.b_enc) * mask
    widths = kind.widths if isinstance(kind, Matryoshka) else (32,)
    losses = [(acts[:, :n] @ w.W_dec[:n] + w.b_dec - x).square().sum(1).mean() for n in widths]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()))
    for mine, oracle in zip(found.gradients.tensors(), gradients, strict=True):
        torch.testing.assert_close(mine, oracle, rtol=1e-10, atol=1e-12)


def test_the_comparison_rejects_gradients_through_zeros_and_an_encoder_that_aux_does_not_reach() -> None:
    """The two known faults of sparse kernels: this file would be worthless if it let them pass."""
    kind, m = TopK(8), 1024
    x, aux = make_x(300, 16), AuxTask(torch.arange(0, m, 3), 5, 1.0)
    weights = start(kind, m, -6.0)
    expected = reference_step(kind, weights, x, options=StepOptions(F64))
    acts = kind.encode(weights, x, dtype=F64)
    error = acts.decode(weights.W_dec) + weights.b_dec - x
    through_zeros = acts.products(error * 2 / len(x), weights.W_dec)
    wrong = acts.by_feature().weighted_sum(through_zeros, x - weights.b_dec)
    assert float((wrong - expected.gradients.W_enc).norm() / expected.gradients.W_enc.norm()) > 0.5

    weights = start(kind, m)
    with_aux = reference_step(kind, weights, x, options=StepOptions(F64, aux))
    main = kind.step(weights, x, options=StepOptions(F64))
    helped = kind.step(weights, x, options=StepOptions(F64, aux))
    assert difference(helped, with_aux) < 1e-11
    without = replace(helped, gradients=replace(helped.gradients, W_enc=main.gradients.W_enc))
    assert difference(without, with_aux) > 1e-3
    assert float((helped.gradients.W_enc - main.gradients.W_enc)[aux.dead].norm()) > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("products", [DenseProducts(F64, chunk=100), DenseProducts(F64)], ids=["chunks", "whole"])
def test_dense_products_give_the_same_steps(name: str, products: Products) -> None:
    kind = kinds(128, 6)[name]
    weights, x = start(kind, 128, -5.0), make_x(257, 16)
    options = StepOptions(F64, sparsity=0.7)
    found = kind.step(weights, x, options=replace(options, products=products))
    assert difference(found, kind.step(weights, x, options=options)) < 1e-12


@pytest.mark.parametrize("bias", [0.0, -5.0])
def test_elementwise_steps_are_sparse_only_where_few_features_are_active(
    bias: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    class Recording(SparseProducts):
        def decode(self, acts: Any, W_dec: Tensor) -> Tensor:
            used.append("sparse")
            return super().decode(acts, W_dec)

    ReLU().step(start(ReLU(), 128, bias), make_x(257, 16), options=StepOptions(products=Recording()))
    assert bool(used) == (bias < 0)


def test_encode_gives_the_activations_of_the_saved_form() -> None:
    x = make_x(60, 16)
    for name, kind in kinds(48, 4).items():
        weights = start(kind, 48)
        pre = (x - weights.b_dec) @ weights.W_enc.T + weights.b_enc
        acts = kind.encode(weights, x, dtype=F64, threshold=0.9).dense()
        if name.startswith("topk"):
            assert int((acts > 0).sum(1).max()) == 4
        elif "topk" in name or "matryoshka" in name:
            ranks = pre * weights.W_dec.norm(dim=1) if "norm" in name else pre
            torch.testing.assert_close(acts, pre * (ranks > 0.9))
        elif name == "relu":
            torch.testing.assert_close(acts, pre.relu())
        elif name.startswith("jumprelu"):
            assert weights.threshold is not None
            torch.testing.assert_close(acts, pre * (pre > weights.threshold))
        else:
            assert weights.r_mag is not None and weights.b_mag is not None
            magnitude = (pre - weights.b_enc) * weights.r_mag.exp() + weights.b_mag
            torch.testing.assert_close(acts, (pre > 0) * magnitude.relu())
        read = x - weights.b_dec
        raw = kind.encode(weights, read, centred=False, dtype=F64, threshold=0.9).dense()
        torch.testing.assert_close(raw, acts)


def test_thresholds_stay_positive_and_get_a_gradient_from_features_just_below_them() -> None:
    kind = JumpReLU(bandwidth=0.5, initial_threshold=0.4)
    weights = start(kind, 48)
    assert weights.threshold is not None
    weights.b_enc.fill_(-40)
    weights.b_enc[3] = 0
    weights.W_enc[3] = 0
    weights.b_enc[3] = float(weights.threshold[3]) - 0.1
    result = kind.step(weights, make_x(20, 16), options=StepOptions(sparsity=1.0))
    assert int(result.fired.sum()) == 0
    assert result.gradients.threshold is not None
    assert result.gradients.threshold.nonzero().flatten().tolist() == [3]
    weights.threshold[5] = -1.0
    kind.after_step(weights)
    assert float(weights.threshold.min()) == 0


def test_weights_are_not_changed_by_a_step() -> None:
    for kind in kinds(48, 4).values():
        weights = start(kind, 48)
        before = [t.clone() for t in weights.tensors()]
        kind.step(weights, make_x(30, 16), options=StepOptions(F64, AuxTask(torch.arange(5), 3), 0.5))
        assert all(torch.equal(a, b) for a, b in zip(before, weights.tensors(), strict=True))


class _Record(TorchDispatchMode):
    """Names of the operations and the largest number of elements of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.layout == torch.strided and not value._is_view():
                self.largest = max(self.largest, value.numel())
        return out


@contextmanager
def recording() -> Iterator[_Record]:
    with _Record() as record:
        yield record


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_of_rows_by_features_is_made(name: str) -> None:
    n, m = 1200, 1024
    kind = kinds(m, 8)[name]
    weights, x = start(kind, m, -6.0 if name in ("relu", "gated", "jumprelu") else 0.0), make_x(n, 16)
    with recording() as record:
        kind.step(weights, x, options=StepOptions(F64, AuxTask(torch.arange(0, m, 9), 5), 0.5))
    assert record.largest <= 256 * m + 1
    with recording() as dense:
        reference_step(kind, weights, x, options=StepOptions(F64))
    assert dense.largest >= n * m


def test_a_topk_step_never_waits_for_a_value() -> None:
    kind = TopK(8)
    with recording() as record:
        kind.step(start(kind, 200), make_x(300, 16), options=StepOptions(F64, AuxTask(torch.arange(0, 200, 9), 5)))
    assert not record.names & {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2"}


def test_shapes_that_do_not_fit_are_refused() -> None:
    weights = start(TopK(4), 48)
    with pytest.raises(ShapeError, match="d_in=16"):
        TopK(4).step(weights, torch.zeros(3, 15, dtype=F64))
    with pytest.raises(ShapeError, match="d_out=16"):
        TopK(4).step(weights, make_x(3, 16), torch.zeros(3, 15, dtype=F64))
    with pytest.raises(ShapeError, match="Give a target"):
        TopK(4).step(start(TopK(4), 48, d_out=12), make_x(3, 16))


def test_options_that_can_not_be_used_are_refused() -> None:
    for widths in ((), (0, 4), (4, 4), (8, 4)):
        with pytest.raises(InvalidInputError, match="increasing"):
            Matryoshka(2, widths)
    with pytest.raises(InvalidInputError, match="d_sae=48"):
        Matryoshka(2, (4, 8)).step(start(TopK(1), 48), make_x(3, 16))
    with pytest.raises(InvalidInputError, match="bandwidth=0.0"):
        JumpReLU(bandwidth=0.0)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_residuals_without_variance_give_no_auxiliary_loss(name: str) -> None:
    kind = kinds(64, 4)[name]
    task = AuxTask(torch.arange(0, 64, 3), 5, 1.0)
    for x in (make_x(1, 16), make_x(1, 16).expand(8, 16).contiguous()):
        found = kind.step(start(kind, 64), x, options=StepOptions(aux=task))
        assert float(found.aux_loss) == 0.0
        plain = kind.step(start(kind, 64), x)
        for mine, other in zip(found.gradients.tensors(), plain.gradients.tensors(), strict=True):
            assert torch.equal(mine, other)
