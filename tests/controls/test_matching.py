from __future__ import annotations

import math

import pytest
import torch

from workbench.controls.matching import MAX_FREQUENCY_RATIO, N_NEAREST, matched_features
from workbench.core.errors import DegenerateInputError, InvalidInputError

RARE = torch.full((40,), 0.001)
"""Features that make the pool of the near ones large enough for two, and are no match themselves."""


def test_matches_are_near_in_frequency_and_neither_chosen_nor_excluded_nor_dead() -> None:
    frequency = torch.cat([torch.tensor([0.5, 0.45, 0.4, 0.01, 0.02, 0.0, 0.5]), RARE])
    sets = matched_features([0], frequency, 50, excluded=[6])
    assert {drawn[0] for drawn in sets} == {1, 2}
    alone = torch.tensor([0.5, 0, 0, 0, 0, 0, 0.5])
    with pytest.raises(DegenerateInputError, match="no control"):
        matched_features([0], alone, 2, excluded=[6])


def test_the_norm_decides_before_the_frequency_and_a_zero_row_is_never_drawn() -> None:
    frequency = torch.cat([torch.tensor([0.5, 0.5, 0.4, 0.5]), RARE])
    norm = torch.cat([torch.tensor([1.0, 3.0, 1.2, 0.0]), torch.ones(40)])
    assert {drawn[0] for drawn in matched_features([0], frequency, 20)} == {1, 3}
    assert {drawn[0] for drawn in matched_features([0], frequency, 20, norm=norm)} == {2}
    # matched on the norm alone, a rare feature of norm 1 would do as well
    assert matched_features([0], frequency[[0, 2, 4]], norm=norm[[0, 2, 4]]) == ((1,),)


def test_where_nothing_matches_the_nearest_is_taken() -> None:
    frequency = torch.tensor([0.9, 0.1, 0.05, 0.02])
    assert math.log(0.9 / 0.1) > math.log(MAX_FREQUENCY_RATIO)
    assert {drawn[0] for drawn in matched_features([0], frequency, 20)} == {1}
    norm = torch.tensor([1.0, 5.0, 5.0, 9.0])
    assert matched_features([0], frequency, norm=norm) == ((1,),)


def test_a_match_is_within_a_factor_of_1_5_in_frequency_and_in_norm() -> None:
    frequency = torch.cat([torch.tensor([0.1, 0.14, 0.16, 0.07, 0.06]), RARE, RARE])
    assert {drawn[0] for drawn in matched_features([0], frequency, 40)} == {1, 3}
    norm = torch.tensor([1.0, 1.4, 1.6, 0.7, 0.6] + [9.0] * 80)
    drawn = matched_features([0], torch.full((85,), torch.nan), 40, norm=norm)
    assert {features[0] for features in drawn} == {1, 3}


def test_of_features_that_are_too_far_the_nearest_ones_are_taken() -> None:
    frequency = torch.cat([torch.tensor([0.9, 0.1, 0.1, 0.09, 0.08]), RARE, RARE])
    assert {drawn[0] for drawn in matched_features([0], frequency, 40)} == {1, 2}


def test_a_set_holds_each_feature_once() -> None:
    frequency = torch.full((8,), 0.1)
    for drawn in matched_features([0, 1, 2], frequency, 40):
        assert len(set(drawn)) == 3 and not {0, 1, 2} & set(drawn)
    with pytest.raises(DegenerateInputError, match="5 features needs as many others, and 3 of 8"):
        matched_features([0, 1, 2, 3, 4], frequency, 2)


def test_sets_differ_and_fewer_are_the_first_of_more() -> None:
    frequency = torch.full((2000,), 0.1)
    sets = matched_features([5, 9], frequency, 12, seed=3)
    assert len(set(sets)) > 6, "a seed that is used again for every set gives the same set"
    assert sets[:4] == matched_features([5, 9], frequency, 4, seed=3) != matched_features([5, 9], frequency, 4, seed=4)
    assert max(max(drawn) for drawn in sets) <= N_NEAREST + 4, "of equal features the first ones are the nearest"


def test_without_frequencies_all_that_write_are_equally_likely() -> None:
    unknown = torch.full((200,), torch.nan)
    norm = torch.ones(200)
    norm[::2] = 0.0
    drawn = {drawn[0] for drawn in matched_features([1], unknown, 300, norm=norm)}
    assert all(feature % 2 for feature in drawn) and 1 not in drawn and len(drawn) > 80
    one_unknown = torch.full((200,), 0.1)
    one_unknown[1] = torch.nan
    assert len({drawn[0] for drawn in matched_features([1], one_unknown, 300)}) > 80


def test_sets_differ_where_few_features_are_there_to_choose_from() -> None:
    frequency = torch.full((12,), 0.1)
    assert len(set(matched_features([0], frequency, 10))) == 2


@pytest.mark.parametrize(("chosen", "excluded"), [([-1], []), ([8], []), ([0], [-2])])
def test_features_that_do_not_exist_are_refused(chosen: list[int], excluded: list[int]) -> None:
    with pytest.raises(InvalidInputError, match="does not exist; frequencies are given of features 0 to 7"):
        matched_features(chosen, torch.full((8,), 0.1), excluded=excluded)
