"""Which label goes with which value of the attribute in training, and whether every value has a name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from circuits.shift.texts import LabelledTexts
from workbench.core.display import first_few
from workbench.core.errors import DegenerateInputError, MismatchError
from workbench.core.numbers import counted

SMALLEST_EXCESS = 1e-9


def shortcut_of(rows: LabelledTexts, n_labels: int, n_values: int) -> tuple[int, ...]:
    """The label that each value of the attribute goes with: the one that it makes most likelier.

    Where attribute and label are independent, value 0 goes with label 0, value 1 with label 1, and so on.
    """
    excess = _excess(rows, n_labels, n_values)
    return tuple(
        int(of_value.argmax()) if of_value.max() > SMALLEST_EXCESS else min(value, n_labels - 1)
        for value, of_value in enumerate(excess.T)
    )


def going_together(rows: LabelledTexts, n_labels: int, n_values: int) -> Bool[np.ndarray, "labels values"]:
    """Which labels a value of the attribute makes likelier; of two labels the one of `shortcut_of`."""
    together = _excess(rows, n_labels, n_values) > SMALLEST_EXCESS
    for value, label in enumerate(shortcut_of(rows, n_labels, n_values)):
        together[label, value] = True
    return together


def usual_value(rows: LabelledTexts, n_labels: int, n_values: int) -> Int[np.ndarray, " labels"]:
    """For each label the value of the attribute that goes with it: the one that makes it most likelier."""
    return _excess(rows, n_labels, n_values).argmax(axis=1)


def _excess(rows: LabelledTexts, n_labels: int, n_values: int) -> np.ndarray:
    """P(label | value) - P(label); 0 for a value without rows."""
    labels, values = np.eye(n_labels)[list(rows.label)], np.array(rows.spurious or (), dtype=int)
    overall = labels.mean(0)
    return np.stack(
        [(labels[values == v].mean(0) if (values == v).any() else overall) - overall for v in range(n_values)], axis=1
    )


def require_names(name: str, rows: LabelledTexts, label_names: Sequence[str], spurious_names: Sequence[str]) -> None:
    """Refuses a set of texts whose labels or attributes have no name, or that lacks one of the labels.

    Raises:
        MismatchError: for values without a name, or an attribute in some sets alone.
        DegenerateInputError: if a label has no row.
    """
    if (rows.spurious is None) != (not spurious_names):
        raise MismatchError(
            f"ShiftTask: {name} has {'no ' if rows.spurious is None else ''}attributes, and there are "
            f"{counted(len(spurious_names), 'names')} of them. Give the attribute in every set, or in none."
        )
    for kind, values, names in (
        ("labels", set(rows.label), label_names),
        ("attributes", set(rows.spurious or ()), spurious_names),
    ):
        if values and max(values) >= len(names):
            raise MismatchError(
                f"ShiftTask: {name} has {kind} {first_few(sorted(values))}, but only {len(names)} have names: "
                f"{first_few(names)}. Name all."
            )
    if len(set(rows.label)) < len(label_names):
        raise DegenerateInputError(
            f"ShiftTask: {name} has no row of the label {label_names[len(set(rows.label))]!r}. Leave the "
            "label out, or give rows of it."
        )
