from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import D_MODEL, tiny_model, tiny_tokenizer
from workbench.activations.clipping import clipping_cost
from workbench.activations.geometry import (
    CLASSES,
    Geometry,
    GeometryOptions,
    SiteGeometry,
    all_but_the_top,
    anisotropy,
    classes_of,
    geometry_of_store,
    measure_geometry,
    token_kinds,
)
from workbench.activations.harvest import HarvestOptions, harvest
from workbench.activations.moments import Moments
from workbench.activations.sources import TokenRows
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.stats import Estimate
from workbench.models.model import Model

N, D, CONTEXT = 4000, 64, 20


def _gaussian(seed: int = 0) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def _measured(x: Tensor, kinds: Tensor | None = None, max_norm: float = 1e9, **options: float) -> SiteGeometry:
    position, row = torch.arange(len(x)) % CONTEXT, torch.arange(len(x)) // CONTEXT
    ordinary = x.norm(dim=1) <= max_norm
    kinds = torch.full((len(x),), CLASSES.index("other")) if kinds is None else kinds
    geometry = Geometry("resid_post.1", x[:400], ordinary[:400], max_norm, GeometryOptions(**options))
    for part in torch.arange(len(x)).split(700):
        geometry.add(x[part], kinds[part], ordinary[part], position[part], row[part])
    return geometry.result()


def _standard_error(estimate: Estimate) -> float:
    return (estimate.high - estimate.low) / (2 * 1.96)


@pytest.mark.parametrize("seed", range(3))
def test_an_isotropic_gaussian_has_no_outlier_and_no_anisotropy(seed: int) -> None:
    found = _measured(_gaussian(seed))
    assert found.outliers == ()
    for name, value in found.anisotropy.items():
        assert abs(value.value) < 3 * _standard_error(value), name
    assert found.kurtosis == pytest.approx(3, abs=0.1)
    assert found.norm_share[0] == pytest.approx(1 / D, rel=0.1)
    assert abs(found.position["all dimensions"] or 0) < 0.15
    assert found.position["outliers alone"] is None
    assert not any(part.massive or part.sinks for part in found.classes) and found.massive_dims == ()


@pytest.mark.parametrize("signs", [1, -1])
def test_a_planted_dimension_is_found_alone_and_clipping_it_lowers_anisotropy(signs: int) -> None:
    x = _gaussian()
    x[:, 17] += signs * 50
    found = _measured(x)
    assert found.outlier_dims == (17,)
    (dim,) = found.outliers
    assert dim.mean == pytest.approx(signs * 50, abs=0.1) and dim.std == pytest.approx(1, abs=0.05)
    assert dim.extremal == 1.0 and dim.norm_share == pytest.approx(2501 / (2501 + D - 1), rel=0.01)
    assert found.largest_means[0].dim == 17
    a = found.anisotropy
    assert a["raw"].low > 0.9 > 0.1 > a["clipped"].high
    for name in ("clipped", "standardised", "all but the top"):
        assert abs(a[name].value) < 3 * _standard_error(a[name]), name


def test_a_dimension_with_zero_mean_and_rare_spikes_is_seen_by_kurtosis_and_norm_share() -> None:
    x = _gaussian()
    x[:, 3] = 0
    x[::100, 3] = 200
    found = _measured(x)
    assert found.outlier_dims == (3,)
    assert found.outliers[0].kurtosis > 50 and found.outliers[0].extremal == pytest.approx(0.01)


def test_moments_in_parts_are_those_of_the_whole_far_from_zero() -> None:
    x = 1e4 + _gaussian()[:, :4].double() ** 3
    moments = Moments(x[:10].mean(0))
    for part in x.split(333):
        moments.add(part)
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, x.std(0, correction=0), rtol=1e-9)
    fourth = ((x - x.mean(0)) ** 4).mean(0) / x.var(0, correction=0) ** 2
    np.testing.assert_allclose(moments.kurtosis, fourth, rtol=1e-6)


def test_the_position_probe_finds_the_planted_dimension_and_only_there() -> None:
    x = _gaussian()
    x[:, 5] = 40 + 0.5 * (torch.arange(N) % CONTEXT)
    found = _measured(x).position
    assert found["all dimensions"] == pytest.approx(1, abs=0.01)
    assert found["outliers alone"] == pytest.approx(1, abs=0.01)
    assert abs(found["without outliers"] or 0) < 0.15


