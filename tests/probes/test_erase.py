"""Erasers and transports: what they guarantee on the rows that they were fitted on, and how they stream and edit."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import D_MODEL, tiny_model
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.probes import ClassMoments, Eraser, INLPOptions, fit_inlp, fit_leace, fit_mimic

D = 6


@functools.cache
def rows(classes: int, n: int = 600, d: int = D, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Classes of unequal size with means and covariances of their own, in correlated dimensions."""
    g = torch.Generator().manual_seed(classes)
    y = torch.randint(0, 2 * classes - 1, (n,), generator=g) % classes
    mix = torch.randn(classes, d, d, generator=g, dtype=torch.float64) / d**0.5 + 0.7 * torch.eye(d)
    means = 1.5 * torch.randn(classes, d, generator=g, dtype=torch.float64) + offset
    noise = torch.randn(n, d, generator=g, dtype=torch.float64)
    return means[y] + torch.einsum("nd,nde->ne", noise, mix[y]), y


@functools.cache
def moments(classes: int) -> ClassMoments:
    return ClassMoments.of(*rows(classes), classes)


def readable(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Largest coefficient and accuracy of a logistic regression on these rows, centred as a constant is no signal."""
    from sklearn.linear_model import LogisticRegression

    centred = (x - x.mean(0)).numpy()
    model = LogisticRegression(C=1e4, max_iter=2000, tol=1e-9).fit(centred, y.numpy())
    return float(np.abs(model.coef_).max()), float(model.score(centred, y.numpy()))


def majority(y: Tensor) -> float:
    return float(torch.bincount(y).max()) / len(y)


def test_moments_are_those_of_the_rows_whatever_the_chunks_and_the_offset() -> None:
    x, y = rows(3, offset=1e6)
    whole = ClassMoments.of(x, y, 3)
    assert torch.allclose(whole.covariance, torch.cov(x.T, correction=0), rtol=0, atol=1e-8)
    assert torch.allclose(whole.covariance_of(1), torch.cov(x[y == 1].T, correction=0), rtol=0, atol=1e-8)
    z = torch.nn.functional.one_hot(y, 3).double()
    assert torch.allclose(whole.cross, (x - x.mean(0)).T @ (z - z.mean(0)) / len(x), atol=1e-8)
    order = y.argsort()  # the first chunk has no row of the last class
    chunks = [(x[part], y[part]) for part in (order[:100], order[100:107], order[107:])]
    for name in ("n", "means", "scatter"):
        streamed, again = (getattr(m, name) for m in (ClassMoments.over(iter(chunks), 3), whole))
        assert torch.allclose(streamed.double(), again.double(), rtol=1e-11, atol=1e-7), name
    halves = ClassMoments.of(x[::2], y[::2], 3) + ClassMoments.of(x[1::2], y[1::2], 3)
    one, two = fit_leace(whole), fit_leace(halves)
    assert torch.allclose(one(x), two(x), rtol=0, atol=1e-6)


def test_moments_after_an_affine_map_are_those_of_the_mapped_rows() -> None:
    x, y = rows(2)
    g = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(D, D, generator=g).double(), torch.randn(D, generator=g).double()
    moved = torch.where((y == 1)[:, None], x @ weight.T + bias, x)
    got, want = moments(2).mapped(weight, bias, 1), ClassMoments.of(moved, y, 2)
    assert torch.allclose(got.means, want.means) and torch.allclose(got.scatter, want.scatter)


def test_shrinkage_is_the_oracle_approximating_one_and_goes_away_with_rows() -> None:
    from sklearn.covariance import oas

    for n in (8, 600):
        x, y = (part[:n] for part in rows(2))
        got = ClassMoments.of(x, y, 2).shrunk()
        assert np.allclose(got, oas((x - x.mean(0)).numpy(), assume_centered=True)[0], rtol=1e-8)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3])
def test_leace_leaves_a_linear_classifier_nothing(classes: int, shrinkage: float | None) -> None:
    x, y = rows(classes)
    eraser = fit_leace(moments(classes), shrinkage=shrinkage)
    erased = eraser(x)
    coefficient, accuracy = readable(erased, y)
    assert readable(x, y)[1] > majority(y) + 0.1
    assert coefficient < 1e-3 and accuracy <= majority(y)
    assert eraser.rank == classes - 1
    assert torch.allclose(eraser(erased), erased, atol=1e-10), "idempotent"
    assert torch.allclose(erased.mean(0), x.mean(0)), "the mean of all rows stays"
    # the orthogonal projection of the same rank: the differences of the means projected out
    gaps = torch.linalg.qr((moments(classes).means[1:] - moments(classes).means[0]).T).Q
    orthogonal = (x - x.mean(0)) @ gaps @ gaps.T
    assert float((erased - x).square().sum()) <= float(orthogonal.square().sum()) * (1 + 1e-12)
    if shrinkage == 0:
        assert float((erased - x).square().sum()) < 0.99 * float(orthogonal.square().sum())


def test_leace_is_the_formula_of_the_paper_and_its_factors_give_the_whole_edit() -> None:
    x, y = rows(3)
    m = moments(3)
    values, axes = torch.linalg.eigh(m.covariance)
    w = (axes * values.rsqrt()) @ axes.T
    u, s, _ = torch.linalg.svd(w @ m.cross, full_matrices=False)
    u = u[:, s > 1e-7]
    removed = torch.linalg.inv(w) @ u @ u.T @ w
    eraser = fit_leace(m, shrinkage=0.0)
    assert torch.allclose(eraser(x), x - (x - x.mean(0)) @ removed.T, atol=1e-9)
    assert torch.allclose(eraser.write.T @ eraser.read, removed, atol=1e-9)
    assert torch.allclose(eraser.op(x.float()).double(), eraser(x), atol=1e-4)
    # roots of singular values belong on the rows of the right factor; on its columns they give another edit
    u, s, vh = torch.linalg.svd(removed)
    assert torch.allclose((u * s.sqrt()) @ (s.sqrt()[:, None] * vh), removed, atol=1e-9)
    assert float(((u * s.sqrt()) @ (vh * s.sqrt()) - eraser.write.T @ eraser.read).abs().max()) > 0.1


@pytest.mark.parametrize("shrinkage", [0.0, 0.01, 0.5, 0.99])
def test_leace_never_enlarges_the_variance_of_the_rows(shrinkage: float) -> None:
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        y = torch.randint(0, 3, (60,), generator=g)
        x = torch.randn(60, 4, generator=g).double() * torch.tensor([1.0, 30.0, 5.0, 0.1]) + y[:, None] * torch.randn(
            4, generator=g
        )
        erased = fit_leace(ClassMoments.of(x, y, 3), shrinkage=shrinkage)(x)
        assert float(erased.var(0).sum()) <= float(x.var(0).sum())


def test_what_is_printed_is_what_a_regression_on_the_rows_finds() -> None:
    x, y = rows(3)
    z = torch.nn.functional.one_hot(y, 3).double()

    def r2(h: Tensor) -> float:
        design = torch.cat([h, torch.ones(len(h), 1)], 1)
        error = z - design @ torch.linalg.lstsq(design, z, driver="gelsd").solution
        return 1 - float(error.square().sum() / (z - z.mean(0)).square().sum())

    eraser = fit_leace(moments(3))
    check, control = eraser.check, eraser.control(0)
    assert check.r2 == pytest.approx(r2(x), abs=1e-3) and check.r2_control == pytest.approx(r2(control(x)), abs=1e-3)
    assert check.r2 > 0.3 and check.r2_after < 1e-6 and control.rank == eraser.rank
    length = float((eraser(x) - x).square().sum() / (x - x.mean(0)).square().sum()) ** 0.5
    assert check.change == pytest.approx(length)
    assert "after the control (a random subspace of equal rank)" in repr(eraser)


@pytest.mark.parametrize("classes", [2, 3])
def test_inlp_stops_at_the_majority_and_says_how_many_dimensions_it_took(classes: int) -> None:
    x, y = rows(classes, d=16)
    m = ClassMoments.of(x, y, classes)
    eraser = fit_inlp(m, x, y, INLPOptions(margin=0.01))
    assert readable(eraser(x), y)[1] <= majority(y) + 0.08 < readable(x, y)[1]
    assert 0 < eraser.rank < 16 and eraser.rank % (classes - 1) == 0
    assert eraser.name == f"INLP after {eraser.rank // (classes - 1)} classifiers".replace(
        "1 classifiers", "1 classifier"
    )
    assert torch.allclose(eraser.read @ eraser.read.T, torch.eye(eraser.rank).double(), atol=1e-10)
    assert torch.allclose(eraser(eraser(x)), eraser(x), atol=1e-10)
    wider = fit_inlp(m, x, y, INLPOptions(margin=0.2))
    assert wider.rank < eraser.rank, "it stops as soon as it may"


def test_inlp_knows_how_frequent_the_classes_are() -> None:
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(2000, generator=g) < 0.15).long()
    x = torch.randn(2000, D, generator=g).double()
    x[:, 0] += 2 * y
    eraser = fit_inlp(ClassMoments.of(x, y, 2), x, y)
    assert eraser.rank == 1 and abs(float(eraser.read[0, 0])) > 0.9, "beside the bias, a rare class is read"


def test_inlp_says_when_there_is_nothing_to_remove_and_when_it_does_not_get_there() -> None:
    x, y = rows(2)
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    with pytest.raises(DegenerateInputError, match="nothing to remove"):
        fit_inlp(ClassMoments.of(x, shuffled, 2), x, shuffled)
    with pytest.raises(DegenerateInputError, match="Allow a larger margin or more rounds"):
        fit_inlp(moments(2), x, y, INLPOptions(max_rounds=1))


def test_mimic_gives_the_source_the_targets_mean_and_covariance() -> None:
    x, y = rows(3)
    transport = fit_mimic(moments(3), 2, 0)
    moved, target = transport(x[y == 2]), x[y == 0]
    assert torch.allclose(moved.mean(0), target.mean(0), rtol=0, atol=1e-10)
    assert torch.allclose(torch.cov(moved.T), torch.cov(target.T) * _correction(moved, target), rtol=0, atol=1e-10)
    a = transport.weight
    assert torch.equal(a, a.T) and float(torch.linalg.eigvalsh(a)[0]) > 0
    assert transport.check.r2_after < 1e-9 < transport.check.r2_control
    plus = fit_mimic(moments(3), 2, 0, alpha=2.0)
    assert torch.allclose(plus(x) - transport(x), 2 * (target.mean(0) - x[y == 2].mean(0)))
    assert plus.name == "MiMiC+ with alpha 2" and transport.name == "MiMiC"


def _correction(a: Tensor, b: Tensor) -> float:
    """From the covariance over n - 1 of `b` to that of `a`, where those over n agree."""
    return (1 - 1 / len(b)) / (1 - 1 / len(a))


def test_mimic_between_classes_that_coincide_is_the_identity() -> None:
    x, _ = rows(2)
    twice = ClassMoments.of(torch.cat([x, x]), torch.arange(2).repeat_interleave(len(x)), 2)
    transport = fit_mimic(twice, 0, 1)
    assert torch.allclose(transport.weight, torch.eye(D).double(), rtol=0, atol=1e-10)
    assert torch.allclose(transport(x), x, atol=1e-9)
    with pytest.raises(DegenerateInputError, match="same mean"):
        fit_leace(twice)


def test_as_interventions_they_do_to_hidden_states_what_they_do_to_rows() -> None:
    model, site = tiny_model(), "resid_post.1"
    batch = model.tokens(["one day", "two men and a dog", "abcdefghijklmnop", "qrstuvwxyz 0123"])
    x = model.capture(batch, [site]).flat(site)[batch.mask]
    y = torch.arange(len(x)) % 2
    x = x + y[:, None] * torch.linspace(-1, 1, D_MODEL)
    m = ClassMoments.of(x, y, 2)
    clean = model.capture(batch, [site]).flat(site)[batch.mask].double()
    for edit in (fit_leace(m), fit_mimic(m, 0, 1, ridge=1e-3), fit_leace(m).control()):
        with model.plan(edit.at(site)) as plan, torch.no_grad():
            edited = model.capture(batch, [site]).flat(site)[batch.mask].double()
        assert torch.allclose(edited, edit(clean), atol=1e-4)
        assert plan.report is not None and plan.report[0].share > 0
    assert isinstance(fit_leace(m), Eraser)


def test_wrong_input_is_refused() -> None:
    x, y = rows(2)
    with pytest.raises(ShapeError, match="pair up"):
        ClassMoments.of(x, y[:-1], 2)
    with pytest.raises(InvalidInputError, match="labels 1 with n_classes=1|2 classes or more"):
        ClassMoments.of(x, y, 1)
    with pytest.raises(InvalidInputError, match="labels 2"):
        ClassMoments.of(x, y + 1, 2)
    with pytest.raises(InvalidInputError, match="non-finite"):
        ClassMoments.of(x / 0, y, 2)
    with pytest.raises(DegenerateInputError, match="no chunk"):
        ClassMoments.over([], 2)
    with pytest.raises(ShapeError, match="same classes and width"):
        _ = moments(2) + moments(3)
    with pytest.raises(DegenerateInputError, match="no row of 1 class"):
        fit_leace(ClassMoments.of(x, y, 3))
    with pytest.raises(InvalidInputError, match="two different classes"):
        fit_mimic(moments(2), 1, 1)
    with pytest.raises(DegenerateInputError, match="Give more rows of the source than dimensions, or a ridge"):
        fit_mimic(ClassMoments.of(x[:8], torch.arange(8) % 2, 2), 0, 1)
    with pytest.raises(ShapeError, match="of the same width"):
        fit_inlp(moments(2), x[:, 1:], y)
    with pytest.raises(InvalidInputError, match="share from 0 to 1"):
        moments(2).shrunk(2.0)
