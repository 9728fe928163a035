"""Which features carry a behaviour, and what is left of it without them: attribution, judges, SHIFT.

```
import circuits
report = circuits.shift(model, {"resid_post.15": sae}, circuits.biographies())
```
"""

from __future__ import annotations

from circuits import behaviours
from circuits.attribution import (
    AttributionOptions,
    LossOfMargin,
    Metric,
    NodeEffects,
    exact_effects,
    linear_effects,
    node_effects,
)
from circuits.decomposition import bases, neurons
from circuits.discovery.samples import SampleOptions, Samples, find_samples
from circuits.pairs import Pairs
from circuits.saes.report import TrainedSAEs
from circuits.saes.training import SAEsEstimate, SAETrainingOptions, estimate_saes, train_saes
from circuits.shift.asked import AskedDecider
from circuits.shift.biographies import BiographyOptions, biographies
from circuits.shift.deciders import (
    Decider,
    FeatureDossier,
    LexiconDecider,
    Node,
    OracleDecider,
    StatisticsDecider,
    Verdict,
)
from circuits.shift.shift_report import ShiftReport
from circuits.shift.study import ShiftOptions, shift
from circuits.shift.task import LabelledTexts, ShiftTask

__all__ = [
    "AskedDecider",
    "AttributionOptions",
    "BiographyOptions",
    "Decider",
    "FeatureDossier",
    "LabelledTexts",
    "LexiconDecider",
    "LossOfMargin",
    "Metric",
    "Node",
    "NodeEffects",
    "OracleDecider",
    "Pairs",
    "SAETrainingOptions",
    "SAEsEstimate",
    "SampleOptions",
    "Samples",
    "ShiftOptions",
    "ShiftReport",
    "ShiftTask",
    "StatisticsDecider",
    "TrainedSAEs",
    "Verdict",
    "bases",
    "behaviours",
    "biographies",
    "estimate_saes",
    "exact_effects",
    "find_samples",
    "linear_effects",
    "neurons",
    "node_effects",
    "shift",
    "train_saes",
]
