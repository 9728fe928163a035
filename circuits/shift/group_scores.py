"""How well a prediction does in each group of label and attribute, and how far it follows the attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.html import Shown
from workbench.core.numbers import counted
from workbench.core.stats import MIN_BOOTSTRAP_ROWS, Estimate, wilson

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 2000


@checked
@dataclass(frozen=True, kw_only=True)
class GroupScores(Shown):
    """Scores of one prediction.

    Attributes:
        accuracy: over all rows.
        groups: accuracy of each group that has rows, by its name.
        worst_group: name of the group with the lowest accuracy.
        attribute_accuracy: share of rows whose prediction is the attribute's value.
        mcc: Matthews correlation of attribute and prediction: 1 follows it, 0 ignores it, -1 is its opposite.
        empty: names of groups without rows; the worst group is none of them.
    """

    accuracy: Estimate
    groups: tuple[tuple[str, Estimate], ...]
    worst_group: str
    attribute_accuracy: Estimate
    mcc: Estimate
    empty: tuple[str, ...] = ()

    @property
    def worst(self) -> Estimate:
        """Accuracy of the worst group, with its own n."""
        return dict(self.groups)[self.worst_group]

    def frame(self) -> pd.DataFrame:
        """One row per group: accuracy, the ends of its interval, rows."""
        import pandas as pd

        rows = [(name, e.value, e.low, e.high, e.n) for name, e in self.groups]
        return pd.DataFrame(rows, columns=["group", "accuracy", "low", "high", "n"])  # pyright: ignore[reportArgumentType]

    def _shown_facts(self) -> Mapping[str, object]:
        return {
            "accuracy": self.accuracy, f"worst group, {self.worst_group}": self.worst,
            "agrees with the attribute": self.attribute_accuracy, "correlation with the attribute (MCC)": self.mcc,
            "groups without rows": ", ".join(self.empty),
        }  # fmt: skip

    def _shown_line(self) -> str:
        return f"accuracy {self.accuracy}; worst group {self.worst_group} {self.worst}; MCC {self.mcc}"


@checked
def group_scores(
    predicted: Int[Tensor, " predictions"],
    label: Int[Tensor, " labels"],
    attribute: Int[Tensor, " attributes"],
    *,
    label_names: Sequence[str] = (),
    attribute_names: Sequence[str] = (),
    unit: str = "texts",
    seed: int = 0,
) -> GroupScores:
    """Accuracy over all rows and by group, and agreement with the attribute.

    Value k of the attribute is the one that goes with label k, so following the attribute means predicting its value.

    Args:
        predicted: label that was predicted for each row.
        label: the right one.
        attribute: value of the attribute.
        label_names: names of the labels; by default their numbers.
        attribute_names: names of the attribute's values.
        unit: what the rows are.
        seed: of the bootstrap of the correlation.

    Raises:
        ShapeError: if they do not pair up.
        DegenerateInputError: if there are no rows.
        InvalidInputError: for negative values, or fewer names than values.
    """
    p, y, a = (values.cpu().numpy() for values in (predicted, label, attribute))
    _check(p, y, a, label_names, attribute_names)
    n_labels = max(int(y.max()) + 1, len(label_names))
    n_attributes = max(int(a.max()) + 1, len(attribute_names))
    names = {(i, j): _name(i, j, label_names, attribute_names) for i in range(n_labels) for j in range(n_attributes)}
    chosen = {name: (y == i) & (a == j) for (i, j), name in names.items()}
    hits = p == y
    groups = tuple(
        (name, wilson(int(hits[rows].sum()), int(rows.sum()), unit=unit)) for name, rows in chosen.items() if rows.any()
    )
    return GroupScores(
        accuracy=wilson(int(hits.sum()), len(p), unit=unit),
        groups=groups,
        worst_group=min(groups, key=lambda group: group[1].value)[0],
        attribute_accuracy=wilson(int((p == a).sum()), len(p), unit=unit),
        mcc=cue_correlation(a, p, unit=unit, seed=seed),
        empty=tuple(name for name, rows in chosen.items() if not rows.any()),
    )


def matthews(tables: Int[np.ndarray, "*draws k k"]) -> np.ndarray:
    """Matthews correlation of contingency tables of counts; 0 where one side is constant.

    Source: Gorodkin 2004; of two values it is the phi coefficient.

    >>> round(float(matthews(np.array([[6, 2], [1, 3]]))), 4)  # (6 * 3 - 2 * 1) / sqrt(8 * 4 * 7 * 5)
    0.4781
    """
    n = tables.sum(axis=(-1, -2)).astype(float)
    rows, columns = tables.sum(axis=-1), tables.sum(axis=-2)
    top = np.trace(tables, axis1=-2, axis2=-1) * n - (rows * columns).sum(axis=-1)
    bottom = np.sqrt((n**2 - (rows**2).sum(axis=-1)) * (n**2 - (columns**2).sum(axis=-1)))
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=float), where=bottom > 0)


def cue_correlation(
    a: Int[np.ndarray, " rows"], p: Int[np.ndarray, " rows"], *, unit: str = "texts", seed: int = 0
) -> Estimate:
    """Matthews correlation of two columns of whole numbers, with a bootstrap interval over rows."""
    k, n = int(max(a.max(), p.max())) + 1, len(a)
    table = np.bincount(a * k + p, minlength=k * k)
    value = float(matthews(table.reshape(k, k)))
    if n < MIN_BOOTSTRAP_ROWS:
        return Estimate(value, -1.0, 1.0, n, f"none below {MIN_BOOTSTRAP_ROWS} rows", unit)
    draws = np.random.default_rng(seed).multinomial(n, table / n, size=RESAMPLES).reshape(-1, k, k)
    low, high = np.quantile(matthews(draws), [0.025, 0.975])
    return Estimate(value, float(low), float(high), n, "percentile bootstrap", unit)


def _name(label: int, attribute: int, labels: Sequence[str], attributes: Sequence[str]) -> str:
    if labels and attributes:
        return f"{attributes[attribute]} {labels[label]}"
    return f"label {labels[label] if labels else label}, attribute {attributes[attribute] if attributes else attribute}"


def _check(
    p: np.ndarray, y: np.ndarray, a: np.ndarray, label_names: Sequence[str], attribute_names: Sequence[str]
) -> None:
    if not len(p) == len(y) == len(a):
        raise ShapeError(
            f"group_scores: {counted(len(p), 'predictions')}, {counted(len(y), 'labels')} and "
            f"{counted(len(a), 'attributes')}; these must pair up."
        )
    if not len(p):
        raise DegenerateInputError("group_scores: there are no rows. Give one at least.")
    if min(p.min(), y.min(), a.min()) < 0:
        raise InvalidInputError(
            f"group_scores: values down to {int(min(p.min(), y.min(), a.min()))}; count labels and attributes from 0."
        )
    for what, names, values in (("label", label_names, y), ("attribute", attribute_names, a)):
        if names and len(names) <= values.max():
            raise InvalidInputError(
                f"group_scores({what}_names={tuple(names)}): values go up to {int(values.max())}; give "
                f"{int(values.max()) + 1} names."
            )
