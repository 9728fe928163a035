"""Which features carry a behaviour, and what is left of it without them: attribution, judges, SHIFT.

```
import circuits
report = circuits.shift(model, {"resid_post.15": sae}, circuits.biographies())
```
"""

from __future__ import annotations

from circuits.attribution import (
    AttributionOptions,
    LossOfMargin,
    Metric,
    NodeEffects,
    exact_effects,
    linear_effects,
    node_effects,
)
from circuits.biographies import BiographyOptions, biographies
from circuits.judges import FeatureDossier, Judge, LexiconJudge, Node, OracleJudge, StatisticsJudge, Verdict
from circuits.shift import ShiftOptions, shift
from circuits.shiftreport import ShiftReport
from circuits.task import LabelledTexts, ShiftTask

__all__ = [
    "AttributionOptions",
    "BiographyOptions",
    "FeatureDossier",
    "Judge",
    "LabelledTexts",
    "LexiconJudge",
    "LossOfMargin",
    "Metric",
    "Node",
    "NodeEffects",
    "OracleJudge",
    "ShiftOptions",
    "ShiftReport",
    "ShiftTask",
    "StatisticsJudge",
    "Verdict",
    "biographies",
    "exact_effects",
    "linear_effects",
    "node_effects",
    "shift",
]
