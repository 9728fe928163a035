"""LLM interpretability and steering: an edit provably happened where it was asked, or it raises.

```
import workbench as wb
```
Names are imported when they are first used, so that the import itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench import errors, glitch, progress, records, stats
    from workbench.errors import WorkbenchError
    from workbench.hooks.sites import Site
    from workbench.interventions.ops import Add, Map, ProjectOut, SAEAblate, SAEAddMax, SAEClamp
    from workbench.interventions.plan import EditReport, Intervention, Plan
    from workbench.interventions.scopes import All, Generated, Last, Mask, Pos, Prompt, TokenIs
    from workbench.models.generation import Generation
    from workbench.models.loading import load_model
    from workbench.models.model import Model
    from workbench.models.selfcheck import CheckReport
    from workbench.report import Report, Section
    from workbench.runs import RunDir
    from workbench.stats import Estimate
    from workbench.tokens import TokenBatch

_HOMES = {
    "Add": "workbench.interventions.ops",
    "All": "workbench.interventions.scopes",
    "CheckReport": "workbench.models.selfcheck",
    "EditReport": "workbench.interventions.plan",
    "Estimate": "workbench.stats",
    "Generated": "workbench.interventions.scopes",
    "Generation": "workbench.models.generation",
    "Intervention": "workbench.interventions.plan",
    "Last": "workbench.interventions.scopes",
    "Map": "workbench.interventions.ops",
    "Mask": "workbench.interventions.scopes",
    "Model": "workbench.models.model",
    "Plan": "workbench.interventions.plan",
    "Pos": "workbench.interventions.scopes",
    "ProjectOut": "workbench.interventions.ops",
    "Prompt": "workbench.interventions.scopes",
    "Report": "workbench.report",
    "RunDir": "workbench.runs",
    "SAEAblate": "workbench.interventions.ops",
    "SAEAddMax": "workbench.interventions.ops",
    "SAEClamp": "workbench.interventions.ops",
    "Section": "workbench.report",
    "Site": "workbench.hooks.sites",
    "TokenBatch": "workbench.tokens",
    "TokenIs": "workbench.interventions.scopes",
    "WorkbenchError": "workbench.errors",
    "load_model": "workbench.models.loading",
}

_MODULES = ("errors", "glitch", "progress", "records", "stats")

__all__ = [
    "Add",
    "All",
    "CheckReport",
    "EditReport",
    "Estimate",
    "Generated",
    "Generation",
    "Intervention",
    "Last",
    "Map",
    "Mask",
    "Model",
    "Plan",
    "Pos",
    "ProjectOut",
    "Prompt",
    "Report",
    "RunDir",
    "SAEAblate",
    "SAEAddMax",
    "SAEClamp",
    "Section",
    "Site",
    "TokenBatch",
    "TokenIs",
    "WorkbenchError",
    "errors",
    "glitch",
    "load_model",
    "progress",
    "records",
    "stats",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"workbench.{name}")
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value
    from workbench.errors import did_you_mean

    raise AttributeError(f"workbench has no {name!r}. {did_you_mean(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
