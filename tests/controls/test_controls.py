from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny import as_user, tiny_model
from workbench.controls import area
from workbench.controls.directions import random_directions
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError


def test_random_directions_have_the_norm_of_their_own_row() -> None:
    like = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
    drawn = random_directions(like, seed=1)
    assert torch.allclose(drawn.norm(dim=1), torch.tensor([1.0, 2.0, 5.0]))
    assert torch.equal(drawn, random_directions(like, seed=1)) and not torch.equal(
        drawn, random_directions(like, seed=2)
    )
    assert not torch.allclose(drawn[0] / drawn[0].norm(), drawn[1] / drawn[1].norm()), "one seed, different directions"


def test_random_directions_of_random_rows_have_all_their_norms() -> None:
    drawn = random_directions(torch.diag(torch.tensor([1.0, 2.0, 5.0])), 60)
    assert {round(float(norm)) for norm in drawn.norm(dim=1)} == {1, 2, 5}
    assert drawn.shape == (60, 3)


def test_orthogonal_random_directions_are_orthogonal_to_their_own_row_and_different() -> None:
    like = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    drawn = random_directions(like, seed=1, orthogonal=True)
    assert (drawn * like).sum(1).abs().max() < 1e-5 * like.norm() ** 2
    assert (drawn @ like.T).abs().max() > 0.1, "not to the other rows"
    assert torch.allclose(drawn.norm(dim=1), like.norm(dim=1), rtol=1e-5)
    one = random_directions(like[0], 5, seed=1, orthogonal=True)
    assert (one @ like[0]).abs().max() < 1e-5 * like[0].norm() ** 2
    cosines = torch.nn.functional.normalize(one, dim=1) @ torch.nn.functional.normalize(one, dim=1).T
    assert cosines.fill_diagonal_(0.0).abs().max() < 0.6


@pytest.mark.parametrize(
    ("like", "orthogonal"), [(torch.zeros(4), True), (torch.tensor([[1.0], [0.0]]), False), (torch.ones(1), True)]
)
def test_random_directions_need_a_reference(like: torch.Tensor, orthogonal: bool) -> None:
    with pytest.raises(DegenerateInputError, match="non-zero rows"):
        random_directions(like, 1, orthogonal=orthogonal)
    with pytest.raises(InvalidInputError, match="0 or more"):
        random_directions(torch.ones(4), -1)


def test_auroc_counts_ties_half_column_by_column_in_full_precision() -> None:
    scores = torch.tensor([[4.0, 0.0, 1.0], [3.0, 1.0, 1.0], [2.0, 2.0, 1.0], [1.0, 3.0, 1.0]])
    positive = torch.tensor([True, True, False, False])
    assert area.auroc(scores, positive).tolist() == [1.0, 0.0, 0.5]
    close = torch.tensor([[1.0], [1.0 + 1e-12]], dtype=torch.float64)
    assert area.auroc(close, torch.tensor([False, True])).item() == 1.0, "fp32 would make a tie of them"
    slow = np.mean([(a > b) + (a == b) / 2 for a in (1.0, 2.0, 2.0) for b in (2.0, 0.5)])
    assert area.chance_above(np.array([1.0, 2.0, 2.0]), np.array([2.0, 0.5])) == pytest.approx(slow)


def test_auroc_needs_both_kinds_paired_rows_and_numbers() -> None:
    scores = torch.ones(4, 1)
    with pytest.raises(DegenerateInputError, match="4 positive and 0 negative"):
        area.auroc(scores, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="pair up"):
        area.auroc(scores, torch.ones(3, dtype=torch.bool))
    with pytest.raises(DegenerateInputError, match="1 scores are nan"):
        area.auroc(torch.tensor([[1.0], [torch.nan]]), torch.tensor([True, False]))


def test_auroc_takes_labels_as_0_and_1_and_whole_scores_as_they_are() -> None:
    with as_user():
        scores, labels = torch.tensor([[2**25 + 1], [2**25], [0]]), torch.tensor([1, 0, 0])
        assert area.auroc(scores, labels).tolist() == [1.0], "fp32 would make a tie of the first two"
        with pytest.raises(InvalidInputError, match="labels other than 0 and 1"):
            area.auroc(scores, torch.tensor([1, -1, -1]))


def test_rows_and_padded_batches_keep_the_same_tokens() -> None:
    model = tiny_model()
    batch = model.tokens(["abcdef", "gh"], bos=True)
    policy = TokenPolicy.of_batch(batch)
    keep = policy.kept(batch)
    assert keep.tolist() == [[False] + [True] * 6, [False] * 5 + [True] * 2]
    assert torch.equal(policy.ordinary(batch.ids[:1]), keep[:1])
    x = torch.ones(2, 7, 4)
    x[0, 3] = 1000.0
    x[1, :4] = 1e6  # padding has a say in nothing
    fitted = TokenPolicy.of_batch(batch, x)
    assert fitted.max_norm == pytest.approx(20.0)  # 10 times the median norm, sqrt(4)
    assert fitted == TokenPolicy(fitted.max_norm, policy.special_ids)
    assert fitted.kept(batch, x).sum() == keep.sum() - 1 and not fitted.kept(batch, x)[0, 3]
    assert torch.equal(fitted.mask(x[:1], batch.ids[:1]), fitted.kept(batch, x)[:1])
    assert fitted.reasons(x[:1], batch.ids[:1]).tolist() == [[1, 0, 0, 3, 0, 0, 0]]
    x[0, 5] = torch.nan
    assert torch.equal(fitted.mask(x[:1], batch.ids[:1]), fitted.kept(batch, x)[:1])
    assert fitted.reasons(x[:1], batch.ids[:1]).tolist() == [[1, 0, 0, 3, 0, 3, 0]]


def test_special_tokens_are_left_out_wherever_they_stand() -> None:
    batch = tiny_model().tokens(["abcd"])
    policy = TokenPolicy(special_ids=(int(batch.ids[0, 2]),))
    assert policy.kept(batch).tolist() == [[False, True, False, True]]
    assert policy.ordinary(batch.ids).tolist() == [[False, True, False, True]]
    assert policy.reasons(torch.ones(1, 4, 2), batch.ids).tolist() == [[1, 0, 2, 0]]


def test_a_row_of_which_nothing_is_kept_is_refused() -> None:
    batch = tiny_model().tokens(["a", "bcd"])
    with pytest.raises(DegenerateInputError, match="nothing to pool"):
        TokenPolicy.of_batch(batch).kept(batch)
    with pytest.raises(DegenerateInputError, match="longer rows"):
        TokenPolicy.from_norms(torch.zeros(0))
