"""Arms of a comparison: an edit or none, at a strength, each with what it is a control for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, UnknownNameError, did_you_mean
from workbench.core.html import Shown
from workbench.core.numbers import setting
from workbench.interventions.op import Op
from workbench.interventions.ops import PerRow

if TYPE_CHECKING:
    import pandas as pd


@runtime_checkable
class RowEdits(Protocol):
    """One or more edits; each is made on every prompt (or text), so rows are edits times prompts, edit by edit."""

    def __len__(self) -> int:
        """Number of edits."""
        ...

    def op(self, rows: Int[Tensor, " rows"], n_prompts: int) -> Op:
        """The edit of a batch: row r is prompt `r % n_prompts` under edit `r // n_prompts`."""
        ...


@checked
@dataclass(frozen=True, eq=False)
class InTurn(OneLine):
    """One edit that is another one for each prompt: prompt i gets op number i, in turn, as random controls do."""

    ops: tuple[Op, ...]

    def __len__(self) -> int:
        return 1

    def op(self, rows: Int[Tensor, " rows"], n_prompts: int) -> Op:
        """The edit of a batch."""
        return PerRow(self.ops, rows % n_prompts % len(self.ops))


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Arm(OneLine):
    """One way to treat the model.

    Attributes:
        name: unique within a sweep.
        kind: what is done, the same at every strength.
        strength: how much of it, in the kind's own unit; 0 where nothing is edited.
        edits: what is done to each row; None leaves the model as it is.
        control_for: names of the arms that this one is a control for; none for an arm that is no control.
    """

    name: str
    kind: str
    strength: float = 0.0
    edits: RowEdits | None = None
    control_for: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf or (self.edits is None) != (self.strength == 0):
            raise InvalidInputError(
                f"Arm({self.name!r}): strength {self.strength} {'without' if self.edits is None else 'with'} an edit. "
                "Give a positive, finite strength to an arm with an edit, and 0 to one without."
            )


@checked
@dataclass(frozen=True, eq=False)
class Sweep(Shown):
    """Arms that run on the same prompts: kinds of edits over their strengths, each beside its controls.

    Raises:
        InvalidInputError: for two arms of the same name.
        UnknownNameError: for a control of an arm that is not there.
        DegenerateInputError: for an edit that is no control and has none of its own strength.
    """

    arms: tuple[Arm, ...]

    def __post_init__(self) -> None:
        twice = [name for name, n in Counter(arm.name for arm in self.arms).items() if n > 1]
        if twice:
            raise InvalidInputError(
                f"Sweep: {len(self.arms)} arms, and {twice} are there twice. Name each differently."
            )
        controlled = {(name, arm.strength) for arm in self.arms for name in arm.control_for}
        for arm in self.arms:
            for name in arm.control_for:
                self.arm(name)
            if arm.edits is not None and not arm.control_for and (arm.name, arm.strength) not in controlled:
                raise DegenerateInputError(
                    f"Sweep: arm {arm.name!r} of strength {setting(arm.strength)} has no control of this strength "
                    f"among {[other.name for other in self.arms]}. Add one, such as a random direction of its norm."
                )

    @classmethod
    def over(
        cls,
        strengths: Sequence[float],
        subjects: Mapping[str, Callable[[float], RowEdits]],
        controls: Mapping[str, Callable[[float], RowEdits]],
        label: str = "{kind} x{strength}",
    ) -> Sweep:
        """What is studied at every strength, each time followed by the controls at this strength.

        Args:
            strengths: of the arms.
            subjects: what is studied: its edits at a strength, by kind.
            controls: the same of the controls; each is a control for all subjects.
            label: name of an arm; a format such as `{strength:.1f}` holds. Without one, strengths that are equal to six
                digits are written out.
        """
        values = [float(strength) for strength in strengths]
        shown = [f"{value:g}" for value in values]
        if len(set(shown)) < len(set(values)):
            shown = [str(value) for value in values]
        arms: list[Arm] = []
        for strength, text in zip(values, shown, strict=True):
            named = partial(label.format, strength=text if "{strength}" in label else strength)
            names = tuple(named(kind=kind) for kind in subjects)
            for kind, edits in (*subjects.items(), *controls.items()):
                arms.append(
                    Arm(
                        name=named(kind=kind), kind=kind, strength=strength,
                        edits=edits(strength), control_for=names if kind in controls else (),
                    )
                )  # fmt: skip
        return cls(tuple(arms))

    def __add__(self, other: Sweep) -> Sweep:
        return Sweep((*self.arms, *other.arms))

    def __iter__(self) -> Iterator[Arm]:
        return iter(self.arms)

    def __len__(self) -> int:
        return len(self.arms)

    def frame(self) -> pd.DataFrame:
        """One row per arm: name, kind, strength, and what it is a control for."""
        import pandas as pd

        columns = ("name", "kind", "strength", "control_for")
        return pd.DataFrame([{name: getattr(arm, name) for name in columns} for arm in self.arms])

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of arms, in their order."""
        return tuple(dict.fromkeys(arm.kind for arm in self.arms))

    def of(self, kind: str) -> tuple[Arm, ...]:
        """The arms of one kind, in their order."""
        return tuple(arm for arm in self.arms if arm.kind == kind)

    def arm(self, name: str) -> Arm:
        """The arm of this name.

        Raises:
            UnknownNameError: if there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise UnknownNameError(f"arm {name!r}: {did_you_mean(name, tuple(arm.name for arm in self.arms))}")

    def control(self, arm: Arm) -> Arm | None:
        """The first control of an arm; None for one that has none."""
        return next((other for other in self.arms if arm.name in other.control_for), None)


UNEDITED = Arm(name="unsteered", kind="unsteered")
"""The model as it is, beside every edit."""
