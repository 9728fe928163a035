"""Effects of features on the label's margin: exact where the probe reads at the SAE's own site, else estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.doctor.doctor import DoctorOptions, attribution_doctor
from circuits.doctor.report import DoctorReport
from circuits.doctor.tables import linear_attribution
from circuits.metrics import LossOfMargin
from circuits.nodes.attribute import node_effects
from circuits.nodes.effects import NodeEffects, SiteEffects
from circuits.nodes.exact import linear_effects
from circuits.nodes.runs import AttributionOptions
from circuits.shift.evidence import PooledTexts
from circuits.shift.multiclass import LossOfContrast, SoftmaxProbe, contrast_effects, of_labels
from circuits.shift.task import ShiftStudy
from workbench.core.tokens import TokenBatch


def effects_on(
    study: ShiftStudy, pooled: PooledTexts, labels: Sequence[int], attribution: AttributionOptions, n: int
) -> Mapping[str, SiteEffects]:
    """Effects on the margin of some labels of these texts; exact where they can be, else of `n` texts.

    Of more than two labels the margin is the label's logit less the mean of the others.
    """
    if isinstance(study.probe, SoftmaxProbe):
        return contrasted(study, pooled, labels, of_labels(len(study.task.label_names)), attribution, n)
    reader = study.reader
    if reader.is_linear:
        site = reader.probe_site
        return {site: linear_effects(pooled.acts[site], reader.bases[site], study.probe, ints(labels))}
    batch, metric = _margins(study, pooled, labels, n)
    return node_effects(reader.model, reader.bases, batch, metric, keep=metric.keep, **vars(attribution))


def contrasted(
    study: ShiftStudy, pooled: PooledTexts, values: Sequence[int], contrast: Float[Tensor, "values labels"],
    attribution: AttributionOptions, n: int,
) -> Mapping[str, SiteEffects]:  # fmt: skip
    """Effects on a contrast of logits, another one for each value; exact where they can be, else of `n` texts."""
    reader, probe = study.reader, study.probe
    assert isinstance(probe, SoftmaxProbe)
    if reader.is_linear:
        site = reader.probe_site
        return {site: contrast_effects(pooled.acts[site], reader.bases[site], probe, contrast, ints(values))}
    batch, metric = _margins(study, pooled, values, n, contrast)
    return node_effects(reader.model, reader.bases, batch, metric, keep=metric.keep, **vars(attribution))


def _margins(
    study: ShiftStudy, pooled: PooledTexts, labels: Sequence[int], n: int, contrast: Tensor | None = None
) -> tuple[TokenBatch, LossOfMargin | LossOfContrast]:
    """The texts that estimated effects are of, and the margin of their labels."""
    reader = study.reader
    rows = _rows_of_each(labels, n)
    batch = reader.model.tokens([pooled.texts[row] for row in rows])
    keep = reader.keep(batch, reader.model.capture(batch, [reader.probe_site]).flat(reader.probe_site))
    chosen, probe = ints([labels[row] for row in rows]), study.probe
    if isinstance(probe, SoftmaxProbe):
        return batch, LossOfContrast(probe, of_labels(len(probe.bias)) if contrast is None else contrast, chosen, keep)
    return batch, LossOfMargin(probe, chosen, keep)


def examined_effects(
    study: ShiftStudy, effects: Mapping[str, SiteEffects], attribution: AttributionOptions, n: int,
    options: DoctorOptions | None,
) -> DoctorReport | None:  # fmt: skip
    """What the attribution doctor finds of the effects on the ambiguous set; None if it is not asked."""
    if options is None:
        return None
    labels, reader = study.task.train.label, study.reader
    if not isinstance(effects, NodeEffects):
        site = reader.probe_site
        exact = linear_attribution(effects[site], study.train.acts[site], np.array(labels))
        return attribution_doctor(exact, options=options)
    batch, metric = _margins(study, study.train, labels, n)
    return attribution_doctor(
        effects, reader.model, reader.bases, batch, metric, method=attribution.method, steps=attribution.steps,
        rule=attribution.rule, keep=metric.keep, options=options,
    )  # fmt: skip


def _rows_of_each(labels: Sequence[int], n: int) -> list[int]:
    """The first rows of each label in turn, `n` in all, in their order.

    >>> _rows_of_each([0, 0, 0, 0, 1, 1], 4)
    [0, 1, 4, 5]
    """
    of_label: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        of_label.setdefault(label, []).append(row)
    ranked = sorted((i, row) for rows in of_label.values() for i, row in enumerate(rows))
    return sorted(row for _, row in ranked[:n])


def ints(values: Sequence[int]) -> Tensor:
    """Labels as a tensor."""
    return torch.tensor(values, dtype=torch.long)
