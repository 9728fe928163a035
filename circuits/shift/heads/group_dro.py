"""GroupDRO: the smallest loss of the worst group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from circuits.shift.heads.base import HEADS, Head, HeadMethod, Regime, require_above
from circuits.shift.heads.rows import HeadRows
from circuits.shift.heads.solve import Scale, cross_entropy, fit_softmax
from workbench.core.arguments import checked
from workbench.core.numbers import counted, number


def updated_weights(
    q: Float[np.ndarray, " groups"], losses: Float[np.ndarray, " groups"], eta: float
) -> Float[np.ndarray, " groups"]:
    """`q_g exp(eta L_g)`, normalised: groups with a larger loss gain weight.

    >>> updated_weights(np.array([0.5, 0.5]), np.log(np.array([3.0, 1.0])), eta=1.0)  # 0.5 * 3 and 0.5 * 1
    array([0.75, 0.25])
    """
    grown = q * np.exp(eta * (losses - losses.max()))
    return grown / grown.sum()


@HEADS.register("GroupDRO")
@checked
@dataclass(frozen=True, kw_only=True)
class GroupDRO(HeadMethod):
    """Minimises the largest mean loss of a group.

    In each round the loss `sum_g q_g L_g` is solved for and the weights q are updated from its group losses. It ends
    when no group's loss is above the weighted one by more than `tolerance`.

    Attributes:
        eta: step size of the weights.
        rounds: most rounds.
        adjustment: C of `C / sqrt(n_g)`, which is added to the loss of a group.
        l2: strength of `l2 / 2 |W|^2` against n times the mean loss, on standardised features.
        tolerance: in nats.

    Source: Sagawa et al. 2020 (arXiv 1911.08731), algorithm 1. Departure: on frozen features each round is solved to
    convergence instead of one batch, so `eta` is 1 and not the published 0.01 per batch.
    """

    name: ClassVar[str] = "GroupDRO"
    regime: ClassVar[Regime] = "R2"
    information: ClassVar[str] = "labels and attribute labels of the training rows"
    eta: float = 1.0
    rounds: int = 300
    adjustment: float = 0.0
    l2: float = 1.0
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        options = {"eta": self.eta, "adjustment": self.adjustment, "l2": self.l2, "tolerance": self.tolerance}
        require_above("GroupDRO", 0, **options)
        require_above("GroupDRO", 1, rounds=self.rounds)

    def solve(self, rows: HeadRows, validation: HeadRows | None, seed: int) -> Head:  # noqa: ARG002
        """The head whose worst group has the least loss."""
        groups, (x, y) = rows.groups(self.name), rows.arrays()
        scale, place = Scale.of(x), np.searchsorted(groups.present, groups.id)
        z, n_g = scale(x), groups.n[groups.present]
        q, linear, gap = np.full(len(n_g), 1 / len(n_g)), None, np.inf
        for _ in range(self.rounds):
            linear = fit_softmax(z, y, rows.n_labels, l2=self.l2, weights=len(y) * (q / n_g)[place], start=linear)
            means = np.bincount(place, cross_entropy(linear(z), y)) / n_g
            losses = means + self.adjustment / np.sqrt(n_g)
            gap = float(losses.max() - q @ losses)
            if gap <= self.tolerance:
                break
            q = updated_weights(q, losses, self.eta)
        assert linear is not None
        late = f"the loss of the worst group is still {number(gap)} nats above the weighted loss after "
        notes = (late + counted(self.rounds, "rounds"),) if gap > self.tolerance else ()
        return self.head(scale.folded(linear), n_attribute_labels=len(rows), notes=(*groups.notes("training"), *notes))
