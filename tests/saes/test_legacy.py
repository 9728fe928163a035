from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from workbench.core.errors import DegenerateInputError
from workbench.saes.evaluation.legacy import effects, positive_effects, scr, tpp
from workbench.saes.evaluation.sparse_probing import Examples

D = 6
W_DEC = np.eye(D)


def _examples(columns: np.ndarray, labels: np.ndarray) -> Examples:
    """A perfect SAE: one feature per dimension."""
    return Examples("toy", columns, {"SAE": csr_matrix(columns)}, labels, np.arange(len(columns)))


def _classes(seed: int) -> list[Examples]:
    """Class c shows in dimension c alone; the last dimension is noise."""
    random = np.random.default_rng(seed)
    which = random.integers(0, 3, 240)
    x = np.zeros((240, D))
    x[np.arange(240), which] = 3
    x[:, 5] = random.random(240)
    return [_examples(x, (which == c).astype(int)) for c in range(3)]


def test_tpp_rewards_features_that_serve_one_class_only() -> None:
    score = tpp(_classes(0), _classes(1), W_DEC, 1)
    assert score.status == "legacy" and score.name == "TPP"
    assert score.value > 0.2
    tangled = W_DEC.copy()
    tangled[:3, :3] = 1 / 3
    assert tpp(_classes(0), _classes(1), tangled, 1).value < score.value
    with pytest.raises(DegenerateInputError):
        tpp(_classes(0)[:1], _classes(1)[:1], W_DEC, 1)


def test_scr_is_one_where_the_spurious_features_are_all_that_misleads() -> None:
    random = np.random.default_rng(0)

    def make(label: np.ndarray, spurious: np.ndarray) -> np.ndarray:
        """One feature says that the concept is there, another that it is not; the probe's cut is symmetric in them."""
        x = np.zeros((len(label), D))
        x[:, 0], x[:, 1], x[:, 2] = label + 0.01 * random.random(len(label)), spurious, 1 - spurious
        return x

    biased_label = random.integers(0, 2, 200)
    label, spurious = random.integers(0, 2, 400), random.integers(0, 2, 400)
    biased = _examples(make(biased_label, biased_label), biased_label)
    balanced = _examples(make(label, spurious), label)
    right = scr(biased, balanced, spurious, W_DEC, 2)
    assert right.name == "SCR" and right.value == 1.0
    assert scr(biased, balanced, spurious, W_DEC, 1).value < 0.8, "the other of the two features still misleads"
    assert scr(biased, balanced, spurious, np.zeros_like(W_DEC), 2).value == 0
    assert scr(balanced, balanced, spurious, W_DEC, 1).value == 0, "no room between oracle and probe"


def test_effects_are_those_of_their_definition() -> None:
    acts = np.array([[1.0, 0.0, 4.0], [3.0, 0.0, 0.0]])
    found = effects(csr_matrix(acts), np.array([0, 1]), np.array([2.0, 0.0]), np.array([[1.0, 9.0]] * 3))
    # means 3 - 1, 0 - 0, 0 - 4; times w . W = 2; TPP counts what is more active on class 1 only
    assert found.tolist() == [4.0, 0.0, -8.0]
    clamped = positive_effects(csr_matrix(acts), np.array([0, 1]), np.array([2.0, 0.0]), np.array([[1.0, 9.0]] * 3))
    assert clamped.tolist() == [4.0, 0.0, 0.0]
