"""The methods of a SHIFT study as a table for machines, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuits.shift.rows import Comparison, MethodRow

if TYPE_CHECKING:
    import pandas as pd


def methods_frame(methods: Sequence[MethodRow]) -> pd.DataFrame:
    """One row per method.

    The first columns are method, regime, n_ablated, accuracy, accuracy_low, accuracy_high, worst_group, worst_low,
    worst_high, worst_n, attribute_accuracy, cue_mcc and seconds; `worst_group` is the accuracy of the worst group.
    """
    import pandas as pd

    return pd.DataFrame([_record(row) for row in methods])


def _record(row: MethodRow) -> dict[str, object]:
    attribute, mcc, draws = row.spurious, row.cue_mcc, row.over_draws
    return {
        "method": row.name, "regime": row.regime, "n_ablated": row.n_features,
        "accuracy": row.label.value, "accuracy_low": row.label.low, "accuracy_high": row.label.high,
        "worst_group": row.worst.value, "worst_low": row.worst.low, "worst_high": row.worst.high,
        "worst_n": row.worst.n,
        "attribute_accuracy": None if attribute is None else attribute.value,
        "cue_mcc": None if mcc is None else mcc.value, "seconds": row.seconds,
        "worst_group_name": row.worst_group, "role": row.role, "information": row.information,
        "attribute_low": None if attribute is None else attribute.low,
        "attribute_high": None if attribute is None else attribute.high,
        "cue_mcc_low": None if mcc is None else mcc.low, "cue_mcc_high": None if mcc is None else mcc.high,
        "draws_low": None if draws is None else draws.label.low,
        "draws_high": None if draws is None else draws.label.high,
        "n_attribute_labels": row.n_attribute_labels,
    }  # fmt: skip


def said_by_methods(methods: Sequence[MethodRow]) -> tuple[str, ...]:
    """A sentence per note, with all the methods that it holds for."""
    by_note: dict[str, list[str]] = {}
    for row in methods:
        for note in row.notes:
            by_note.setdefault(note, []).append(row.name)
    return tuple(f"{', '.join(names)}: {note}." for note, names in by_note.items())


def against(comparison: Comparison) -> str:
    """Name of a difference."""
    return f"{comparison.better} minus {comparison.other}"


def said_by_comparisons(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """A sentence for each method and what the differences say of it, with everything that it is compared with."""
    by_verdict: dict[tuple[str, str], list[str]] = {}
    for comparison in comparisons:
        by_verdict.setdefault((comparison.better, _verb(comparison)), []).append(_difference(comparison))
    return tuple(f"{better} {verb} {'; '.join(others)}." for (better, verb), others in by_verdict.items())


def _verb(comparison: Comparison) -> str:
    if not comparison.excludes_zero:
        return "can't be told from"
    return "beats" if comparison.label.value > 0 else "is worse than"


def _difference(comparison: Comparison) -> str:
    conflict, draws = comparison.conflict, comparison.over_draws
    return (
        f"{comparison.other}: label accuracy {comparison.label.change()}"
        + ("" if conflict is None else f", on the rows that break the correlation {conflict.change()}")
        + ("" if draws is None else f", over random sets {draws.change()}")
    )
