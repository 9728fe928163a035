"""PDE: begins with a balanced subset and adds other rows little by little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from circuits.shift.heads.base import HEADS, NO_SELECTION, Head, HeadMethod, Regime, require_above
from circuits.shift.heads.rows import HeadRows
from circuits.shift.heads.solve import Descent, DescentRun, Linear, Scale
from workbench.core.arguments import checked
from workbench.core.numbers import counted


@HEADS.register("PDE")
@checked
@dataclass(frozen=True, kw_only=True)
class PDE(HeadMethod):
    """Progressive data expansion, by gradient descent on standardised features.

    After `warm_up` epochs on a group-balanced draw, `added` random rows that were not used yet join every `interval`
    epochs, until `epochs` are over or no row is left. With attribute labels of validation rows the stage with the best
    worst-group accuracy there is kept, otherwise the last.

    Attributes:
        warm_up: epochs on the balanced draw.
        interval: epochs between two expansions.
        added: rows per expansion.
        epochs: in all.
        lr: step size.
        weight_decay: `weight_decay / 2 |W|^2` is added to the mean loss of a batch.
        batch: rows per step.

    Source: Deng et al. 2023 (arXiv 2306.04949); defaults are those for Waterbirds, with momentum 0.9. Departure: rows
    are added without replacement.
    """

    name: ClassVar[str] = "PDE"
    regime: ClassVar[Regime] = "R2"
    information: ClassVar[str] = "labels and attribute labels of the training rows; validation rows to choose a stage"
    warm_up: int = 140
    interval: int = 10
    added: int = 10
    epochs: int = 300
    lr: float = 0.01
    weight_decay: float = 0.01
    batch: int = 64

    def __post_init__(self) -> None:
        counts = {"warm_up": self.warm_up, "interval": self.interval, "added": self.added, "batch": self.batch}
        require_above("PDE", 1, **counts)
        require_above("PDE", self.warm_up, epochs=self.epochs)
        require_above("PDE", 0, lr=self.lr, weight_decay=self.weight_decay)

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:
        """The head of one of the stages."""
        groups, (x, y) = rows.groups(self.name), rows.arrays()
        random, scale = np.random.default_rng(seed), Scale.of(x)
        used = groups.balanced(random)
        unused = random.permutation(np.setdiff1d(np.arange(len(y)), used))
        how = Descent(lr=self.lr, weight_decay=self.weight_decay, batch=self.batch)
        run = DescentRun(scale(x), y, rows.n_labels, how, seed)
        stages = [scale.folded(run.epochs(self.warm_up, used))]
        for _ in range((self.epochs - self.warm_up) // self.interval):
            used, unused = np.concatenate([used, unused[: self.added]]), unused[self.added :]
            stages.append(scale.folded(run.epochs(self.interval, used)))
            if not len(unused):
                break
        linear, selection, labels = _best(stages, validation)
        notes = (*groups.notes("training"), f"{counted(len(used), 'rows')} of {len(y)} in the last stage")
        return self.head(linear, n_attribute_labels=len(rows) + labels, selection=selection, notes=notes)


def _best(stages: list[Linear], validation: HeadRows | None) -> tuple[Linear, str, int]:
    if validation is None or validation.attribute is None:
        return stages[-1], NO_SELECTION, 0
    groups, (x, y) = validation.groups("PDE"), validation.arrays()
    best = int(np.argmax([groups.worst(stage.predict(x) == y) for stage in stages]))
    selection = f"stage {best + 1} of {len(stages)}, by worst-group accuracy on {len(y)} validation rows"
    return stages[best], selection, len(y)
