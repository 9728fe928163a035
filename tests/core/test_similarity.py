from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import FP32_LOGITS, tiny_hf
from workbench.core import similarity
from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.core.similarity import (
    assign,
    assign_candidates,
    assign_directions,
    correlations,
    cosine_views,
    cosines,
    cosines_above,
    fold_gain,
    max_cosines,
)


def _random(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_cosines_in_blocks_are_those_of_the_whole_matrix() -> None:
    a, b = _random(50, 7), _random(31, 7, 1)
    full = torch.stack([torch.stack([x @ y / (x.norm() * y.norm()) for y in b]) for x in a])
    torch.testing.assert_close(cosines(a, b), full)
    best = max_cosines(a, b, block=8)
    torch.testing.assert_close(best.values, full.max(1).values)
    assert torch.equal(best.indices, full.argmax(1))
    above = cosines_above(a, b, 0.3, block=8).toarray()
    torch.testing.assert_close(torch.from_numpy(above).float(), torch.where(full > 0.3, full, 0.0))
    with pytest.raises(ShapeError, match="width 7 and 6"):
        cosines(a, b[:, :6])


@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)])
def test_the_assignment_has_the_largest_sum_of_all(shape: tuple[int, int]) -> None:
    scores = _random(*shape, seed=3)
    n, m = shape
    sums = []
    for rows in itertools.combinations(range(n), min(n, m)):
        for columns in itertools.permutations(range(m), min(n, m)):
            sums.append(float(scores[list(rows), list(columns)].sum()))
    found = assign(scores)
    assert found.total == pytest.approx(max(sums))
    assert int((found.columns >= 0).sum()) == min(n, m)
    assert len(set(found.columns[found.columns >= 0].tolist())) == min(n, m), "one to one"


def test_the_sparse_assignment_is_exact_for_scores_cut_at_the_floor() -> None:
    from scipy.sparse import csr_array

    for seed in range(5):
        scores = _random(8, 7, seed).tanh()
        kept = torch.where(scores > 0.2, scores, 0.0)
        found = assign_candidates(csr_array(kept.double().numpy()), 0.2)
        alone = found.columns < 0
        cut = float(torch.where(alone, 0.2, found.scores).sum()) - 0.2 * (8 - 7)
        assert cut == pytest.approx(assign(scores.clamp_min(0.2)).total, abs=1e-5)
        chosen = found.columns[~alone]
        assert torch.equal(found.scores[~alone], scores[~alone, chosen])
        assert "below 0.2" in found.method


def test_many_directions_are_assigned_by_candidates_and_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    a = _random(40, 16)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    exact = assign_directions(a, a[order] + 0.1 * _random(40, 16, 2))
    monkeypatch.setattr(similarity, "EXACT_ASSIGNMENT", 39)
    sparse = assign_directions(a, a[order] + 0.1 * _random(40, 16, 2))
    assert exact.method == "exact" and "counted as 0.5" in sparse.method
    assert torch.equal(exact.columns, order.argsort()) and torch.equal(sparse.columns, exact.columns)


def _with_gain(hf: Any, scale: Tensor) -> Any:
    """The same function: a norm's gain times D, and what reads it divided by D."""
    twin = copy.deepcopy(hf)
    block = twin.model.layers[1]
    with torch.no_grad():
        block.input_layernorm.weight *= scale
        for reader in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            reader.weight /= scale
    return twin


def _normed(hf: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """States behind the norm, and the logits."""
    states: list[Tensor] = []
    handle = hf.model.layers[1].input_layernorm.register_forward_hook(lambda _m, _a, out: states.append(out))
    logits = hf(ids).logits
    handle.remove()
    return states[0].flatten(0, 1), logits


def test_the_gain_of_a_norm_changes_raw_cosines_but_not_folded_ones() -> None:
    hf = tiny_hf()
    scale = torch.linspace(0.2, 5.0, 16)
    twin = _with_gain(hf, scale)
    ids = torch.randint(2, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    states, logits = _normed(hf, ids)
    other_states, other_logits = _normed(twin, ids)
    assert float((logits - other_logits).abs().max()) < FP32_LOGITS

    gains = [m.model.layers[1].input_layernorm.weight for m in (hf, twin)]
    reads = [m.model.layers[1].self_attn.q_proj.weight for m in (hf, twin)]
    for kind, (x, y) in {"states": (states, other_states), "reads": reads}.items():
        raw = (cosines(x, x) - cosines(y, y)).abs().max()
        fx, fy = (fold_gain(v, g, kind) for v, g in zip((x, y), gains, strict=True))
        folded = (cosines(fx, fx) - cosines(fy, fy)).abs().max()
        assert float(raw) > 0.1 and float(folded) < 1e-5, kind
    torch.testing.assert_close(correlations(states, states), correlations(states, other_states), atol=1e-6, rtol=0)


def test_gains_that_cannot_be_folded_are_refused() -> None:
    with pytest.raises(DegenerateInputError, match=r"zero at \[1\]"):
        fold_gain(torch.ones(2, 2), torch.tensor([1.0, 0.0]), "states")
    with pytest.raises(ShapeError, match="gain of 3"):
        fold_gain(torch.ones(2, 2), torch.ones(3), "reads")


def test_a_factorisation_has_any_cosines_but_only_one_prediction() -> None:
    x = _random(60, 8).double() @ _random(8, 8, 1).double()
    _, s, vt = torch.linalg.svd(x, full_matrices=False)
    shrink = (1 / (1 + 100.0 / s**2)).sqrt()
    a = b = vt.T * shrink
    scaled_a, scaled_b = a * shrink, b / shrink
    torch.testing.assert_close(scaled_a @ scaled_b.T, a @ b.T)
    off = ~torch.eye(8, dtype=torch.bool)
    assert float(cosines(b, b)[off].abs().max()) > 0.1
    assert float(cosines(scaled_b, scaled_b)[off].abs().max()) < 1e-6
    predictions = x @ a @ b.T
    torch.testing.assert_close(
        correlations(predictions, predictions), correlations(x @ scaled_a @ scaled_b.T, predictions)
    )


def test_the_named_views_differ_where_an_offset_or_a_large_dimension_speaks() -> None:
    a, b = _random(200, 6), _random(150, 6, 1)
    offset, stretch = torch.full((6,), 4.0), torch.tensor([30.0, 1, 1, 1, 1, 1])
    views = cosine_views(a + offset, b + offset)
    assert set(views) == {"raw", "centred"}
    assert float(views["raw"].mean()) > 0.8 > 0.1 > abs(float(views["centred"].mean()))
    stretched = cosine_views(a * stretch, b * stretch, reference=_random(5000, 6, 2) * stretch)
    assert float((stretched["whitened"] - cosines(a, b)).abs().max()) < 0.1
    assert float((stretched["raw"] - cosines(a, b)).abs().max()) > 0.8
    with pytest.raises(DegenerateInputError, match="reference of 1 rows"):
        cosine_views(a, b, a[:1])
