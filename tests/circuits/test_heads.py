"""Robust heads: the published table of a two-cue toy, closed forms, what each may see, and what it says of itself."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from circuits.shift.heads.base import HEADS, REGIMES, Head, HeadMethod
from circuits.shift.heads.concept_bottleneck import ConceptBottleneck
from circuits.shift.heads.dfr import DFR
from circuits.shift.heads.erm import ERM
from circuits.shift.heads.group_dro import GroupDRO, updated_weights
from circuits.shift.heads.jtt import JTT
from circuits.shift.heads.leace import ErasedERM
from circuits.shift.heads.pde import PDE
from circuits.shift.heads.poe import PoE
from circuits.shift.heads.reweighting import Reweighting
from circuits.shift.heads.rows import Groups, HeadRows
from circuits.shift.heads.solve import Descent, DescentRun, Linear, Scale, cross_entropy, fit_softmax
from circuits.shift.heads.subsampling import Subsampling
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError, UnknownNameError
from workbench.core.stats import wilson
from workbench.probes import ClassMoments, fit_leace

TABLE = {
    0.90: {
        "ERM": 0.497,
        "reweighting": 0.822,
        "subsampling": 0.821,
        "GroupDRO": 0.822,
        "LEACE": 0.817,
        "oracle": 0.828,
    },
    0.95: {
        "ERM": 0.368,
        "reweighting": 0.815,
        "subsampling": 0.806,
        "GroupDRO": 0.812,
        "LEACE": 0.820,
        "oracle": 0.829,
    },
    0.99: {
        "ERM": 0.148,
        "reweighting": 0.746,
        "subsampling": 0.695,
        "GroupDRO": 0.731,
        "LEACE": 0.818,
        "oracle": 0.821,
    },
}
"""Worst-group accuracy by the share of rows whose attribute is their label; LEACE is fitted on balanced rows."""


@functools.cache
def toy(n: int, rho: float, seed: int) -> HeadRows:
    """Labels and attributes of two values; +-1 on a dimension of the label, +-2 on one of the attribute."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, n)
    a = np.where(random.random(n) < rho, y, 1 - y)
    x = random.standard_normal((n, 20))
    x[:, 0] += 2 * y - 1
    x[:, 1] += 2 * (2 * a - 1)
    return HeadRows(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(a))


