"""Every candidate for the refusal direction: a position behind the instruction and a layer, with what it does.

Source: Arditi et al. 2024 (arXiv:2406.11717), sections 2.3 and C. Departures: prompts of both sets are split here;
refusal tokens are proposed from the model itself where none are given; where their filters leave nothing, the filters
are loosened in a fixed order and the result says so; random directions of the same length stand beside the chosen one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import require
from workbench.core.html import Shown
from workbench.core.numbers import counted, number
from workbench.core.stats import Estimate
from workbench.hooks.sites import Site

if TYPE_CHECKING:
    import pandas as pd

NO_DIRECTION, LATE, LOW_INDUCE, HIGH_KL = "no difference of means", "late layer", "does not induce", "changes harmless"
"""Why a candidate is not taken."""


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate(OneLine):
    """One difference of means, read at the input of a block.

    Attributes:
        position: of the token that is read, counted from the end of the prompt; -1 is the last one.
        layer: whose input is read.
        vector: mean over harmful minus mean over harmless prompts.
        norm: of the vector.
        bypass: log-odds of refusal on harmful prompts with the direction ablated everywhere, in nats; low is effective.
            None where it was not measured.
        induce: log-odds of refusal on harmless prompts with the vector added at that layer; high is effective.
        kl: of the next token on harmless prompts under ablation, in nats; low is harmless.
        removed_by: which filter took it out, "" for none.
    """

    position: int
    layer: int
    vector: Float[Tensor, " d_model"]
    norm: float
    bypass: Estimate | None = None
    induce: Estimate | None = None
    kl: Estimate | None = None
    removed_by: str = ""

    @property
    def site(self) -> Site:
        """Where the vector was read, and where `addition` adds it."""
        return Site("resid_pre", self.layer)


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class DirectionTable(Shown):
    """All candidates with what they do on prompts that no direction was made of.

    Attributes:
        candidates: one per position and layer.
        best: the lowest bypass among those that no filter removed, or with the filters in `loosened` left out.
        loosened: filters that had to be left out because they left no candidate.
        refusal_tokens: texts of the tokens whose probability counts as refusal.
        base_harmful: log-odds of refusal on harmful validation prompts without an edit.
        base_harmless: the same on harmless ones.
        control_bypass: bypass of random directions in the place of the best, over draws.
        control_induce: induce of random vectors of its length at its layer, over draws.
        difference: log-odds on harmful prompts under ablation of the best minus those of the random directions' mean,
            paired by prompt; negative where the direction matters.
        n_train: harmful and harmless prompts that vectors were made of.
        n_val: those on which everything was measured.
        notes: what was left out, in words.
    """

    candidates: tuple[Candidate, ...]
    best: Candidate
    loosened: tuple[str, ...]
    refusal_tokens: tuple[str, ...]
    base_harmful: Estimate
    base_harmless: Estimate
    control_bypass: Estimate
    control_induce: Estimate
    difference: Estimate
    n_train: tuple[int, int]
    n_val: tuple[int, int]
    notes: tuple[str, ...] = ()

    def frame(self) -> pd.DataFrame:
        """One row per candidate, the best first: what it does with its interval, and the filter that removed it."""
        import pandas as pd

        rows = []
        for c in sorted(self.candidates, key=lambda c: (c is not self.best, bool(c.removed_by), _low(c.bypass))):
            row: dict[str, object] = {"position": c.position, "layer": c.layer, "norm": c.norm}
            for name in ("bypass", "induce", "kl"):
                value: Estimate | None = getattr(c, name)
                row |= {
                    name: math.nan if value is None else value.value,
                    f"{name}_low": math.nan if value is None else value.low,
                    f"{name}_high": math.nan if value is None else value.high,
                }
            rows.append({**row, "removed_by": c.removed_by, "is_best": c is self.best})
        return pd.DataFrame(rows)

    @property
    def df(self) -> pd.DataFrame:
        """The same as `frame()`."""
        return self.frame()

    def _shown_line(self) -> str:
        b = self.best
        left = sum(not c.removed_by for c in self.candidates)
        loosened = (
            f"; no candidate passed every filter, so without: {', '.join(self.loosened)}" if self.loosened else ""
        )
        return (
            f"position {b.position}, layer {b.layer}: ablating it takes the log-odds of refusal of harmful prompts "
            f"from {self.base_harmful} to {b.bypass} (random directions {self.control_bypass}), adding it those of "
            f"harmless ones from {self.base_harmless} to {b.induce} (random {self.control_induce}); "
            f"{left} of {counted(len(self.candidates), 'candidates')} pass the filters{loosened}"
        )


def _low(value: Estimate | None) -> float:
    return math.inf if value is None else value.value


@checked
@dataclass(frozen=True, kw_only=True)
class SelectOptions(OneLine):
    """How the refusal direction is chosen.

    Attributes:
        positions: tokens that are read, counted from the end; None takes all that the chat template puts behind the
            instruction.
        val_share: share of the prompts that candidates are measured on; the others make them.
        max_kl: largest KL on harmless prompts, in nats.
        min_induce: smallest log-odds of refusal on harmless prompts when the vector is added.
        late_layers: share of the layers, the last ones, whose directions are not taken.
        filter_prompts: leave out harmful prompts that the model does not refuse and harmless ones that it does, by the
            log-odds of the first token.
        full_table: measure every candidate in full; otherwise what a filter removes is not measured further.
        controls: random directions beside the best one.
        batch_size: rows per forward pass.
        seed: of the split and the random directions.
    """

    positions: tuple[int, ...] | None = None
    val_share: float = 0.25
    max_kl: float = 0.1
    min_induce: float = 0.0
    late_layers: float = 0.2
    filter_prompts: bool = True
    full_table: bool = False
    controls: int = 4
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("val_share", 0.0, 1.0), ("late_layers", -1e-9, 1.0)):
            value = getattr(self, name)
            require(low < value < high, f"SelectOptions({name}={number(value)})", f"between {number(abs(low))} and 1")
        for name in ("controls", "batch_size"):
            require(getattr(self, name) >= 1, f"SelectOptions({name}={getattr(self, name)})", "at least 1")
        require(
            self.positions is None or (len(self.positions) > 0 and max(self.positions) < 0),
            f"SelectOptions(positions={self.positions})", "counted from the end, such as (-1, -2)",
        )  # fmt: skip


def best_of(candidates: Sequence[Candidate], options: SelectOptions) -> tuple[Candidate | None, tuple[str, ...]]:
    """The lowest bypass that passes the filters, loosened one by one where none does; None if nothing was measured.

    >>> best_of([], SelectOptions())
    (None, ())
    """
    known = [c for c in candidates if c.bypass is not None and c.induce is not None and c.kl is not None]
    for loosened in ((), (HIGH_KL,), (HIGH_KL, LOW_INDUCE)):
        passing = [c for c in known if not set(failed(c, options)) - set(loosened)]
        if passing:
            return min(passing, key=lambda c: _low(c.bypass)), loosened
    return None, ()


def failed(candidate: Candidate, options: SelectOptions) -> tuple[str, ...]:
    """The filters of measured values that a candidate fails."""
    found = []
    if candidate.removed_by in (NO_DIRECTION, LATE):
        found.append(candidate.removed_by)
    if candidate.induce is not None and not candidate.induce.value >= options.min_induce:
        found.append(LOW_INDUCE)
    if candidate.kl is not None and not candidate.kl.value <= options.max_kl:
        found.append(HIGH_KL)
    return tuple(found)


def late(layer: int, n_layers: int, options: SelectOptions) -> bool:
    """Whether a layer is among the last ones.

    >>> [late(layer, 10, SelectOptions()) for layer in (7, 8)]
    [False, True]
    """
    return layer >= int((1 - options.late_layers) * n_layers)
