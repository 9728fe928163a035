"""Which features carry a behaviour, and what is left of it without them: attribution, judges, SHIFT.

```
import circuits
report = circuits.shift(model, {"resid_post.15": sae}, circuits.shift.biographies())
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
from circuits.shift.biographies import BiographyOptions, biographies
from circuits.shift.feature_judges import (
    FeatureDossier,
    Judge,
    LexiconJudge,
    Node,
    OracleJudge,
    StatisticsJudge,
    Verdict,
)
from circuits.shift.shift_report import ShiftReport
from circuits.shift.study import ShiftOptions, shift
from circuits.shift.task import LabelledTexts, ShiftTask

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