@functools.cache
def several(n: int = 400, seed: int = 0) -> HeadRows:
    """Three labels and three values of the attribute, of which one goes with each label in two of three rows."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, n)
    a = np.where(random.random(n) < 0.67, y, random.integers(0, 3, n))
    x = random.standard_normal((n, 8)) + np.eye(8)[y] * 2 + np.eye(8)[3 + a] * 4
    return HeadRows(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(a))


def worst(head: Head, rows: HeadRows) -> float:
    return rows.groups("test").worst((head.predict(rows.x) == rows.label).numpy())


def with_attribute(rows: HeadRows, attribute: np.ndarray | None) -> HeadRows:
    return dataclasses.replace(rows, attribute=None if attribute is None else torch.from_numpy(attribute))


@functools.cache
def test_rows(seed: int) -> HeadRows:
    return toy(4000, 0.5, 200 + seed)


test_rows.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("rho", TABLE)
def test_the_table_of_worst_group_accuracies(rho: float) -> None:
    def of(method: HeadMethod, seed: int, share: float = rho, on: HeadRows | None = None) -> float:
        return worst(method.fit(toy(4000, share, seed), validation=on, seed=seed), test_rows(seed))

    quick = GroupDRO(eta=2.0, tolerance=5e-3)
    found = {
        "ERM": np.mean([of(ERM(), seed) for seed in range(6)]),
        "reweighting": np.mean([of(Reweighting(), seed) for seed in range(6)]),
        "subsampling": np.mean([of(Subsampling(), seed) for seed in range(6)]),
        "GroupDRO": np.mean([of(quick, seed) for seed in range(3)]),
        "LEACE": np.mean([of(ErasedERM(), seed, on=toy(1000, 0.5, 100 + seed)) for seed in range(3)]),
        "oracle": np.mean([of(ERM(), seed, 0.5) for seed in range(2)]),
    }
    assert found == {name: pytest.approx(value, abs=0.04) for name, value in TABLE[rho].items()}
    assert np.mean([of(ErasedERM(), seed) for seed in range(3)]) < found["LEACE"] - 0.2, (
        "where label and attribute go together, erasing the attribute erases the label"
    )
    if rho == 0.90:
        scores = [worst(quick.fit(shuffled(toy(4000, rho, seed), seed)), test_rows(seed)) for seed in range(5)]
        plain = np.mean([of(ERM(), seed) for seed in range(5)])
        assert np.mean(scores) == pytest.approx(plain, abs=0.01), "shuffled attribute labels make it ERM"


def shuffled(rows: HeadRows, seed: int) -> HeadRows:
    return with_attribute(rows, np.random.default_rng(seed).permutation(np.asarray(rows.attribute)))


@pytest.mark.parametrize("classes", [2, 3])
def test_the_solver_finds_the_minimum_of_weighted_rows_with_offsets(classes: int) -> None:
    random = np.random.default_rng(0)
    x, y = random.standard_normal((120, 5)), random.integers(0, classes, 120)
    weights, offset = random.random(120) + 0.1, random.standard_normal((120, classes))
    head = fit_softmax(x, y, classes, l2=0.7, weights=weights, offset=offset)
    logits = head(x) + offset
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = weights[:, None] * (p - np.eye(classes)[y])
    slope = error.T @ x + 0.7 * head.weight
    free = slice(1, None) if classes == 2 else slice(None)
    assert np.abs(slope[free]).max() < 1e-3 and np.abs(error.sum(0)).max() < 1e-3
    plain = fit_softmax(x, y, classes, l2=0.7, weights=weights)
    model = LogisticRegression(C=1 / 0.7, tol=1e-8, max_iter=1000).fit(x, y, sample_weight=weights)
    want = model.coef_ if classes > 2 else np.concatenate([0 * model.coef_, model.coef_])
    assert np.allclose(plain.weight, want, atol=1e-3)
    loss = cross_entropy(logits, y)
    assert np.allclose(loss, -np.log(p[np.arange(120), y]))


def test_group_weights_and_draws() -> None:
    groups = Groups(np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 0, 1]))
    assert np.allclose(groups.weights(), [0.5, 0.5, 0.5, 1.5, 1.5, 1.5])  # 6 / (4 * 3) and 6 / (4 * 1)
    assert groups.is_minority.tolist() == [False, False, False, True, False, True]
    drawn = groups.balanced(np.random.default_rng(0))
    assert len(drawn) == 4 and set(groups.id[drawn]) == {0, 1, 2, 3}
    assert groups.worst(np.array([True, True, False, True, True, True])) == pytest.approx(2 / 3)
    without = Groups(np.array([0, 0, 1]), np.array([0, 1, 0]))
    assert np.allclose(without.weights(), 1.0) and not without.coincide
    assert without.notes("training") == (
        "a group has no member among the training rows (label 1 with attribute 1): it gets no weight",
    )


def test_group_dro_updates_and_ends_where_no_group_is_above_the_weighted_loss() -> None:
    losses = np.log(np.array([4.0, 1.0, 2.0]))
    got = updated_weights(np.array([0.2, 0.6, 0.2]), losses, eta=0.5)  # 0.2 * 2, 0.6 * 1, 0.2 * sqrt(2)
    assert np.allclose(got, np.array([0.4, 0.6, 0.2 * 2**0.5]) / (1 + 0.2 * 2**0.5))
    rows = toy(400, 0.9, 1)

    def losses_of(head: Head) -> np.ndarray:
        groups = rows.groups("")
        return np.bincount(groups.id, cross_entropy(head.logits(rows.x).numpy(), rows.label.numpy())) / groups.n

    robust, plain, balanced = (losses_of(m.fit(rows)) for m in (GroupDRO(), ERM(), Reweighting()))
    assert robust.max() < balanced.max() - 1e-3 < plain.max()
    adjusted = losses_of(GroupDRO(adjustment=5.0).fit(rows))
    small = rows.groups("").n.argmin()
    assert adjusted[small] < robust[small], "a small group's loss counts for more"
    assert "still" in GroupDRO(rounds=2).fit(rows).notes[0]


def test_dfr_averages_coefficients_over_balanced_draws_of_the_validation_rows() -> None:
    train, plain = toy(500, 0.95, 1), toy(200, 0.8, 2)
    validation = HeadRows(plain.x + 0.7, plain.label, plain.attribute)  # so that every draw has another bias
    head = DFR(resamples=3, strengths=(30.0,)).fit(train, validation=validation, seed=5)
    random, (x, y), groups = np.random.default_rng(5), validation.arrays(), validation.groups("")
    random.permutation(len(y))
    scale, fits = Scale.of(train.arrays()[0]), []
    for _ in range(3):
        drawn = groups.balanced(random)
        model = LogisticRegression(l1_ratio=1.0, C=30.0, solver="liblinear", max_iter=1000, random_state=0)
        model.fit(scale(x)[drawn], y[drawn])
        fits.append(np.append(model.coef_[0], np.ravel(model.intercept_)))
    mean = np.asarray(np.mean(fits, axis=0))
    assert np.ptp([fit[-1] for fit in fits]) > 0.01
    want = scale.folded(Linear(np.stack([0 * mean[:-1], mean[:-1]]), np.array([0, mean[-1]])))
    assert np.allclose(head.weight, want.weight) and np.allclose(head.bias, want.bias)
    assert (head.regime, head.n_attribute_labels) == ("R1", 200)
    alone = DFR().fit(train)
    assert (alone.regime, alone.n_attribute_labels) == ("R2", 500) and "half of the training rows" in alone.selection
    chosen = DFR().fit(train, validation=validation)
    assert chosen.selection.endswith("of 7, by worst-group accuracy on half of the validation rows")
    assert "mean of 20 balanced draws" in chosen.notes[-1]


def test_jtt_weighs_the_error_set_and_says_what_it_holds() -> None:
    rows = toy(1000, 0.95, 3)
    x, y = rows.arrays()
    scale = Scale.of(x)
    wrong = fit_softmax(scale(x), y, 2, l2=1.0).predict(scale(x)) != y
    head = JTT(extra=(4.0,)).fit(with_attribute(rows, None))
    want = scale.folded(fit_softmax(scale(x), y, 2, l2=1.0, weights=np.where(wrong, 5.0, 1.0)))
    assert np.allclose(head.weight, want.weight) and head.n_attribute_labels == 0
    assert "not known whether the error set has a minority" in head.notes[1]
    assert rows.attribute is not None
    minority = (rows.attribute != rows.label).numpy()
    measured = JTT().fit(rows)
    assert torch.equal(measured.weight, JTT().fit(with_attribute(rows, None)).weight), "it does not use attributes"
    precision, recall = (estimate for _, estimate in measured.measured)
    assert precision == wilson(int((wrong & minority).sum()), int(wrong.sum()))
    assert recall == wilson(int((wrong & minority).sum()), int(minority.sum()))
    coincide = with_attribute(rows, rows.label.numpy())
    assert "error set has no minority" in JTT().fit(coincide).notes
    assert "error set has no minority" not in measured.notes
    validated = JTT().fit(rows, validation=toy(300, 0.5, 4))
    assert validated.n_attribute_labels == 300 and "by worst-group accuracy on 300" in validated.selection
    blind = JTT().fit(rows, validation=with_attribute(toy(300, 0.5, 4), None))
    assert blind.n_attribute_labels == 0 and "by accuracy on 300" in blind.selection
    early = JTT(epochs=1).fit(rows, seed=1)
    assert early.notes[0] != measured.notes[0], "a first training that is cut short has another error set"


def test_poe_learns_what_the_weak_model_leaves() -> None:
    rows = toy(2000, 0.9, 5)
    x, y = rows.arrays()
    weak_x = rows.x[:, 1:2]
    scale, own = Scale.of(x), Scale.of(x[:, 1:2])
    weak = own.folded(fit_softmax(own(x[:, 1:2]), y, 2, l2=1e-6))
    plain, head = ERM(l2=1e-6).fit(rows), PoE(weak_x=weak_x, l2=1e-6).fit(rows)
    left = plain.weight[1].clone()
    left[1] -= float(weak.weight[1, 0] - weak.weight[0, 0])
    assert torch.allclose(head.weight[1], left, atol=2e-3), "in the linear case it is ERM less the weak model"
    assert worst(head, test_rows(5)) > worst(plain, test_rows(5)) + 0.2
    assert worst(PoE().fit(rows), test_rows(5)) > 0.75, "the attribute has the largest variance"
    heavy = PoE(weak_x=weak_x, own_loss=1e4, l2=1e-6).fit(rows)
    assert torch.allclose(heavy.weight[1], plain.weight[1], atol=2e-2), "with its own loss alone it is ERM"
    assert scale.centre.shape == (20,)


def test_pde_begins_balanced_adds_rows_once_and_keeps_the_best_stage() -> None:
    rows = toy(400, 0.95, 6)
    begun = PDE(warm_up=30, epochs=30).fit(rows, seed=2)
    x, y = rows.arrays()
    scale, drawn = Scale.of(x), rows.groups("").balanced(np.random.default_rng(2))
    run = DescentRun(scale(x), y, 2, Descent(), 2)
    want = scale.folded(run.epochs(30, drawn))
    assert np.allclose(begun.weight, want.weight)
    whole = PDE(warm_up=10, interval=1, added=150, epochs=60).fit(rows, seed=2)
    assert whole.notes[-1] == "400 rows of 400 in the last stage"
    tested = PDE(warm_up=30, interval=5, added=30, epochs=60).fit(rows, validation=toy(500, 0.5, 7), seed=2)
    last = PDE(warm_up=30, interval=5, added=30, epochs=60).fit(rows, seed=2)
    assert "of 7, by worst-group accuracy on 500 validation rows" in tested.selection
    assert tested.n_attribute_labels == 900 and last.n_attribute_labels == 400
    assert worst(tested, toy(500, 0.5, 7)) >= worst(last, toy(500, 0.5, 7))


def test_gradient_descent_goes_where_the_solver_is() -> None:
    x, y = several().arrays()
    scale = Scale.of(x)
    solved = fit_softmax(scale(x), y, 3, l2=0.05 * len(y))
    run = DescentRun(scale(x), y, 3, Descent(lr=0.05, weight_decay=0.05, batch=400), 0).epochs(300, np.arange(len(y)))
    assert np.allclose(run.weight, solved.weight, atol=1e-3)
    assert np.allclose(run.bias - run.bias.mean(), solved.bias - solved.bias.mean(), atol=1e-3)


def test_the_concept_bottleneck_reads_cosines_alone() -> None:
    rows = toy(1000, 0.95, 8)
    concepts = torch.zeros(3, 20)
    concepts[0, 0], concepts[1, 0] = 1.0, -1.0
    concepts[2, 5] = 1.0
    head = ConceptBottleneck(concepts + 7.0).fit(rows)  # what the concepts share is subtracted
    assert torch.equal(head.predict(rows.x), head.predict(100 * rows.x)), "lengths are not read"
    moved = rows.x.clone()
    moved[:, 1] = -moved[:, 1]  # a dimension that no concept has
    assert torch.equal(head.predict(rows.x), head.predict(moved))
    assert worst(head, test_rows(8)) > worst(ERM().fit(rows), test_rows(8)) + 0.3
    assert head.regime == "R0" and head.n_attribute_labels == 0
    with pytest.raises(DegenerateInputError, match="two or more different"):
        ConceptBottleneck(torch.ones(2, 20))
    with pytest.raises(ShapeError, match="same site"):
        ConceptBottleneck(concepts[:, :6]).fit(rows)


def made(name: str) -> HeadMethod:
    options: dict[str, dict[str, Any]] = {
        "concept bottleneck": {"concepts": torch.eye(8)[:4]}, "PDE": {"warm_up": 20, "epochs": 30},
        "GroupDRO": {"eta": 2.0, "rounds": 4}, "DFR": {"resamples": 2, "strengths": (0.3, 0.1)},
        "JTT": {"extra": (5.0, 20.0)},
    }  # fmt: skip
    return HEADS[name](**options.get(name, {}))


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_of_several_labels_repeats_itself_and_says_what_it_saw(name: str) -> None:
    rows, validation = several(), several(300, 1)
    method = made(name)
    head, again = (method.fit(rows, validation=validation, seed=3) for _ in range(2))
    assert torch.equal(head.weight, again.weight) and head.weight.shape[0] == 3
    # LEACE takes some of the label along, as the attribute goes with it in these validation rows
    least = 0.45 if name == "LEACE" else 0.6
    assert float((head.predict(validation.x) == validation.label).double().mean()) > least
    assert method.name == name == head.method and method.information and head.regime in REGIMES
    needs = {"reweighting": 400, "subsampling": 400, "GroupDRO": 400, "PDE": 700, "DFR": 300, "JTT": 300, "LEACE": 300}
    assert head.n_attribute_labels == needs.get(name, 0), "JTT uses those of the validation rows to choose lambda"
    if head.regime in ("R1", "R2"):
        with pytest.raises(InvalidInputError, match="needs attribute labels"):
            method.fit(with_attribute(rows, None))
        assert method.fit(rows).regime == "R2"
    else:
        alone = method.fit(with_attribute(rows, None))
        assert alone.n_attribute_labels == 0
    moved = dataclasses.replace(rows, x=rows.x * torch.linspace(1, 50, 8) + 3.0)
    if name in ("ERM", "reweighting", "subsampling", "GroupDRO"):
        other = method.fit(moved, seed=3)
        assert torch.allclose(other.logits(moved.x), head.logits(rows.x), atol=0.05), "units do not matter"
    assert f"{head.n_attribute_labels} attribute labels used" in repr(head)


@pytest.mark.parametrize("name", ["reweighting", "subsampling", "GroupDRO", "DFR", "LEACE", "PDE"])
def test_labels_that_determine_the_attribute_are_said_to(name: str) -> None:
    rows = several(200)
    coincide = with_attribute(rows, 2 - rows.label.numpy())
    assert "(rho = 1): the groups are the classes" in made(name).fit(coincide).notes[0]
    assert "rho = 1" not in " ".join(made(name).fit(rows).notes)


def test_where_the_attribute_is_the_label_erasing_it_leaves_chance() -> None:
    rows = toy(1000, 1.0, 9)
    head = ErasedERM().fit(rows)
    assert head.notes[1] == "erasing the attribute erases the label" and "at chance" in head.notes[-1]
    elsewhere = ErasedERM().fit(rows, validation=toy(1000, 0.5, 109))
    assert worst(elsewhere, test_rows(9)) > 0.75 > 0.6 > worst(ERM().fit(rows), test_rows(9))
    assert elsewhere.notes == ("the eraser takes 1 dimension",)


def test_a_head_behind_an_eraser_is_one_linear_head() -> None:
    rows, other = toy(500, 0.9, 10), toy(300, 0.5, 11)
    other = dataclasses.replace(other, x=other.x + 1.0)  # the two means differ, and the eraser keeps its own
    scale, (x, y) = Scale.of(rows.arrays()[0]), rows.arrays()
    assert other.attribute is not None
    eraser = fit_leace(ClassMoments.of(torch.from_numpy(scale(other.arrays()[0])), other.attribute, 2))
    erased = eraser(torch.from_numpy(scale(x))).numpy()
    want = fit_softmax(erased, y, 2, l2=1.0)(erased)
    assert np.allclose(ErasedERM().fit(rows, validation=other).logits(rows.x), want, atol=1e-6)


def test_a_head_at_chance_says_so() -> None:
    random = np.random.default_rng(0)
    x, y = torch.zeros(90, 3), torch.from_numpy(random.integers(0, 2, 90))
    assert any("at chance" in note for note in ERM().fit(HeadRows(x, y)).notes)
    assert not ERM().fit(toy(1000, 0.9, 0)).notes


def test_wrong_input_is_refused() -> None:
    rows = toy(400, 0.95, 6)
    with pytest.raises(ShapeError, match="pair up"):
        HeadRows(rows.x, rows.label[:-1])
    with pytest.raises(DegenerateInputError, match="two labels or more"):
        HeadRows(rows.x, 0 * rows.label)
    with pytest.raises(InvalidInputError, match="count them from 0"):
        HeadRows(rows.x, rows.label - 1)
    with pytest.raises(InvalidInputError, match="non-finite"):
        HeadRows(rows.x / 0, rows.label)
    with pytest.raises(ShapeError, match="must agree"):
        ERM().fit(rows, validation=HeadRows(rows.x[:, 1:], rows.label))
    with pytest.raises(InvalidInputError, match="every label"):
        ERM().fit(rows, validation=several(300, 1).__class__(rows.x, 2 * rows.label))
    with pytest.raises(InvalidInputError, match="l2=−1"):
        ERM(l2=-1.0)
    with pytest.raises(InvalidInputError, match="one value of lambda"):
        JTT(extra=())
    with pytest.raises(InvalidInputError, match="above 0"):
        DFR(strengths=(0.0,))
    with pytest.raises(ShapeError, match="a row for each"):
        PoE(weak_x=rows.x[:5]).fit(rows)
    with pytest.raises(UnknownNameError, match="Did you mean GroupDRO"):
        HEADS["GroupDro"]
