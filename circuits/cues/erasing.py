"""One cue at a time erased at the probe's site, where a task has several: does a method trade it for another?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from circuits.shift.evidence import PooledTexts
from circuits.shift.heads.leace import ErasedERM
from circuits.shift.heads.rows import HeadRows
from circuits.shift.task import Prediction, ShiftMethod, ShiftStudy
from circuits.shift.texts import LabelledTexts
from workbench.controls.methods import Method


@dataclass(frozen=True)
class _Erased:
    """A value and no closure, so that equal tasks have equal methods."""

    cue: str

    def __call__(self, study: ShiftStudy) -> Prediction:
        balanced = study.task.balanced
        assert balanced is not None
        rows, validation = _rows(study.train, study.task.train, self.cue), _rows(study.balanced, balanced, self.cue)
        head = ErasedERM().fit(rows, validation=validation, seed=study.options.seed)
        return Prediction(
            (head.predict(study.test.x),), regime=head.regime, n_attribute_labels=head.n_attribute_labels,
            notes=head.notes,
        )  # fmt: skip


def _rows(pooled: PooledTexts, texts: LabelledTexts, cue: str) -> HeadRows:
    return HeadRows(pooled.x, torch.tensor(texts.label), torch.tensor(dict(texts.cues)[cue]))


def cues_erased(names: Sequence[str]) -> tuple[ShiftMethod, ...]:
    """LEACE of each cue by itself; no method for a single cue, which is the attribute of its task."""
    if len(names) < 2:
        return ()
    return tuple(
        Method(
            name=f"LEACE of {name} alone", run=_Erased(name), role="rival", regime="R1", needs=("balanced",),
            information="labels of the training rows, this cue's value in the balanced rows",
        )
        for name in names
    )  # fmt: skip
