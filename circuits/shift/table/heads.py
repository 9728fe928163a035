"""The robust heads as methods of a SHIFT study: every head of the registry, fitted at the probe's site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from circuits.shift.heads.base import HEADS, HeadMethod
from circuits.shift.heads.concept_bottleneck import ConceptBottleneck
from circuits.shift.heads.leace import ErasedERM
from circuits.shift.needs import Need
from circuits.shift.table.base import SHIFT_METHODS, balanced_rows, training_rows
from circuits.shift.task import Prediction, ShiftMethod, ShiftStudy
from workbench.controls.methods import Method

CONCEPT_PREFIX = "the"
"""Stands before each concept word, so that the word is not the first token, which is an attention sink."""


def head_methods() -> tuple[ShiftMethod, ...]:
    """A method for each registered head that can be made; balanced rows, where there are any, are its validation."""
    return tuple(
        Method(
            name=name, information=kind.information, run=_Fitted(name), role="rival", needs=_needs(name, kind),
            regime=kind.regime,
        )
        for name, kind in HEADS.items() if name in _MADE or _has_defaults(kind)
    )  # fmt: skip


@dataclass(frozen=True)
class _Fitted:
    """A value and no closure, so that equal studies have equal methods."""

    name: str

    def __call__(self, study: ShiftStudy) -> Prediction:
        made = _MADE.get(self.name)
        return predicted(study, HEADS[self.name]() if made is None else made(study))


def predicted(study: ShiftStudy, method: HeadMethod, *, on_training_rows: bool = False) -> Prediction:
    """What a head predicts for the test texts.

    Args:
        study: the study.
        method: how the head is fitted.
        on_training_rows: gives it no validation rows.
    """
    validation = None if on_training_rows else balanced_rows(study)
    head = method.fit(training_rows(study), validation=validation, seed=study.options.seed)
    measured = tuple(f"{name} {estimate}" for name, estimate in head.measured)
    return Prediction(
        (head.predict(study.test.x),), regime=head.regime, n_attribute_labels=head.n_attribute_labels,
        notes=(*head.notes, *measured),
    )  # fmt: skip


def _needs(name: str, kind: type[HeadMethod]) -> tuple[Need, ...]:
    if name == ConceptBottleneck.name:
        return ("words",)
    return ("attribute",) if kind.regime in ("R1", "R2") else ()


def _has_defaults(kind: type[HeadMethod]) -> bool:
    fields = dataclasses.fields(kind)
    return all(
        one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING for one in fields
    )


def _with_concepts(study: ShiftStudy) -> HeadMethod:
    """The bottleneck of the label's words: each the state of its last token at the probe's site."""
    reader, rows = study.reader, []
    words = sorted(study.task.target_words)
    for start in range(0, len(words), reader.batch_size):
        texts = [f"{CONCEPT_PREFIX} {word}" for word in words[start : start + reader.batch_size]]
        batch = reader.model.tokens(texts)  # padded on the left: the last token stands last
        rows.append(reader.model.capture(batch, [reader.probe_site]).flat(reader.probe_site)[:, -1].float().cpu())
    return ConceptBottleneck(torch.cat(rows))


_MADE: Mapping[str, Callable[[ShiftStudy], HeadMethod]] = {ConceptBottleneck.name: _with_concepts}
"""Heads that need more than their defaults."""


def _erased_on_training_rows(study: ShiftStudy) -> Prediction:
    return predicted(study, ErasedERM(), on_training_rows=True)


SHIFT_METHODS.add(
    "LEACE on training rows",
    Method(
        name="LEACE on training rows", run=_erased_on_training_rows, role="rival", needs=("attribute",), regime="R2",
        information="labels and attribute labels of the training rows; a warning, not a rival: where the two go "
        "together, it erases the label",
    ),
)  # fmt: skip
