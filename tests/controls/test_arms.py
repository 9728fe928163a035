from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from workbench.controls.arms import UNEDITED, Arm, InTurn, Sweep
from workbench.controls.methods import Method, comparisons, methods_of
from workbench.core.errors import DegenerateInputError, InvalidInputError, UnknownNameError
from workbench.interventions.op import Op, Where
from workbench.interventions.ops import Add


class OneVector:
    """A stand-in for edits: the same vector for every row."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __len__(self) -> int:
        return 1

    def op(self, rows: Tensor, n_prompts: int) -> Op:
        return Add(torch.ones(len(rows), n_prompts), self.strength)


def arm(name: str, strength: float = 1.0, control_for: str = "") -> Arm:
    return Arm(
        name=name,
        kind=name,
        strength=strength,
        edits=OneVector(strength),
        control_for=(control_for,) if control_for else (),
    )


def test_a_sweep_pairs_every_edit_with_its_controls_of_the_same_strength() -> None:
    sweep = Sweep((UNEDITED,)) + Sweep.over(
        (0.5, 2.0), {"feature": OneVector}, {"random": OneVector, "negated": OneVector}
    )
    names = ["unsteered", "feature x0.5", "random x0.5", "negated x0.5", "feature x2", "random x2", "negated x2"]
    assert [one.name for one in sweep] == names and sweep.kinds == ("unsteered", "feature", "random", "negated")
    control = sweep.control(sweep.arm("feature x2"))
    assert control is not None and control.name == "random x2" and control.strength == 2.0
    assert sweep.control(UNEDITED) is None
    assert [one.edits.strength for one in sweep.of("feature") if isinstance(one.edits, OneVector)] == [0.5, 2.0]
    with pytest.raises(UnknownNameError, match="feature x2"):
        sweep.arm("feature x20")
    near = Sweep.over((1.0, 1.0000001), {"feature": OneVector}, {"random": OneVector})
    assert [one.name for one in near.of("feature")] == ["feature x1.0", "feature x1.0000001"]
    control = near.control(near.arm("feature x1.0000001"))
    assert control is not None and control.strength == 1.0000001
    named = Sweep.over((0.5,), {"feature": OneVector}, {"random": OneVector}, label="{kind} {strength:.2f}")
    assert [one.name for one in named] == ["feature 0.50", "random 0.50"]
    with pytest.raises(InvalidInputError, match="twice"):
        Sweep.over((1.0, 1.0), {"feature": OneVector}, {"random": OneVector})


def test_an_edit_without_a_control_of_its_strength_is_refused() -> None:
    with pytest.raises(DegenerateInputError, match="no control of this strength"):
        Sweep((UNEDITED, arm("feature")))
    with pytest.raises(DegenerateInputError, match="no control of this strength"):
        Sweep((arm("feature", 2.0), arm("random", 1.0, "feature")))
    with pytest.raises(UnknownNameError, match="feature"):
        Sweep((arm("random", 1.0, "featur"), arm("feature")))
    with pytest.raises(InvalidInputError, match="twice"):
        Sweep((UNEDITED, UNEDITED))
    with pytest.raises(DegenerateInputError, match="no control"):
        Sweep.over((1.0,), {"feature": OneVector}, {})


@pytest.mark.parametrize("strength", [0.0, -1.0, math.inf, math.nan])
def test_an_edit_has_a_positive_finite_strength(strength: float) -> None:
    with pytest.raises(InvalidInputError, match="strength"):
        arm("feature", strength)
    with pytest.raises(InvalidInputError, match="without an edit"):
        Arm(name="plain", kind="plain", strength=1.0)


def test_methods_are_kept_in_order_and_a_name_is_taken_once() -> None:
    double: Method[int, int] = Method(
        name="double", information="the number", run=lambda x: 2 * x, compared_with=("zero",)
    )
    zero: Method[int, int] = Method(name="zero", information="nothing", run=lambda _: 0, role="control")
    methods = methods_of([double, zero])
    assert list(methods) == ["double", "zero"] and [method.run(3) for method in methods.values()] == [6, 0]
    assert comparisons(methods) == (("double", "zero"),)
    with pytest.raises(InvalidInputError, match="already"):
        methods_of([double, zero, Method(name="zero", information="one", run=lambda _: 1)])
    with pytest.raises(UnknownNameError, match="double"):
        methods["doubl"]
    with pytest.raises(UnknownNameError, match="zero"):
        comparisons(methods_of([double]))


def test_one_control_serves_several_subjects() -> None:
    sweep = Sweep.over((1.0,), {"probe": OneVector, "PCA": OneVector}, {"random": OneVector})
    assert sweep.arm("random x1").control_for == ("probe x1", "PCA x1")
    assert [sweep.control(one) for one in sweep.arms[:2]] == [sweep.arm("random x1")] * 2


def test_a_random_control_is_another_for_each_prompt_in_turn() -> None:
    edits = InTurn(tuple(Add(torch.eye(3)[i]) for i in range(3)))
    assert len(edits) == 1
    h = edits.op(torch.arange(4), 4)(torch.zeros(4, 3), Where(torch.arange(4), torch.zeros(4, dtype=torch.long)))
    assert h.argmax(1).tolist() == [0, 1, 2, 0]
    h = edits.op(torch.tensor([2, 3]), 4)(torch.zeros(2, 3), Where(torch.arange(2), torch.zeros(2, dtype=torch.long)))
    assert h.argmax(1).tolist() == [2, 0], "a part of the rows keeps their edits"
