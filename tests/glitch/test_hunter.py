from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from workbench.core.errors import DegenerateInputError, InvalidInputError, MissingFileError, ShapeError
from workbench.glitch.searching.hunter import HunterOptions, communities, hunt, nearest_pairs, principal_components
from workbench.glitch.searching.oracle import Asker, in_order

N_CLUSTERS, SIZE, WIDTH = 12, 60, 24
OPTIONS = HunterOptions(neighbours=10, resolution=8.0)


def _blobs(seed: int = 0, spread: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(N_CLUSTERS, WIDTH, generator=generator)
    noise = spread * torch.randn(N_CLUSTERS * SIZE, WIDTH, generator=generator)
    return centres.repeat_interleave(SIZE, 0) + noise


ROWS, IDS = _blobs(), np.arange(N_CLUSTERS * SIZE)
LABEL = IDS // SIZE


class Oracle:
    def __init__(self, glitch: np.ndarray) -> None:
        self.glitch, self.asked = glitch, []

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        self.asked += ids.tolist()
        return np.isin(ids, self.glitch)


def test_a_cluster_of_glitch_tokens_is_found_whole_for_a_part_of_the_cost() -> None:
    oracle = Oracle(IDS[LABEL == 5])
    found = hunt(ROWS, IDS, oracle, OPTIONS)
    assert found.n_found == SIZE and set(found.asked[found.glitch]) == set(IDS[LABEL == 5])
    assert found.calls < len(IDS) / 3
    assert oracle.asked == found.asked.tolist() and len(set(oracle.asked)) == len(oracle.asked)


def test_single_tokens_in_clean_clusters_are_missed_as_the_method_has_it() -> None:
    alone = IDS[::SIZE][:6]
    found = hunt(ROWS, IDS, Oracle(np.concatenate([IDS[LABEL == 11], alone])), OPTIONS)
    assert SIZE <= found.n_found < SIZE + 6
    assert hunt(ROWS, IDS, Oracle(np.array([], dtype=int)), OPTIONS).n_found == 0


def test_one_failure_keeps_a_cluster_unless_a_share_is_asked_for() -> None:
    glitch = IDS[LABEL == 5][: SIZE // 2]
    strict = HunterOptions(neighbours=10, resolution=8.0, keep_above=0.9)
    assert hunt(ROWS, IDS, Oracle(glitch), OPTIONS).n_found == SIZE // 2
    assert hunt(ROWS, IDS, Oracle(glitch), strict).n_found < SIZE // 2


def test_the_seed_decides_everything() -> None:
    glitch = IDS[LABEL == 3]
    runs = [hunt(ROWS, IDS, Oracle(glitch), HunterOptions(neighbours=10, resolution=8.0, seed=s)) for s in (0, 0, 1)]
    assert np.array_equal(runs[0].asked, runs[1].asked) and not np.array_equal(runs[0].asked, runs[2].asked)


def test_only_the_named_ids_are_searched() -> None:
    some = IDS[100:400]
    oracle = Oracle(IDS)
    assert set(hunt(ROWS, some, oracle, OPTIONS).asked) == set(some) == set(oracle.asked)


def test_communities_are_those_of_the_blobs_and_resolution_splits_them() -> None:
    member = communities(ROWS, OPTIONS)
    for cluster in range(N_CLUSTERS):
        assert len(set(member[cluster == LABEL])) <= 3
    for part in range(member.max() + 1):
        assert len(set(LABEL[member == part])) == 1
    fine = communities(ROWS, HunterOptions(neighbours=10, resolution=80.0))
    assert fine.max() > 2 * member.max()


def test_principal_components_are_those_of_the_svd() -> None:
    centred = (ROWS - ROWS.mean(0)).double()
    U, S, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = (U * S)[:, :7].abs().float()
    assert torch.allclose(principal_components(ROWS, 7).abs(), expected, atol=1e-3)
    assert principal_components(ROWS, 500).shape == (len(ROWS), WIDTH)
    assert principal_components(ROWS[:3], 50).shape == (3, 3)
    with pytest.raises(DegenerateInputError, match="1 of 2 rows"):
        principal_components(torch.tensor([[1.0, float("nan")], [0.0, 0.0]]), 1)


@pytest.mark.parametrize("limit", [{"_BLOCK": 7}, {"_DISTANCES": 7 * 40}, {"_DISTANCES": 1}])
def test_neighbours_are_the_nearest_by_brute_force_across_blocks(
    monkeypatch: pytest.MonkeyPatch, limit: dict[str, int]
) -> None:
    for name, value in limit.items():
        monkeypatch.setattr(f"workbench.glitch.searching.hunter.{name}", value)
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    expected = set()
    for i in range(40):
        near = sorted((j for j in range(40) if j != i), key=lambda j: float((x[i] - x[j]).norm()))[:3]
        expected |= {(min(i, j), max(i, j)) for j in near}
    assert {tuple(pair) for pair in nearest_pairs(x, 3).tolist()} == expected
    assert len(nearest_pairs(x[:3], 50)) == 3


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "leidenalg", None)
    with pytest.raises(MissingFileError, match="leidenalg"):
        communities(ROWS, OPTIONS)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ShapeError, match="720 rows"):
        hunt(ROWS, np.array([0, 720]), Oracle(IDS), OPTIONS)
    with pytest.raises(DegenerateInputError, match="1 token "):
        hunt(ROWS, np.array([4]), Oracle(IDS), OPTIONS)
    with pytest.raises(InvalidInputError, match="resolution"):
        HunterOptions(resolution=0.0)
    with pytest.raises(InvalidInputError, match="share"):
        HunterOptions(share=0.0)
    with pytest.raises(InvalidInputError, match="one boolean each"):
        Asker(lambda ids: np.array([True]))(np.arange(3))


def test_asking_in_order_counts_and_stops() -> None:
    found = in_order(lambda ids: ids < 4, "ranking", np.array([9, 1, 3, 8, 2]), budget=3)
    assert found.asked.tolist() == [9, 1, 3] and found.n_found == 2
    assert found.precision.value == 2 / 3 and found.recall(4).value == 0.5
    assert found.first(2).n_found == 1
    with pytest.raises(DegenerateInputError, match="budget=0"):
        in_order(lambda ids: ids < 4, "ranking", np.array([1]), budget=0)
