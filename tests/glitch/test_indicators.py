from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.glitch.tiny_vocab import matrix
from workbench.controls.area import chance_above
from workbench.core.errors import UnknownNameError
from workbench.glitch.ranking import indicators, reference, weights
from workbench.glitch.ranking.indicators import Separation
from workbench.glitch.ranking.weights import Matrix, TokenMatrices

N = 90
UNUSED = [4, 40, 41, 77]


def _wrap(rows: torch.Tensor) -> Matrix:
    return weights._of_tensor("rows", rows)


def _tied(rows: torch.Tensor) -> TokenMatrices:
    return TokenMatrices(_wrap(rows), _wrap(rows), None, True, "test")


def _measured(rows: torch.Tensor, block: int, head: torch.Tensor | None = None) -> dict[str, np.ndarray]:
    matrices = _tied(rows) if head is None else TokenMatrices(_wrap(rows), _wrap(head), None, False, "test")
    outer = indicators.read_rows(matrices.E_out, block)
    inner = outer if head is None else indicators.read_rows(matrices.E_in, block)
    return indicators.measure(matrices, inner, outer, UNUSED, block)


@pytest.mark.parametrize("block", [1, 7, 90, 1000])
def test_streaming_equals_dense(block: int) -> None:
    rows = matrix(N, UNUSED).double()
    found = _measured(rows.float(), block)
    u, mean = rows[UNUSED].mean(0), rows.mean(0)

    def distance(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
        return (1 - torch.nn.functional.cosine_similarity(a, b[None])).numpy()

    assert np.abs(found["I_cos"] - distance(rows, u)).max() < 1e-6
    assert np.abs(found["I_centred"] - distance(rows - mean, u - mean)).max() < 1e-6
    assert np.abs(found["I_l2"] - (rows - u).norm(dim=1).numpy()).max() < 5e-6
    assert "I_in" not in found


def test_the_input_norm_is_measured_only_for_two_matrices() -> None:
    rows, head = matrix(N, []), matrix(N, UNUSED, seed=1)
    found = _measured(rows, 16, head)
    assert np.allclose(found["I_in"], rows.norm(dim=1).numpy())
    assert found["I_cos"][UNUSED].max() < 0.01 < np.delete(found["I_cos"], UNUSED).min()


def test_bad_rows_are_nan_and_do_not_spoil_the_others() -> None:
    rows = matrix(N, UNUSED)
    clean = _measured(rows, 16)
    rows[10, 3], rows[11, 0], rows[12] = float("nan"), float("inf"), 0.0
    facts = indicators.read_rows(_wrap(rows), 16)
    assert np.flatnonzero(~facts.finite).tolist() == [10, 11]
    assert not facts.usable[[10, 11, 12]].any() and facts.usable.sum() == N - 3
    assert torch.isfinite(facts.mean).all()
    found = _measured(rows, 16)
    assert np.isnan(found["I_cos"][[10, 11]]).all() and found["I_cos"][12] == 1.0
    others = np.delete(np.arange(N), [10, 11, 12])
    assert np.array_equal(found["I_cos"][others], clean["I_cos"][others])


def test_identical_rows_need_every_bit_and_the_bias() -> None:
    rows = matrix(N, [])
    rows[30] = rows[5] = rows[60]
    rows[20] = rows[21]
    rows[21, 0] = torch.nextafter(rows[21, 0], torch.tensor(9.0))
    rows[50], rows[51] = 0.0, 0.0
    rows[7], rows[8] = torch.zeros(24), torch.zeros(24)
    rows[7, 1] = rows[8, 1] = 1.0
    rows[8, 2] = -0.0
    assert set(indicators.read_rows(_wrap(rows), 16).classes) == {(5, 30, 60), (7, 8)}
    bias = torch.zeros(N)
    bias[30] = 1.0
    assert set(indicators.read_rows(_wrap(rows), 16, bias).classes) == {(5, 60), (7, 8)}


def test_classes_one_quantisation_step_apart_are_one_cluster() -> None:
    rows = matrix(N, [])
    rows[[3, 50]], step = rows[1].clone(), rows[1].clone()
    step[0] += 0.001
    rows[[8, 9]] = step
    rows[[20, 21, 22]] = rows[19].clone()
    classes = indicators.read_rows(_wrap(rows), 16).classes
    assert len(classes) == 3
    assert reference.merge_duplicates(classes, _wrap(rows)) == ((1, 3, 8, 9, 50), (19, 20, 21, 22))


def test_held_out_leaves_the_row_itself_out() -> None:
    rows = matrix(N, UNUSED, noise=0.5)
    matrices = _tied(rows)
    outer = indicators.read_rows(matrices.E_out, 16)
    values = indicators.measure(matrices, outer, outer, UNUSED, 16)
    for name in ("I_cos", "I_centred", "I_l2"):
        held = indicators.held_out_values(name, matrices, outer, values[name], UNUSED)
        shift = outer.mean if name == "I_centred" else torch.zeros(24)
        rest = rows[UNUSED[1:]].mean(0)
        expected = (
            float((rows[4] - rest).norm()) if name == "I_l2"
            else 1 - float(torch.nn.functional.cosine_similarity(rows[4] - shift, rest - shift, dim=0))
        )  # fmt: skip
        assert held[0] == pytest.approx(expected, abs=1e-5)
        assert held[0] > values[name][4]
    assert np.isnan(indicators.held_out_values("I_cos", matrices, outer, values["I_cos"], [4])).all()


def test_auc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 6, 30).astype(float), rng.integers(2, 9, 50).astype(float)
    pairs = np.mean([(a < b) + 0.5 * (a == b) for a in low for b in high])
    assert chance_above(high, low) == pytest.approx(pairs)


