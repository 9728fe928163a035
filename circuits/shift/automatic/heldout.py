"""Logits of rows by probes that were fitted without them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.probes.linear import ProbeOptions, fit_probe


def held_out_logits(
    x: Float[Tensor, "rows d"], y: Int[np.ndarray, " rows"], options: ProbeOptions
) -> Float[np.ndarray, " rows"]:
    """Logit of label 1 for each row, by a probe of the other folds; folds are stratified."""
    from sklearn.model_selection import StratifiedKFold

    logits = np.zeros(len(y))
    for fitted, held in StratifiedKFold(options.folds, shuffle=True, random_state=options.seed).split(y, y):
        probe = fit_probe(x[fitted], torch.from_numpy(y[fitted]), "", options=replace(options, folds=0))
        logits[held] = probe.logit(x[held]).double().cpu().numpy()
    return logits
