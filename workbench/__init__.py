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
    from workbench.activations.harvest import harvest
    from workbench.activations.sources import HubDataset, SelfText, TextFiles, TokenRows
    from workbench.activations.store import ActivationStore, open_store
    from workbench.errors import WorkbenchError
    from workbench.features import FeatureTable, score_features
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
    from workbench.saes.config import SAEConfig
    from workbench.saes.evaluate import SAEReport, evaluate_sae
    from workbench.saes.io import load_sae
    from workbench.saes.train import train_sae
    from workbench.stats import Estimate
    from workbench.steering import SteeringReport, steer
    from workbench.tokens import TokenBatch

_HOMES = {
    "ActivationStore": "workbench.activations.store",
    "Add": "workbench.interventions.ops",
    "All": "workbench.interventions.scopes",
    "CheckReport": "workbench.models.selfcheck",
    "EditReport": "workbench.interventions.plan",
    "Estimate": "workbench.stats",
    "FeatureTable": "workbench.features",
    "Generated": "workbench.interventions.scopes",
    "Generation": "workbench.models.generation",
    "HubDataset": "workbench.activations.sources",
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
    "SAEConfig": "workbench.saes.config",
    "SAEReport": "workbench.saes.evaluate",
    "Section": "workbench.report",
    "SelfText": "workbench.activations.sources",
    "Site": "workbench.hooks.sites",
    "SteeringReport": "workbench.steering",
    "TextFiles": "workbench.activations.sources",
    "TokenBatch": "workbench.tokens",
    "TokenIs": "workbench.interventions.scopes",
    "TokenRows": "workbench.activations.sources",
    "WorkbenchError": "workbench.errors",
    "evaluate_sae": "workbench.saes.evaluate",
    "harvest": "workbench.activations.harvest",
    "load_model": "workbench.models.loading",
    "load_sae": "workbench.saes.io",
    "open_store": "workbench.activations.store",
    "score_features": "workbench.features",
    "steer": "workbench.steering",
    "train_sae": "workbench.saes.train",
}

_MODULES = ("errors", "glitch", "progress", "records", "stats")

__all__ = [
    "ActivationStore",
    "Add",
    "All",
    "CheckReport",
    "EditReport",
    "Estimate",
    "FeatureTable",
    "Generated",
    "Generation",
    "HubDataset",
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
    "SAEConfig",
    "SAEReport",
    "Section",
    "SelfText",
    "Site",
    "SteeringReport",
    "TextFiles",
    "TokenBatch",
    "TokenIs",
    "TokenRows",
    "WorkbenchError",
    "errors",
    "evaluate_sae",
    "glitch",
    "harvest",
    "load_model",
    "load_sae",
    "open_store",
    "progress",
    "records",
    "score_features",
    "stats",
    "steer",
    "train_sae",
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