def test_the_position_probe_is_that_of_least_squares_on_held_out_rows() -> None:
    x = _gaussian()
    position = torch.arange(N) % CONTEXT
    x[:, :8] += 0.1 * position[:, None]
    held = (torch.arange(N) // CONTEXT) % 5 == 4
    design = np.concatenate([x.numpy(), np.ones((N, 1))], 1)
    w, *_ = np.linalg.lstsq(design[~held], position[~held].numpy().astype(float), rcond=None)
    y = position[held].numpy()
    expected = 1 - ((y - design[held] @ w) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert _measured(x, ridge=1e-9).position["all dimensions"] == pytest.approx(expected, abs=1e-4)


def test_massive_activations_and_sinks_are_counted_by_class() -> None:
    x = _gaussian()
    kinds = torch.full((N,), CLASSES.index("other"))
    kinds[::CONTEXT] = CLASSES.index("BOS")
    kinds[1::CONTEXT] = CLASSES.index("punctuation")
    x[::CONTEXT, 7] = -3000
    x[1, 9] = 900
    x[21, 9] = 99
    found = _measured(x, kinds, max_norm=80.0)
    classes = {part.name: part for part in found.classes}
    assert (classes["BOS"].tokens, classes["BOS"].massive, classes["BOS"].sinks) == (200, 200, 200)
    assert (classes["punctuation"].massive, classes["punctuation"].sinks) == (1, 2), "99 is no massive activation"
    assert classes["BOS"].largest == 3000 and classes["other"].massive == 0
    assert found.massive_dims == ((7, 200), (9, 1))
    assert found.ordinary == N - 202 and found.outliers == (), "sinks do not make an outlier dimension"
    assert _measured(x, kinds, massive_ratio=2000.0).massive_dims == ((7, 200),), "beyond so many medians"


def test_anisotropy_takes_pairs_of_different_rows_only() -> None:
    x = torch.cat([torch.eye(4), torch.eye(4)]).repeat_interleave(2, 0)
    rows = torch.arange(8).repeat_interleave(2)
    with pytest.raises(DegenerateInputError, match="0 pairs of different rows"):
        anisotropy(x, rows)
    assert anisotropy(x.roll(1, 0), rows.roll(1)).value == 0.0


def test_all_but_the_top_removes_mean_and_components() -> None:
    x = _gaussian()[:, :6] + 3
    x[:, 2] *= 100
    left = all_but_the_top(x, 1)
    assert float(left.mean(0).abs().max()) < 1e-3
    assert float(left[:, 2].std()) < 1 and float(left[:, 1].std()) > 0.9


def test_tokens_are_put_into_classes() -> None:
    tokenizer = tiny_tokenizer()
    kinds, special = token_kinds(tiny_model())
    assert set(special) == set(tokenizer.all_special_ids)
    ids = torch.tensor([tokenizer("a,b")["input_ids"], tokenizer(",b ")["input_ids"], tokenizer("a!b")["input_ids"]])
    ids[2, 0], ids[1, 2] = tokenizer.bos_token_id, tokenizer.eos_token_id
    named = [[CLASSES[i] for i in row] for row in classes_of(ids, kinds).tolist()]
    assert named == [["first", "punctuation", "other"], ["first", "other", "special"], ["BOS", "first", "other"]]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _rows(n: int = 40, context: int = 12) -> Tensor:
    ids = torch.randint(2, 200, (n, context), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = tiny_tokenizer().bos_token_id
    return ids


def test_a_model_is_measured_at_several_sites_in_one_pass(model: Model, tmp_path: Path) -> None:
    sites = ["resid_post.0", "resid_post.2"]
    found = measure_geometry(model, _rows(), sites, batch_rows=16)
    assert [part.site for part in found] == sites
    x = model.capture(_rows(), sites)["resid_post.2"][:, 1:].flatten(0, 1)
    assert found[1].ordinary == len(x) and found[1].tokens == 480
    assert found[1].kurtosis == pytest.approx(
        float((((x - x.mean(0)) / x.std(0, correction=0)) ** 4).mean(0).median()), rel=1e-4
    )
    assert measure_geometry(model, _rows(), sites, batch_rows=16) == found
    store = harvest(model, TokenRows(_rows(), batch_rows=16), sites, tmp_path, options=HarvestOptions(shard_tokens=100))
    stored = geometry_of_store(model, store, "resid_post.2")
    assert stored.ordinary == found[1].ordinary
    for name, value in found[1].anisotropy.items():
        assert stored.anisotropy[name].value == pytest.approx(value.value, abs=0.15)
    assert stored.kurtosis == pytest.approx(found[1].kurtosis, rel=0.02)


def test_clipping_costs_are_those_of_the_edited_model(model: Model) -> None:
    dims = (3, 5)
    cost = clipping_cost(model, _rows(8), "resid_post.1", dims)
    logits: Tensor
    handle = model.hf.model.layers[1].register_forward_hook(
        lambda _m, _a, out: out.index_fill(-1, torch.tensor(dims), 0.0)
    )
    logits = model.hf(_rows(8)).logits
    handle.remove()
    clean = model.loss(_rows(8)).mean()
    edited = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), _rows(8)[:, 1:].flatten())
    assert cost.outliers.value == pytest.approx(float(edited - clean), abs=1e-4)
    assert cost.random != cost.outliers and cost.outliers.n == 8
    with pytest.raises(DegenerateInputError, match="0 of 16"):
        clipping_cost(model, _rows(8), "resid_post.1", ())
    with pytest.raises(DegenerateInputError, match="9 of 16"):
        clipping_cost(model, _rows(8), "resid_post.1", range(D_MODEL // 2 + 1))


def test_bad_options_and_short_rows_are_refused(model: Model) -> None:
    with pytest.raises(InvalidInputError, match="positive"):
        GeometryOptions(massive=0.0)
    with pytest.raises(DegenerateInputError, match="neither first nor special"):
        measure_geometry(model, _rows(4, 1), ["resid_post.0"])
