"""SHIFT on cues built into texts, at several strengths: one cue, and two of which one may stand in for the other."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from circuits.cues.known import known_cue
from circuits.cues.making import with_cues
from circuits.cues.named import cue_named
from experiments.shift_grid import Cell, GridStudy, with_fewer_balanced
from experiments.shift_task import fair_biographies
from workbench.cli import main_of
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import setting


@dataclass(frozen=True, kw_only=True)
class ShiftCues(GridStudy):
    """Remove cues of known strength from a probe.

    Biographies whose gender says nothing; a cue agrees with the label in a share rho of the training texts.

    Example: python -m experiments.shift_cues --sae saes/l11
    """

    run_name, step = "shift-cues", "overview"

    cues: tuple[str, ...] = ("token-end:©", "token-end:®+token-end:©")
    """Tasks: one cue, or several joined by +, of which the last is known; names as in `workbench shift --cue`."""
    rhos: tuple[float, ...] = (0.9, 0.95, 0.99, 1.0)
    """Shares of training texts in which each cue agrees with the label."""
    train_rows: int = 200
    """Training texts of each task; 200 has exact counts at every one of these shares."""
    test_rows: int = 240
    """Test texts, the same number of every group."""
    balanced_rows: int = 160
    """Balanced rows, for oracles and for methods that see attribute labels."""
    judge: str = "auto"
    """Who calls a feature spurious; auto: statistics of twins for one cue that is put into texts, else within-label."""

    def cells(self) -> list[Cell]:
        if not self.cues or not self.rhos:
            raise InvalidInputError("--cues and --rhos: give one of each at least.")
        base = fair_biographies(("professor", "nurse"), self.train_rows, self.test_rows, self.seed)
        cells = []
        for i, names in enumerate(self.cues):
            cues = [cue_named(name) for name in names.split("+")]
            for rho in self.rhos:
                task = with_cues(base, cues, rho, self.seed, n_train=self.train_rows, n_test=self.test_rows)
                if len(cues) > 1:
                    task = known_cue(task, cues[-1])
                task = with_fewer_balanced(task, self.balanced_rows)
                twins = "statistics" if task.swapped is not None else "within-label"
                judge = twins if self.judge == "auto" else self.judge
                title = f"{' and '.join(cue.name for cue in cues)}, rho {setting(rho)}"
                cells.append(Cell(name=f"cue{i}-rho{setting(rho)}", title=title, task=task, judge=judge))
        return cells

    def about(self) -> tuple[str, str]:
        return (
            "SHIFT on cues of known strength",
            "Biographies of professors and nurses whose gender says nothing. A cue is built in so that it agrees with "
            "the profession in a share rho of the training texts, in exact counts; in the test all groups are equally "
            "large. Of two cues the last is known (attribute, twins), the other is not. At rho 1 no training text "
            "tells cue and label apart: only methods that see more than labels can.",
        )


if __name__ == "__main__":
    sys.exit(main_of(ShiftCues, "python -m experiments.shift_cues"))
