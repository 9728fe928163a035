from __future__ import annotations

import pytest
import torch

from tests.core.test_similarity import _random
from workbench.controls.directions import random_directions
from workbench.controls.overlap import NULLS, overlap, permuted_dictionary
from workbench.core.errors import InvalidInputError
from workbench.core.similarity import assign_directions, cosines


def test_the_random_null_is_the_random_control_of_equal_lengths() -> None:
    b = _random(5, 8)
    b[2] = 0.0
    same = cosines(NULLS["random"](b, 3), random_directions(_random(5, 8), seed=3)).diag()
    torch.testing.assert_close(same, torch.ones(5))


def test_a_permutation_is_recovered_and_beats_the_null() -> None:
    a = _random(200, 32)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(assign_directions(a, a[order]).columns, order.argsort())
    near = overlap(a, a[order])
    assert near.better and near.verdict == "better than null"
    assert near.observed.mean_max.value == pytest.approx(1.0, abs=1e-5) and near.observed.above.value == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_independent_dictionaries_are_no_better_than_null(seed: int) -> None:
    near = overlap(_random(300, 24, 2 * seed), _random(300, 24, 2 * seed + 1), seed=seed)
    assert near.verdict == "no better than null"
    assert "no better than null" in str(near)


def test_the_null_grows_when_the_space_shrinks() -> None:
    def null(d: int) -> float:
        return overlap(_random(200, d), _random(200, d, 1)).nulls["random"][0].mean_max.value

    assert null(4) > 0.8 > 0.4 > null(128)


def test_a_common_direction_fools_the_random_null_but_not_the_permuted_one() -> None:
    offset = torch.zeros(24)
    offset[0] = 8.0
    near = overlap(_random(300, 24) + offset, _random(300, 24, 1) + offset)
    assert near.observed.mean_max.low > max(draw.mean_max.high for draw in near.nulls["random"])
    assert not near.better
    dealt = permuted_dictionary(_random(300, 24) + offset, 0)
    torch.testing.assert_close(dealt.mean(0)[0], cosines(_random(300, 24) + offset, offset[None]).mean())
    with pytest.raises(InvalidInputError, match="without a null"):
        overlap(offset[None], offset[None], draws=0)
