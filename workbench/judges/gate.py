"""Which judges are believed: those that tell known right cases from known wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from workbench.core.arguments import checked
from workbench.core.html import Shown
from workbench.core.numbers import percent, setting
from workbench.core.stats import Estimate, wilson
from workbench.judges.protocol import MAX_FAILED_SHARE, Cost

if TYPE_CHECKING:
    import pandas as pd

Values = Float[np.ndarray, " cases"]


@dataclass(frozen=True, kw_only=True)
class Trial(Shown):
    """How a judge does on one group of known cases.

    Attributes:
        subject: what is asked, such as "detection".
        group: kind of known case within the subject; "" if there is one kind.
        margin: by how much right cases score above wrong ones; None if too many replies could not be read.
        needed_margin: what the whole interval must exceed.
        cases: right and wrong together, or pairs of them.
        unread: cases without a readable reply.
        is_needed: whether a failure here refuses the judge, or is only shown.
    """

    subject: str
    group: str = ""
    margin: Estimate | None
    needed_margin: float
    cases: int
    unread: int
    is_needed: bool = True

    @property
    def passed(self) -> bool:
        """Whether the whole interval lies above the margin that is needed."""
        return self.margin is not None and self.margin.low > self.needed_margin

    @property
    def failed(self) -> Estimate:
        """Share of cases without a readable reply; 1 if there are no cases."""
        return wilson(self.unread, self.cases, unit="known cases") if self.cases else wilson(1, 1, unit="known cases")

    @property
    def name(self) -> str:
        """Group, or subject where it has one group."""
        return self.group or self.subject

    def __str__(self) -> str:
        return f"{self.name} ({self.margin or f'{percent(self.failed.value)} of replies unreadable'})"


@checked
def trial(
    subject: str,
    right: Values,
    wrong: Values,
    margin: Callable[[Bool[np.ndarray, " cases"]], Estimate | None],
    *,
    needed_margin: float,
    group: str = "",
    is_needed: bool = True,
) -> Trial:
    """Compares the answers on known cases; those without a readable reply to both are left out.

    Args:
        subject: what is asked.
        right: answers with what belongs to each case, nan where there is none.
        wrong: answers to the same cases with what does not belong to them.
        margin: measures the margin on the cases that the mask keeps; None where it can't be measured.
        needed_margin: what the whole interval must exceed.
        group: kind of known case.
        is_needed: whether a failure refuses the judge.
    """
    read = ~(np.isnan(right) | np.isnan(wrong))
    unread = int((~read).sum())
    is_measured = len(read) > 0 and unread <= MAX_FAILED_SHARE * len(read)
    return Trial(
        subject=subject, group=group, margin=margin(read) if is_measured else None, needed_margin=needed_margin,
        cases=len(read), unread=unread, is_needed=is_needed,
    )  # fmt: skip


@dataclass(frozen=True)
class JudgeGate(Shown):
    """What a judge may give scores for.

    Attributes:
        judge: its name.
        trials: on known cases.
        cost: of the trials.
    """

    judge: str
    trials: tuple[Trial, ...]
    cost: Cost = Cost()

    @checked
    def refusal(self, subject: str | None = None) -> str:
        """Why the answers on a subject, or on any, do not count; "" if they do."""
        needed = [t for t in self.trials if t.is_needed and subject in (None, t.subject)]
        failed = [t for t in needed if not t.passed]
        on = subject or "anything"
        if not needed:
            return f"judge not competent: it was not tried on {on}"
        if not failed:
            return ""
        least = " or ".join(map(setting, sorted({t.needed_margin for t in failed})))
        return (
            f"judge not competent{f' at {subject}' if subject else ''}: fails on {', '.join(map(str, failed))}; right "
            f"cases must score above wrong ones by more than {least}"
        )

    def frame(self) -> pd.DataFrame:
        """One row per trial."""
        import pandas as pd

        rows = [
            {"subject": t.subject, "group": t.group, "margin": None if t.margin is None else t.margin.value,
             "low": None if t.margin is None else t.margin.low, "high": None if t.margin is None else t.margin.high,
             "needed_margin": t.needed_margin, "passed": t.passed, "cases": t.cases, "unread": t.unread}
            for t in self.trials
        ]  # fmt: skip
        return pd.DataFrame(rows)

    @property
    def margins(self) -> dict[str, Estimate | None]:
        """Margin of each trial by its name."""
        return {t.name: t.margin for t in self.trials}

    @property
    def failed(self) -> Estimate:
        """Share of known cases without a readable reply, over all trials."""
        cases = sum(t.cases for t in self.trials)
        return wilson(sum(t.unread for t in self.trials), cases, unit="known cases") if cases else wilson(1, 1)
