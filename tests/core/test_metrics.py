from __future__ import annotations

import math

import pytest
import torch

from workbench.core import metrics
from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.features.scores.output_score import confidence


def test_fvu_is_one_for_the_mean_and_zero_for_identity_whatever_the_offset() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 100
    assert metrics.fvu(x, x) == 0
    assert metrics.fvu(x, x.mean(0).expand(x.shape)) == pytest.approx(1, abs=1e-6)
    noisy = x + 0.5
    assert metrics.fvu(x, noisy) == pytest.approx(metrics.fvu(x - 70, noisy - 70), rel=1e-4)


def test_fvu_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    x = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
    x_hat = torch.tensor([[1.0], [2.0], [10.0], [12.0]])
    # error 1; variance around 6: 36 + 16 + 16 + 36. Mean of the two halves' ratios would be (1/2 + 0) / 2.
    assert metrics.fvu(x, x_hat) == pytest.approx(1 / 104)


def test_metrics_refuse_what_has_no_value() -> None:
    same = torch.ones(3, 2)
    with pytest.raises(DegenerateInputError, match="no variance"):
        metrics.fvu(same, same)
    with pytest.raises(ShapeError, match=r"\(3, 2\).*\(2, 2\)"):
        metrics.fvu(same, same[:2])
    with pytest.raises(DegenerateInputError):
        metrics.ce_loss_recovered(3.0, 3.0, 3.0)
    with pytest.raises(DegenerateInputError):
        metrics.l0(torch.zeros(0, 3))


@pytest.mark.parametrize(("spliced", "recovered"), [(3.0, 1.0), (8.0, 0.0), (9.0, -0.2), (5.5, 0.5)])
def test_ce_loss_recovered_is_linear_in_the_spliced_loss(spliced: float, recovered: float) -> None:
    assert metrics.ce_loss_recovered(3.0, spliced, 8.0) == pytest.approx(recovered)


def test_l0_counts_positive_entries_only() -> None:
    assert metrics.l0(torch.tensor([[-1.0, 0.0, 2.0]])) == 1


def test_kl_is_zero_for_equal_and_has_the_right_direction() -> None:
    p, q = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0])
    assert metrics.kl_divergence(p, p) == pytest.approx(0)
    share = math.exp(2) / (1 + math.exp(2))
    expected = share * math.log(share / 0.5) + (1 - share) * math.log((1 - share) / 0.5)
    assert metrics.kl_divergence(p, q) == pytest.approx(expected, rel=1e-5)
    out = torch.tensor([1.0, 2.0, -math.inf])  # a token that is ruled out on both sides, or on one
    other = (out + torch.tensor([0.1, 0.0, 0.0])).requires_grad_()
    kl = metrics.kl_divergence(out, other)
    assert kl.item() == pytest.approx(metrics.kl_divergence(out[:2], other[:2]).item())
    assert torch.autograd.grad(kl, other)[0].isfinite().all()
    assert metrics.kl_divergence(torch.zeros(3), out) == math.inf
    many = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    assert metrics.kl_divergence(many, many * (1 + 1e-7)).min() >= 0


def test_mean_max_cosine_is_signed() -> None:
    eye = torch.eye(3)
    assert metrics.mean_max_cosine(eye, 5 * eye[[2, 0, 1]]) == pytest.approx(1)
    assert metrics.mean_max_cosine(eye, -eye) == pytest.approx(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_some_tokens_do_not_add_the_largest_logit_back(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 40_000, generator=generator) * 4 + 200).to(dtype)
    ids = torch.tensor([[0, 16_384, 39_999]]).expand(3, -1)
    expected = logits.double().log_softmax(1)
    found = metrics.token_log_probabilities(logits, ids)
    # in fp32 -log p of 20 has steps of 1.9e-6, next to the logit itself of 1.5e-5
    assert torch.allclose(found.double(), expected.gather(1, ids), rtol=0, atol=4e-6)
    assert confidence(logits, 3).double() == pytest.approx(-expected.topk(3).values.mean(1), abs=2e-6)
    logits[0, 5] = float("nan")
    assert metrics.token_log_probabilities(logits, ids)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_standing_is_that_of_a_softmax_in_float64_across_blocks_and_ties(dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 60_001, generator=torch.Generator().manual_seed(0)) * 4 + 200).to(dtype)
    logits[:, 60_000] = logits[:, 3]  # a tie in another block is not above
    found = metrics.standing(logits, logits[:, 3])
    log_p = logits.double().log_softmax(1)
    assert torch.equal(found.above, (logits > logits[:, 3:4]).sum(1))
    ours = logits[:, 3].float() - found.top - found.log_total
    assert torch.allclose(ours.double(), log_p[:, 3], rtol=0, atol=4e-6)