def _auc(**values: float) -> tuple[Separation, ...]:
    return tuple(Separation(name, auc, 0.0, 10, 100) for name, auc in values.items())


def test_the_indicator_is_the_simplest_that_none_clearly_beats() -> None:
    assert indicators.pick(_auc(I_in=0.999, I_cos=1.0))[0] == "I_in"
    assert indicators.pick(_auc(I_in=0.5, I_cos=0.996, I_centred=0.999))[0] == "I_cos"
    assert indicators.pick(_auc(I_cos=0.95, I_centred=0.99))[0] == "I_centred"
    assert indicators.pick(_auc(I_in=0.5, I_cos=0.89))[0] is None
    assert indicators.pick(())[0] is None
    chosen, why = indicators.pick(_auc(I_cos=float("nan")), insist=True)
    assert chosen == "I_cos" and "NOT CONFIRMED" in why
    with pytest.raises(UnknownNameError, match="I_in"):
        indicators.pick(_auc(I_cos=1.0), asked="I_in")


@pytest.mark.parametrize("block", [16, 1000])
def test_without_the_first_component_equals_removing_it_from_every_row(block: int) -> None:
    rows = matrix(N, UNUSED) + 3 * torch.randn(N, 1, generator=torch.Generator().manual_seed(7)) * torch.ones(24)
    matrices = _tied(rows)
    outer = indicators.read_rows(matrices.E_out, block, component=True)
    values = indicators.measure(matrices, outer, outer, UNUSED, block)["I_1pc"]
    wide = rows.double()
    c = torch.linalg.svd(wide - wide.mean(0)).Vh[0]
    without = wide - (wide @ c)[:, None] * c
    expected = 1 - torch.nn.functional.cosine_similarity(without, without[UNUSED].mean(0)[None])
    assert np.abs(values - expected.numpy()).max() < 1e-5
    held = indicators.held_out_values("I_1pc", matrices, outer, values, UNUSED)
    rest = without[UNUSED[1:]].mean(0)
    assert held[0] == pytest.approx(1 - float(torch.nn.functional.cosine_similarity(without[4], rest, dim=0)), abs=1e-5)
    assert "I_1pc" not in indicators.measure(matrices, indicators.read_rows(matrices.E_out, block), outer.__class__(
        outer.norm, outer.finite, outer.mean, outer.classes), UNUSED, block)  # fmt: skip


def test_equal_rows_are_told_from_rows_that_agree_in_the_sampled_columns() -> None:
    rows = matrix(200, [], width=64)
    rows[150] = rows[20]
    rows[151] = rows[20]
    rows[151, 1] += 1.0
    rows[170], rows[171] = rows[30], rows[30]
    assert indicators.read_rows(_wrap(rows), 64).classes == ((20, 150), (30, 170, 171))
