"""The attribution doctor on attributions whose faults are known."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import circuits
from circuits.doctor import models
from circuits.doctor.attribution import Attribution, Method
from circuits.doctor.direct import Sizes
from circuits.doctor.examine import examined
from circuits.doctor.nodes import NodeCase, attributions_of
from circuits.doctor.report import NOT_CHECKED, DoctorReport
from circuits.graph.report import FoundCircuit
from tests.circuits.toys import exact_model, mixed_saes, pairs_of
from workbench.core.errors import InvalidInputError, MismatchError

F, N = 6, 48
SIZES = Sizes(draws=5, steps=(8, 64))
CHECK_1 = circuits.DoctorOptions(checks=(1,))
WEIGHTS = torch.tensor([1.5, -1.0, 0.8, 0.4, 0.0, 0.1], dtype=torch.float64)


def f(v: Tensor) -> Tensor:
    """A 6-feature function: weights, one interaction, one saturation; feature 4 does nothing."""
    return v @ WEIGHTS + 0.3 * v[:, 0] * v[:, 2] + 0.2 * torch.tanh(v[:, 3])


def folded(v: Tensor) -> Tensor:
    """The same function with its weights folded into the inputs."""
    w = v * torch.tensor([2.0, 0.5, 4.0, 1.0, 1.0, 8.0], dtype=torch.float64)
    half = torch.tensor([0.5, 2.0, 0.25, 1.0, 1.0, 0.125], dtype=torch.float64)
    return w @ (WEIGHTS * half) + 0.3 * (w[:, 0] * 0.5) * (w[:, 2] * 0.25) + 0.2 * torch.tanh(w[:, 3])


X = torch.randn(N, F, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3
ZERO = torch.zeros(F, dtype=torch.float64)


def shapley(fn: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor) -> Tensor:
    """Exact: mean over all sets of what putting one item more to the baseline does."""
    n = len(x)
    if n > 8:  # the planted functions have twelve items: permutations drawn, which keeps completeness
        orders = [torch.randperm(n, generator=torch.Generator().manual_seed(s)) for s in range(40)]
        masks = torch.stack([torch.stack([torch.isin(torch.arange(n), o[:k]) for k in range(n + 1)]) for o in orders])
        values = fn(torch.where(masks.flatten(0, 1), baseline, x)).unflatten(0, (len(orders), n + 1))
        phi = torch.zeros_like(x)
        for order, row in zip(orders, values, strict=True):
            phi[order] += (row[1:] - row[:-1]) / len(orders)
        return phi
    sets = torch.tensor(list(itertools.product([False, True], repeat=n)))
    values = fn(torch.where(sets, baseline, x))
    place = {tuple(s): i for i, s in enumerate(sets.tolist())}
    phi = torch.zeros_like(x)
    for s, value in zip(sets.tolist(), values.tolist(), strict=True):
        size = sum(s)
        for j in (j for j in range(n) if not s[j]):
            more = values[place[tuple(s[:j] + [True] + s[j + 1 :])]]
            phi[j] += math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n) * (more - value)
    return phi


def gradient_times_change(fn: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(fn(leaf[None]).sum(), leaf)
    return slope * (baseline - x)


def integrated(steps: int) -> Method:
    def method(fn: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor) -> Tensor:
        shares = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
        leaf = (x + shares[:, None] * (baseline - x)).requires_grad_(True)
        return torch.autograd.grad(fn(leaf).sum(), leaf)[0].mean(0) * (baseline - x)

    return method


def scores_of(method: Method, fn: Callable[[Tensor], Tensor] = f) -> np.ndarray:
    return torch.stack([method(fn, x, ZERO) for x in X]).numpy()


def effect(i: int, sets: np.ndarray) -> np.ndarray:
    every = torch.where(torch.as_tensor(sets), ZERO, X[i])
    return (f(every) - f(X[i : i + 1])).numpy()


def attribution(scores: np.ndarray, **more: Any) -> Attribution:
    labels = (f(X) > f(X).median()).long().numpy()
    return Attribution(
        name="toy", scores=scores, values=X.numpy(), effect=effect, labels=labels, prior=np.arange(float(F)), **more
    )


def found(report: DoctorReport, number: int) -> set[str]:
    return {check.outcome for check in report.checks if check.number == number}


def test_exact_shapley_values_pass() -> None:
    one = attribution(
        scores_of(shapley), adds_up=True, method=shapley, folded=lambda: scores_of(shapley, folded),
        steps=lambda _: scores_of(shapley),
    )  # fmt: skip
    report = examined("Shapley", [one], sizes=SIZES, method_name="Shapley")
    assert not {1, 2, 3, 4, 7, 8, 9} & set(report.numbers), report.failed
    assert {1, 2, 3, 4, 7, 8, 9} <= set(report.ran)
    assert report.verdict == "passed 7 checks" and found(report, 5) == {"not applicable"}
    assert any("Shapley cannot answer slope" in note for note in report.notes)
    frame = report.frame()
    why = frame[frame["outcome"] == "not applicable"]["why"]
    assert len(why) >= 4 and all(why), "what is not run is said, with the reason"


def test_a_flipped_sign_is_found() -> None:
    def flipped(fn: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor) -> Tensor:
        return -gradient_times_change(fn, x, baseline)

    report = examined("flipped", [attribution(scores_of(flipped), method=flipped)], sizes=SIZES)
    assert {3, 4, 9} <= set(report.numbers)
    upright = attribution(scores_of(gradient_times_change), method=gradient_times_change)
    assert not {3, 4, 9} & set(examined("upright", [upright], sizes=SIZES).numbers)


def test_random_scores_are_found() -> None:
    random = np.random.default_rng(1).standard_normal((N, F))
    report = examined("random", [attribution(random)], sizes=SIZES)
    assert {4, 7, 8} <= set(report.numbers), report.verdict
    assert "Not better than a ranking by" in " ".join(report.findings())


def test_a_path_cannot_answer_slope_and_a_gradient_can() -> None:
    ig, gradient = attribution(scores_of(integrated(10))), attribution(scores_of(gradient_times_change))
    said = {}
    for name, one, method in (("IG", ig, integrated(10)), ("AtP", gradient, gradient_times_change)):
        (said[name],) = [examined(name, [_with(one, method)], sizes=SIZES, checks=[2], method_name=name).notes or ("",)]
    assert said["IG"][0].startswith("IG cannot answer slope") and said["AtP"] == ("",)


def _with(one: Attribution, method: Method) -> Attribution:
    return dataclasses.replace(one, method=method)


def test_a_fixed_seed_passes_where_the_baseline_fails() -> None:
    scores = scores_of(integrated(10))
    random = np.random.default_rng(2)
    one = attribution(
        scores,
        settings={
            "seed": [lambda: scores] * 4,
            "baseline": [lambda: scores * random.standard_normal(scores.shape)] * 2,
        },
    )
    report = examined("planted", [one], sizes=SIZES, checks=[6])
    outcomes = {check.part: check for check in report.checks}
    assert outcomes["seed"].outcome == "pass" and outcomes["baseline"].outcome == "fail"
    assert outcomes["baseline"].why.startswith("Unstable to baseline") and len(outcomes["baseline"].spread) == 5
    assert report.verdict == "failed 1 of 1 check: settings"


def test_sums_must_fall_to_the_total_with_steps() -> None:
    one = attribution(scores_of(integrated(2)), adds_up=True, steps=lambda n: scores_of(integrated(n)))
    assert 1 not in examined("ig", [one], sizes=SIZES, checks=[1]).numbers
    constant = attribution(scores_of(integrated(2)) * 1.2, adds_up=True, steps=lambda _: scores_of(integrated(2)) * 1.2)
    report = examined("too large", [constant], sizes=SIZES, checks=[1])
    assert [c.part for c in report.failed] == ["gap as given", "gap at 64 steps, limit"]
    rising = attribution(
        scores_of(integrated(64)), adds_up=True, steps=lambda n: scores_of(integrated(64)) * (1 + n / 2000)
    )
    assert [c.part for c in examined("rising", [rising], sizes=SIZES, checks=[1]).failed] == [
        "rise of the gap from 8 to 64 steps"
    ]


def test_scores_that_do_not_see_the_model_are_found() -> None:
    scores = scores_of(gradient_times_change)
    values = np.abs(X.numpy())
    blind = attribution(values, randomised=[lambda: values], shuffled=lambda: values, folded=lambda: values * 1.001,
                        rescaled=lambda: values * (1 + 1e-9))  # fmt: skip
    report = examined("blind", [blind], sizes=SIZES, checks=[2, 5, 11])
    assert report.numbers == (2, 5, 11) and len([c for c in report.failed if c.number == 5]) == 2
    rounded = scores * (1 + 1e-7)  # made in batches of another size
    exact = dataclasses.replace(attribution(rounded, rescaled=lambda: scores), again=lambda: scores)
    assert examined("exact", [exact], sizes=SIZES, checks=[11]).failed == ()
    assert examined("not exact", [attribution(rounded, rescaled=lambda: scores)], sizes=SIZES, checks=[11]).failed
    draw = np.random.default_rng(3)
    sees = attribution(
        scores, randomised=[lambda: draw.standard_normal(scores.shape)], shuffled=lambda: -scores,
        folded=lambda: scores, rescaled=lambda: scores,
    )  # fmt: skip
    assert examined("sees", [sees], sizes=SIZES, checks=[2, 5, 11]).failed == ()


def test_deletion_and_insertion_stand_beside_a_random_band() -> None:
    def resampled(i: int, sets: np.ndarray) -> np.ndarray:
        every = torch.where(torch.as_tensor(sets), X[(i + 1) % N], X[i])
        return (f(every) - f(X[i : i + 1])).numpy()

    one = attribution(scores_of(gradient_times_change), resampled=resampled)
    report = examined("toy", [one], sizes=SIZES, checks=[10])
    assert report.failed == () and sum("band" in check.part for check in report.checks) == 2
    turned = attribution(1 / (scores_of(gradient_times_change) + 1e-3), resampled=resampled)
    assert examined("smallest first", [turned], sizes=SIZES, checks=[10]).numbers == (10,)


def test_nothing_checked_says_so() -> None:
    report = examined("bare", [Attribution(name="bare", scores=np.ones((3, 2)))], sizes=SIZES)
    assert report.ran == () and report.verdict == NOT_CHECKED and report.headline().verdict == "not measured"


def failing() -> DoctorReport:
    return examined("random", [attribution(np.random.default_rng(1).standard_normal((N, F)))], sizes=SIZES, checks=[4])


def test_the_verdict_travels_with_what_is_made_of_the_effects(tmp_path: Path) -> None:
    model, pairs = exact_model(), pairs_of()
    bases, metric = circuits.neurons(model, ["resid_post.0", "resid_post.1"]), circuits.logit_difference()
    effects = circuits.node_effects(model, bases, pairs, metric, steps=2)
    edges = circuits.edge_effects(model, bases, pairs, metric, effects.circuit(n=6))
    report = failing()
    for thing in (effects, effects.circuit(n=6), edges):
        assert thing.verdict == NOT_CHECKED and thing.frame().attrs == {"doctor": NOT_CHECKED, "doctor_failed": []}
        assert NOT_CHECKED in repr(thing) and NOT_CHECKED in thing._repr_html_()
        assert thing.stamped(report).frame().attrs == {"doctor": report.verdict, "doctor_failed": [4]}
        assert report.verdict in thing.stamped(report)._repr_html_() and report.verdict in repr(thing.stamped(report))
    circuit = effects.stamped(report).circuit(n=6)
    read = circuits.load_circuit(circuit.save(tmp_path / "c"))
    graph = circuits.load_graph_json(circuit.to_graph_json(tmp_path / "g.json"))
    for one in (circuit, read, graph.circuit, circuit.with_labels({}), circuit.united(effects.circuit(n=9))):
        assert one.doctor is not None and one.doctor.to_json() == report.to_json() and one.verdict == report.verdict
        assert "FAILED: rankings without gradient" in one._repr_html_()
    assert effects.circuit(n=9).united(circuit).verdict == report.verdict, "a failure is not lost"
    assert effects.stamped(report).merged(effects).verdict == NOT_CHECKED, "other examples were not examined"
    found = FoundCircuit(circuit=circuit, gaps=effects.gaps, n=effects.n, metric=effects.metric).section()
    assert "FAILED" in found.blocks[0].title and any(report.verdict in said for said in found.findings)  # type: ignore[union-attr]
    page = effects.circuit(n=6).to_html(tmp_path / "page.html", edges.stamped(report)).read_text(encoding="utf-8")
    assert '"watermark":"FAILED: rankings without gradient"' in page and report.verdict in page
    page = effects.circuit(n=6).to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert '"watermark":""' in page and f"Attribution doctor: {NOT_CHECKED}." in page
    with pytest.raises(InvalidInputError, match=r"stamped\(report=3\)"):
        circuit.stamped(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["ig", "atp", "exact"])
def test_effects_of_nodes_are_examined_by_their_own_method(method: Literal["ig", "atp", "exact"]) -> None:
    model, pairs = exact_model(), pairs_of()
    bases, metric = mixed_saes(["resid_post.0"]), circuits.logit_difference()
    effects = circuits.node_effects(model, bases, pairs, metric, method=method, steps=4)
    checks = () if method == "ig" else (1, 2, 6, 9, 11) if method == "atp" else (1, 2)
    options = circuits.DoctorOptions(inputs=3, items=6, sites=1, steps=(4, 8), checks=checks)
    report = circuits.attribution_doctor(effects, model, bases, pairs, metric, method=method, steps=4, options=options)
    assert {2, *({9} if method != "exact" else ())} <= set(report.ran) - set(report.numbers), report.failed
    values = {check.part: check.value for check in report.checks}
    assert method == "exact" or values["change under rescaled norm gains"] == 0.0
    folded = values["change with folded weights"]
    assert isinstance(folded, float) and 0 < folded < 1e-10
    assert (1 in report.ran) == (method != "exact") and (1 in report.numbers) == (method == "atp")
    assert any("cannot answer slope" in note for note in report.notes) == (method != "atp")
    settings = {check.part: check.outcome for check in report.checks if check.number == 6}
    known = {"ig": {"seed", "baseline", "steps", "rule"}, "atp": {"seed", "baseline"}, "exact": set()}
    assert settings.keys() == known[method] and settings.get("seed", "pass") == "pass"


def test_effects_of_single_nodes_are_those_of_exact_effects() -> None:
    """The doctor measures by its own path; `exact_effects` is the reference."""
    model, pairs, site = exact_model(), pairs_of(), "mlp_out.1"
    bases, metric = mixed_saes([site]), circuits.logit_difference()
    effects = circuits.node_effects(model, bases, pairs, metric)
    case = NodeCase(model=model, bases=circuits.bases(model, bases), examples=pairs, metric=metric)
    (one,), _ = attributions_of(effects, case, len(pairs), 1)
    circuit = effects.circuit(threshold=1e-9)
    reference = circuits.exact_effects(model, bases, pairs, metric, circuit)[site]
    items = torch.cat([reference.feature.unique()])
    assert one.effect is not None and one.scores.shape[1] == len(items) and int(items[0]) == -1
    singles = np.stack([one.effect(i, np.eye(len(items), dtype=bool)) for i in range(len(pairs))])
    wanted = torch.zeros(len(pairs), len(items), dtype=torch.float64)
    wanted[reference.example, torch.searchsorted(items, reference.feature)] = reference.value
    np.testing.assert_allclose(singles, wanted.numpy(), atol=1e-12)
    total = one.total()
    assert total is not None
    np.testing.assert_allclose(total, effects[site].total.numpy(), atol=1e-12)


def test_effects_of_other_settings_are_refused() -> None:
    model, pairs = exact_model(), pairs_of()
    bases, metric = circuits.neurons(model, ["resid_post.0"]), circuits.logit_difference()
    effects = circuits.node_effects(model, bases, pairs, metric, method="atp")
    with pytest.raises(MismatchError, match="others than those given"):
        circuits.attribution_doctor(effects, model, bases, pairs, metric)
    with pytest.raises(MismatchError, match="4 examples"):
        circuits.attribution_doctor(effects, model, bases, pairs[:2], metric, method="atp")
    with pytest.raises(InvalidInputError, match="Give model, bases, examples"):
        circuits.attribution_doctor(effects)
    with pytest.raises(InvalidInputError, match=r"checks=\[12\]"):
        options = circuits.DoctorOptions(checks=(12,))
        circuits.attribution_doctor(attribution(np.ones((N, F))), options=options)
    of_last = circuits.node_effects(model, bases, pairs, metric, aggregation="last")
    with pytest.raises(InvalidInputError, match="aggregation='last'"):
        circuits.attribution_doctor(of_last, model, bases, pairs, metric)


def test_random_weights_are_nested_and_the_last_part_is_everything() -> None:
    model = exact_model()
    changed = []
    for part in range(1, models.PARTS + 1):
        made = models.randomised(model, part)
        pairs = zip(model.hf.named_parameters(), made.hf.parameters(), strict=True)
        changed.append({name for (name, a), b in pairs if not torch.equal(a, b)})
    assert changed[0] < changed[1] < changed[2] == {name for name, _ in model.hf.named_parameters()}
    assert all(".2." in name for name in changed[0])


def test_edits_needed_is_hoeffdings_number() -> None:
    assert circuits.edits_needed(0.1, 0.05) == 185 and circuits.edits_needed(0.05, 0.05) == 738
    with pytest.raises(InvalidInputError, match="between 0 and 1"):
        circuits.edits_needed(0.0)


def test_tables_are_examined_and_carry_the_verdict() -> None:
    model, pairs = exact_model(), pairs_of()
    direct = circuits.direct_logit_attribution(model, pairs)
    report = circuits.attribution_doctor(direct, model, examples=pairs)
    assert {1, 3, 4, 5, 11} <= set(report.ran) and not {1, 2, 11} & set(report.numbers), report.failed
    broken = dataclasses.replace(direct, parts=direct.parts[1:])
    assert 1 in circuits.attribution_doctor(broken, options=CHECK_1, model=model, examples=pairs).numbers
    grid = circuits.patch_grid(model, pairs, sites=["attn_out", "z.1.h1"])
    of_grid = circuits.attribution_doctor(grid, model, examples=pairs, metric=circuits.logit_difference())
    assert found(of_grid, 3) == {"not applicable"} and {2, 5, 6, 11} <= set(of_grid.ran)
    assert not {2, 11} & set(of_grid.numbers)
    for table, its in ((direct, report), (grid, of_grid)):
        assert any(NOT_CHECKED in said for said in table.findings())
        marked = table.stamped(failing())
        assert marked.frame().attrs["doctor_failed"] == [4] and any(failing().verdict in s for s in marked.findings())
        assert "FAILED: rankings" in marked.section().blocks[0].title  # type: ignore[union-attr]
        assert table.stamped(its).to_json()["doctor"] is not None
    with pytest.raises(MismatchError, match="4 pairs, and 2"):
        circuits.attribution_doctor(direct, model, examples=pairs[:2])


def test_edges_are_examined_by_making_them_again() -> None:
    model, pairs, metric = exact_model(), pairs_of(), circuits.logit_difference()
    bases = mixed_saes(["resid_post.0", "resid_post.1"])
    circuit = circuits.node_effects(model, bases, pairs, metric, steps=2).circuit(n=16)
    edges = circuits.edge_effects(model, bases, pairs, metric, circuit)
    report = circuits.attribution_doctor(edges, model, bases, pairs, metric, circuit=circuit)
    assert {2, 5, 6, 11} == set(report.ran) and not {2, 11} & set(report.numbers), report.failed
    assert edges.stamped(report).verdict == report.verdict
    with pytest.raises(InvalidInputError, match="Give bases, metric and circuit"):
        circuits.attribution_doctor(edges, model, bases, pairs, metric)
