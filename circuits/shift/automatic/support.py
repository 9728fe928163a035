"""By how much each feature supports the label of each training text, without attribute labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from circuits.shift.judging.prepare import Candidate
from circuits.shift.task import ShiftStudy


def support(study: ShiftStudy, candidates: Sequence[Candidate]) -> np.ndarray:
    """Row by candidate: support of the row's label in logits; negative where the feature speaks for the other label.

    The mean activation of a feature is scaled so that its mean with the sign of the label is its effect, which at the
    probe's own site is what it adds to the logit exactly; it counts from half way between the labels' means. A feature
    whose activation does not go with the label as its effect does has no support.
    """
    y = np.array(study.task.train.label)
    sign = 2.0 * y - 1.0
    columns = [
        study.train.acts[node.site][:, node.feature].double().cpu().numpy() for node, _ in candidates
    ]  # fmt: skip
    acts = np.stack(columns, axis=1) if columns else np.zeros((len(y), 0))
    difference = sign @ acts / len(y)
    effects = np.array([effect for _, effect in candidates])
    slope = np.divide(effects, difference, out=np.zeros_like(effects), where=effects * np.sign(difference) != 0)
    middle = (acts[y == 1].mean(0) + acts[y == 0].mean(0)) / 2
    return sign[:, None] * slope * (acts - middle)
