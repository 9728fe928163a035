from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from jaxtyping import TypeCheckError

from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.interventions.ops import Add, ProjectOut
from workbench.interventions.saes import SAEAblate, SAEAddMax, SAEClamp


@dataclass
class ReluSAE:
    """The smallest SAE: `relu(x W_enc + b_enc)`."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_enc + self.b_enc)


def golden() -> ReluSAE:
    """d0=(1,0), d1=(.6,.8), W_enc = W_dec^T, bias -.5; at x=(2,1): acts (1.5, 1.5)."""
    w_dec = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    return ReluSAE(w_dec.T.clone(), torch.tensor([-0.5, -0.5]), w_dec, torch.zeros(2))


X = torch.tensor([[2.0, 1.0]])


def bad_sae(d: int = 4, f: int = 7) -> ReluSAE:
    g = torch.Generator().manual_seed(0)
    return ReluSAE(*(torch.randn(*s, generator=g) for s in ((d, f), (f,), (f, d), (d,))))


def test_clamp_is_the_encoder_clamp_that_keeps_the_error() -> None:
    # x + (5 - 1.5) d0 = (2 + 3.5, 1); dropping the error would give (5.9, 1.2), a projection clamp (5, 1).
    torch.testing.assert_close(SAEClamp(golden(), [0], 5.0)(X), torch.tensor([[5.5, 1.0]]))


def test_ablation_subtracts_what_the_feature_wrote() -> None:
    # x - 1.5 * (.6, .8) = (1.1, -.2)
    torch.testing.assert_close(SAEAblate(golden(), [1])(X), torch.tensor([[1.1, -0.2]]))
    both = SAEAblate(golden(), [0, 1])(X)
    torch.testing.assert_close(both, torch.tensor([[2 - 1.5 - 0.9, 1 - 1.2]]))


def test_clamp_to_the_current_value_and_ablating_silent_features_are_bit_identical_even_with_a_bad_sae() -> None:
    sae = bad_sae()
    h = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    acts = sae.encode(h)
    for i in range(5):
        same = SAEClamp(sae, [2], float(acts[i, 2]))(h[i : i + 1])
        assert torch.equal(same, h[i : i + 1])
    silent = [f for f in range(7) if not acts[:, f].any()]
    if silent:
        assert torch.equal(SAEAblate(sae, silent)(h), h)
    sae.b_enc -= 100
    assert torch.equal(SAEAblate(sae, [0, 3])(h), h)


def test_add_max_uses_each_tokens_own_largest_activation() -> None:
    sae = golden()
    h = torch.tensor([[2.0, 1.0], [10.0, 0.0]])  # acts (1.5, 1.5) and (9.5, 5.5)
    out = SAEAddMax.of_features(sae, [0, 1], torch.tensor([2.0, 1.0]))(h)
    torch.testing.assert_close(out, torch.tensor([[2 + 2 * 1.5, 1.0], [10 + 9.5 * 0.6, 9.5 * 0.8]]))


def test_add_max_takes_rows() -> None:
    op = SAEAddMax.of_features(golden(), [0, 1], torch.tensor([2.0, 1.0])).take(torch.tensor([1]))
    assert op.n_rows == 1
    torch.testing.assert_close(op(X), X + 1.5 * torch.tensor([[0.6, 0.8]]))


def test_project_out_is_idempotent_and_even() -> None:
    g = torch.Generator().manual_seed(0)
    h, r = torch.randn(3, 8, generator=g), torch.randn(8, generator=g)
    once = ProjectOut(r)(h)
    torch.testing.assert_close(ProjectOut(r)(once), once)
    torch.testing.assert_close(ProjectOut(-5 * r)(h), once)
    assert float((once @ r).abs().max()) < 1e-5


@pytest.mark.parametrize("features", [[-1], [2], [0, 9]])
def test_features_that_do_not_exist_are_refused(features: list[int]) -> None:
    for op in (SAEAblate, SAEClamp, SAEAddMax.of_features):
        with pytest.raises((DegenerateInputError, InvalidInputError)):
            op(golden(), features)


@pytest.mark.parametrize(
    ("vector", "error"),
    [
        (torch.zeros(3), DegenerateInputError),
        (torch.tensor([1.0, float("nan")]), InvalidInputError),
        (torch.ones(1, 1, 1, 2), ShapeError),
    ],
)
def test_a_vector_that_cannot_steer_is_refused(vector: torch.Tensor, error: type[Exception]) -> None:
    for op in (Add, ProjectOut):
        with pytest.raises((error, TypeCheckError)):
            op(vector)
