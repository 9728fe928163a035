"""How far two judges agree on features, beyond what chance gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from circuits.shift.judging.annotations import DECISIONS, Annotation
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.html import Shown
from workbench.core.numbers import number
from workbench.core.stats import MIN_BOOTSTRAP_ROWS, Estimate, wilson

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 2000


@checked
@dataclass(frozen=True, kw_only=True)
class Agreement(Shown):
    """Two judges on the same features.

    Attributes:
        judges: who they are.
        observed: share of features with the same verdict.
        chance: the share that judges agree on who give each verdict as often, but without a look at the feature.
        kappa: Cohen's kappa, `(observed - chance) / (1 - chance)`; None if both always give one and the same verdict.
        table: for each verdict of the first judge how often the second gives which.
        disputed: names of the features on which they differ, with both verdicts.
    """

    judges: tuple[str, str]
    observed: Estimate
    chance: float
    kappa: Estimate | None
    table: tuple[tuple[int, ...], ...]
    disputed: tuple[tuple[str, str, str], ...]

    def frame(self) -> pd.DataFrame:
        """Verdicts of the first judge in rows, of the second in columns."""
        import pandas as pd

        first, second = self.judges
        index = pd.Index([f"{first}: {name}" for name in DECISIONS])
        return pd.DataFrame(self.table, index=index, columns=[f"{second}: {name}" for name in DECISIONS])  # pyright: ignore[reportArgumentType]

    def _shown_facts(self) -> Mapping[str, object]:
        disputed = "; ".join(f"{name} ({a}, {b})" for name, a, b in self.disputed)
        return {
            "Cohen's kappa": self.kappa, "same verdict": self.observed, "by chance": self.chance,
            "disputed, so not ablated": disputed,
        }  # fmt: skip

    def _shown_line(self) -> str:
        kappa = "not defined, both always give one verdict" if self.kappa is None else str(self.kappa)
        return (
            f"{self.judges[0]} and {self.judges[1]}: Cohen's kappa {kappa}; same verdict {self.observed}, by chance "
            f"{number(self.chance)}"
        )


@checked
def agreement(first: Sequence[Annotation], second: Sequence[Annotation], *, seed: int = 0) -> Agreement:
    """Cohen's kappa of two judges on the features that both judged, with a bootstrap interval over features.

    Args:
        first: verdicts of one judge.
        second: verdicts of the other one.
        seed: of the bootstrap.

    Raises:
        InvalidInputError: if one of them holds verdicts of several judges.
        DegenerateInputError: if no feature was judged by both.
    """
    a, b = _by_feature(first), _by_feature(second)
    both = [name for name in a if name in b]
    if not both:
        raise DegenerateInputError(
            f"agreement: {len(a)} and {len(b)} features, and none was judged by both. Have both judge one queue."
        )
    k = len(DECISIONS)
    codes = np.array([DECISIONS.index(a[name].verdict) * k + DECISIONS.index(b[name].verdict) for name in both])
    table = np.bincount(codes, minlength=k * k).reshape(k, k)
    return Agreement(
        judges=(first[0].judge, second[0].judge), observed=wilson(int(table.trace()), len(both), unit="features"),
        chance=float(_chance(table)), kappa=_kappa(table, seed), table=tuple(map(tuple, table.tolist())),
        disputed=tuple(
            (name, a[name].verdict, b[name].verdict) for name in both if a[name].verdict != b[name].verdict
        ),
    )  # fmt: skip


def cohens_kappa(tables: np.ndarray) -> np.ndarray:
    """Cohen's kappa of tables of counts; nan where both sides always give one and the same verdict.

    >>> round(float(cohens_kappa(np.array([[20, 10], [5, 15]]))), 3)  # (.70 - .50) / (1 - .50)
    0.4
    """
    n = tables.sum(axis=(-1, -2)).astype(float)
    observed, chance = np.trace(tables, axis1=-2, axis2=-1) / n, _chance(tables)
    return np.divide(observed - chance, 1 - chance, out=np.full_like(chance, np.nan), where=chance < 1)


def _chance(tables: np.ndarray) -> np.ndarray:
    n = tables.sum(axis=(-1, -2)).astype(float)
    return np.asarray((tables.sum(axis=-1) * tables.sum(axis=-2)).sum(axis=-1) / n**2)


def _kappa(table: np.ndarray, seed: int) -> Estimate | None:
    value, n = float(cohens_kappa(table)), int(table.sum())
    if np.isnan(value):
        return None
    if n < MIN_BOOTSTRAP_ROWS:
        return Estimate(value, -1.0, 1.0, n, f"none below {MIN_BOOTSTRAP_ROWS} rows", "features")
    draws = np.random.default_rng(seed).multinomial(n, table.ravel() / n, size=RESAMPLES).reshape(-1, *table.shape)
    low, high = np.nanquantile(cohens_kappa(draws), [0.025, 0.975])
    return Estimate(value, min(value, float(low)), max(value, float(high)), n, "percentile bootstrap", "features")


def _by_feature(given: Sequence[Annotation]) -> dict[str, Annotation]:
    judges = {one.judge for one in given}
    if len(judges) > 1:
        raise InvalidInputError(
            f"agreement: one side holds verdicts of {len(judges)} judges ({', '.join(sorted(judges))}). Give each "
            "side the verdicts of one."
        )
    return {one.feature: one for one in given}
