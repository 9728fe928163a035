"""Edits that are trained: gradients through a plan, more than one backward pass, and the tensors to optimize."""

from __future__ import annotations

import pytest
import torch

from tests.interventions.builders import edited
from tests.tiny import D_MODEL, tiny_model
from workbench.interventions.gates import ProbeGate, When
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op
from workbench.interventions.ops import Add, Affine, LowRank, PerRow, ProjectOut
from workbench.interventions.replacing import Replace
from workbench.interventions.scopes import All, Last
from workbench.interventions.shapes import NormPreserve

IDS = torch.arange(10, 22).view(2, 6)


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _learned() -> list[tuple[Op, list[torch.Tensor]]]:
    v, w, s = leaf(D_MODEL), leaf(2, D_MODEL, seed=1), leaf(2, seed=2)
    R, W, b = leaf(2, D_MODEL, seed=3), leaf(2, D_MODEL, seed=4), leaf(2, seed=5)
    A, c = leaf(D_MODEL, D_MODEL, seed=6), leaf(D_MODEL, seed=7)
    return [
        (Add(v), [v]), (Add(w), [w]), (Add(v, s), [v, s]), (LowRank(R, W, b), [R, W, b]), (LowRank(R, W), [R, W]),
        (Affine(A, c), [A, c]), (Replace(w), [w]), (NormPreserve(Add(v)), [v]),
        (PerRow((Add(v), LowRank(R, W)), torch.tensor([0, 1])), [v, R, W]),
        (When(ProbeGate(torch.ones(D_MODEL), threshold=-1e9), Add(v), Add(c)), [v, c]),
    ]  # fmt: skip


@pytest.mark.parametrize(("op", "wanted"), _learned(), ids=lambda value: value.name if isinstance(value, Op) else "")
@pytest.mark.parametrize("scope", [All(), Last()], ids=str)
def test_gradients_reach_every_parameter_through_a_plan_in_every_backward_pass(
    op: Op, wanted: list[torch.Tensor], scope: object
) -> None:
    model = tiny_model()
    # A second edit of the site, which must not fold the trained one into anything.
    iv = Intervention.at("resid_post.0", op, scope) + Intervention.at("resid_post.0", Add(torch.ones(D_MODEL)), scope)  # type: ignore[arg-type]
    assert {id(p) for p in iv.parameters()} == {id(p) for p in wanted}
    assert all(p.is_leaf for p in iv.parameters())
    first = None
    used = [p for p in wanted if not (isinstance(op, When) and p is wanted[1])]
    for p in wanted:
        p.grad = None
    for step in range(2):
        with model.plan(iv):
            loss = model.hf(IDS, use_cache=False).logits[:, -1].float().logsumexp(-1).sum()
        loss.backward()
        for p in used:
            assert p.grad is not None
            assert float(p.grad.abs().max()) > 0
        grads = [p.grad.clone() for p in used if p.grad is not None]
        if first is None:
            first = grads
        else:
            for one, two in zip(first, grads, strict=True):
                torch.testing.assert_close(two, (step + 1) * one, atol=1e-4, rtol=1e-3)
    for p in wanted:
        p.grad = None
    assert all(p.grad is None for p in model.hf.parameters())


def test_a_trained_vector_lowers_the_loss_and_the_plan_sees_every_step() -> None:
    model = tiny_model()
    v = torch.full((D_MODEL,), 1e-3).requires_grad_()
    iv = Intervention.at("resid_post.1", Add(v))
    optimizer = torch.optim.Adam(list(iv.parameters()), lr=0.1)
    losses = []
    with model.plan(iv) as plan:
        for _ in range(8):
            loss = -model.hf(IDS, use_cache=False).logits[:, -1].log_softmax(-1)[:, 42].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert (plan.report[0].fired, plan.report[0].tokens) == (8, 8 * 12)
    assert isinstance(plan.report[0].mean_norm_applied, float)


def test_a_gradient_equals_the_finite_difference_through_the_model() -> None:
    model = tiny_model()
    model.hf.double()
    v = leaf(D_MODEL).detach().double().requires_grad_()

    def loss(vector: torch.Tensor) -> torch.Tensor:
        with model.plan(Intervention.at("resid_post.0", NormPreserve(Add(vector)), Last())):
            return model.hf(IDS, use_cache=False).logits[:, -1].logsumexp(-1).sum()

    loss(v).backward()
    assert v.grad is not None
    step = torch.zeros(D_MODEL, dtype=torch.float64)
    step[3] = 1e-2
    with torch.no_grad():
        # requires_grad keeps the double precision of the vector.
        slope = (loss((v + step).requires_grad_()) - loss((v - step).requires_grad_())) / 2e-2
    assert float(v.grad[3]) == pytest.approx(float(slope), rel=1e-2)


def test_a_tensor_shared_by_two_edits_is_one_parameter() -> None:
    v = leaf(D_MODEL)
    iv = Intervention.at("resid_post.0", Add(v)) + Intervention.at("resid_post.1", NormPreserve(Add(v, 2.0)))
    assert [id(p) for p in iv.parameters()] == [id(v)]
    torch.optim.SGD(list(iv.parameters()), lr=0.1)


def test_a_direction_is_trained_by_making_its_edit_anew_in_every_step() -> None:
    model = tiny_model()
    v = leaf(D_MODEL)
    for _ in range(2):
        iv = Intervention.at("resid_post.0", ProjectOut(v))
        assert list(iv.parameters()) == []  # the basis that it keeps is a result, which no optimizer accepts
        v.grad = None
        edited_logits = _logits(model, iv)
        edited_logits.logsumexp(-1).sum().backward()
        assert v.grad is not None
        assert float(v.grad.abs().max()) > 0
    assert edited(model, IDS, iv).requires_grad is False


def _logits(model, iv: Intervention) -> torch.Tensor:
    with model.plan(iv):
        return model.hf(IDS, use_cache=False).logits[:, -1]
