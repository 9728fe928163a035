"""The registry of methods that a SHIFT study may be compared with, and the rows that they are fitted on."""

from __future__ import annotations

import torch

from circuits.shift.evidence import PooledTexts
from circuits.shift.heads.rows import HeadRows
from circuits.shift.task import ShiftMethod, ShiftStudy
from circuits.shift.texts import LabelledTexts
from workbench.core.registry import Registry

SHIFT_METHODS: Registry[ShiftMethod] = Registry("method of a SHIFT study", "circuits.shift.table")
"""Methods beside SHIFT itself, the methods of a task and the robust heads; a file in this package registers its own."""


def training_rows(study: ShiftStudy) -> HeadRows:
    """The ambiguous training rows, with their attribute where it is known."""
    return _rows(study.train, study.task.train)


def balanced_rows(study: ShiftStudy) -> HeadRows | None:
    """The balanced training rows; None where the task has none."""
    balanced = study.task.balanced
    return None if balanced is None or balanced.spurious is None else _rows(study.balanced, balanced)


def _rows(pooled: PooledTexts, texts: LabelledTexts) -> HeadRows:
    attribute = None if texts.spurious is None else torch.tensor(texts.spurious)
    return HeadRows(pooled.x, torch.tensor(texts.label), attribute)
