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
    from workbench.activations.plan import HarvestEstimate, HarvestOptions, estimate_harvest
    from workbench.activations.sources import HubDataset, SelfText, TextFiles, TokenRows
    from workbench.activations.store import ActivationStore, open_store
    from workbench.errors import WorkbenchError
    from workbench.features import CardSet, FeatureTable, feature_cards, score_features
    from workbench.hooks.sites import Site
    from workbench.interventions.bytoken import MixEntries, ReplaceTokens
    from workbench.interventions.chosen import Mask
    from workbench.interventions.everywhere import ablate_everywhere
    from workbench.interventions.export.lora import MergedLora, merge_lora
    from workbench.interventions.export.result import Exported
    from workbench.interventions.gates import CASTGate, CosineGate, FnGate, ProbeGate, SAEGate, When
    from workbench.interventions.intervention import Intervention
    from workbench.interventions.ops import Add, AddScaled, Affine, LowRank, Map, ProjectOut
    from workbench.interventions.plan import Plan
    from workbench.interventions.replacing import Ablate, Patch, Replace
    from workbench.interventions.report import EditReport
    from workbench.interventions.saes import SAEAblate, SAEAdd, SAEAddMax, SAEClamp, SAEScale
    from workbench.interventions.scopes import After, All, Generated, Last, NotPrefix, Pos, Prompt, TokenIs
    from workbench.interventions.shapes import Cap, ClampProjection, EqualNorm, NormPreserve, Rotate, Threshold
    from workbench.models.generation import Generation
    from workbench.models.loading import load_model
    from workbench.models.model import Model
    from workbench.models.selfcheck import CheckReport
    from workbench.models.session import Session
    from workbench.report import Report, Section
    from workbench.runs import RunDir
    from workbench.saes.config import SAEConfig
    from workbench.saes.corpus import check_corpus
    from workbench.saes.evaluate import EvalOptions, evaluate_sae
    from workbench.saes.faithful import fake_features
    from workbench.saes.fit import FitReport, check_sae
    from workbench.saes.io import load_sae
    from workbench.saes.lens import register_with_sae_lens
    from workbench.saes.matching import match_by_activations, shared_features
    from workbench.saes.quality import SAEReport
    from workbench.saes.suite import run_suite
    from workbench.saes.synthetic import evaluate_on_synthetic
    from workbench.saes.train import train_sae, train_saes
    from workbench.stats import Estimate
    from workbench.steering import SteeringReport, steer
    from workbench.tokens import TokenBatch

_HOMES = {
    "Ablate": "workbench.interventions.replacing",
    "ActivationStore": "workbench.activations.store",
    "Add": "workbench.interventions.ops",
    "AddScaled": "workbench.interventions.ops",
    "Affine": "workbench.interventions.ops",
    "After": "workbench.interventions.scopes",
    "All": "workbench.interventions.scopes",
    "CASTGate": "workbench.interventions.gates",
    "Cap": "workbench.interventions.shapes",
    "CardSet": "workbench.features",
    "CheckReport": "workbench.models.selfcheck",
    "ClampProjection": "workbench.interventions.shapes",
    "CosineGate": "workbench.interventions.gates",
    "EditReport": "workbench.interventions.report",
    "EqualNorm": "workbench.interventions.shapes",
    "Estimate": "workbench.stats",
    "EvalOptions": "workbench.saes.evaluate",
    "Exported": "workbench.interventions.export.result",
    "FeatureTable": "workbench.features",
    "FitReport": "workbench.saes.fit",
    "FnGate": "workbench.interventions.gates",
    "Generated": "workbench.interventions.scopes",
    "Generation": "workbench.models.generation",
    "HarvestEstimate": "workbench.activations.plan",
    "HarvestOptions": "workbench.activations.plan",
    "HubDataset": "workbench.activations.sources",
    "Intervention": "workbench.interventions.intervention",
    "Last": "workbench.interventions.scopes",
    "LowRank": "workbench.interventions.ops",
    "Map": "workbench.interventions.ops",
    "Mask": "workbench.interventions.chosen",
    "MergedLora": "workbench.interventions.export.lora",
    "MixEntries": "workbench.interventions.bytoken",
    "Model": "workbench.models.model",
    "NormPreserve": "workbench.interventions.shapes",
    "NotPrefix": "workbench.interventions.scopes",
    "Patch": "workbench.interventions.replacing",
    "Plan": "workbench.interventions.plan",
    "Pos": "workbench.interventions.scopes",
    "ProbeGate": "workbench.interventions.gates",
    "ProjectOut": "workbench.interventions.ops",
    "Prompt": "workbench.interventions.scopes",
    "Replace": "workbench.interventions.replacing",
    "ReplaceTokens": "workbench.interventions.bytoken",
    "Report": "workbench.report",
    "Rotate": "workbench.interventions.shapes",
    "RunDir": "workbench.runs",
    "SAEAblate": "workbench.interventions.saes",
    "SAEAdd": "workbench.interventions.saes",
    "SAEAddMax": "workbench.interventions.saes",
    "SAEClamp": "workbench.interventions.saes",
    "SAEConfig": "workbench.saes.config",
    "SAEGate": "workbench.interventions.gates",
    "SAEReport": "workbench.saes.quality",
    "SAEScale": "workbench.interventions.saes",
    "Section": "workbench.report",
    "SelfText": "workbench.activations.sources",
    "Session": "workbench.models.session",
    "Site": "workbench.hooks.sites",
    "SteeringReport": "workbench.steering",
    "TextFiles": "workbench.activations.sources",
    "Threshold": "workbench.interventions.shapes",
    "TokenBatch": "workbench.tokens",
    "TokenIs": "workbench.interventions.scopes",
    "TokenRows": "workbench.activations.sources",
    "When": "workbench.interventions.gates",
    "WorkbenchError": "workbench.errors",
    "ablate_everywhere": "workbench.interventions.everywhere",
    "check_corpus": "workbench.saes.corpus",
    "check_sae": "workbench.saes.fit",
    "estimate_harvest": "workbench.activations.plan",
    "evaluate_on_synthetic": "workbench.saes.synthetic",
    "evaluate_sae": "workbench.saes.evaluate",
    "fake_features": "workbench.saes.faithful",
    "feature_cards": "workbench.features",
    "harvest": "workbench.activations.harvest",
    "load_model": "workbench.models.loading",
    "load_sae": "workbench.saes.io",
    "match_by_activations": "workbench.saes.matching",
    "merge_lora": "workbench.interventions.export.lora",
    "open_store": "workbench.activations.store",
    "register_with_sae_lens": "workbench.saes.lens",
    "run_suite": "workbench.saes.suite",
    "score_features": "workbench.features",
    "shared_features": "workbench.saes.matching",
    "steer": "workbench.steering",
    "train_sae": "workbench.saes.train",
    "train_saes": "workbench.saes.train",
}

_MODULES = ("errors", "glitch", "progress", "records", "stats")

__all__ = [
    "Ablate",
    "ActivationStore",
    "Add",
    "AddScaled",
    "Affine",
    "After",
    "All",
    "CASTGate",
    "Cap",
    "CardSet",
    "CheckReport",
    "ClampProjection",
    "CosineGate",
    "EditReport",
    "EqualNorm",
    "Estimate",
    "EvalOptions",
    "Exported",
    "FeatureTable",
    "FitReport",
    "FnGate",
    "Generated",
    "Generation",
    "HarvestEstimate",
    "HarvestOptions",
    "HubDataset",
    "Intervention",
    "Last",
    "LowRank",
    "Map",
    "Mask",
    "MergedLora",
    "MixEntries",
    "Model",
    "NormPreserve",
    "NotPrefix",
    "Patch",
    "Plan",
    "Pos",
    "ProbeGate",
    "ProjectOut",
    "Prompt",
    "Replace",
    "ReplaceTokens",
    "Report",
    "Rotate",
    "RunDir",
    "SAEAblate",
    "SAEAdd",
    "SAEAddMax",
    "SAEClamp",
    "SAEConfig",
    "SAEGate",
    "SAEReport",
    "SAEScale",
    "Section",
    "SelfText",
    "Session",
    "Site",
    "SteeringReport",
    "TextFiles",
    "Threshold",
    "TokenBatch",
    "TokenIs",
    "TokenRows",
    "When",
    "WorkbenchError",
    "ablate_everywhere",
    "check_corpus",
    "check_sae",
    "errors",
    "estimate_harvest",
    "evaluate_on_synthetic",
    "evaluate_sae",
    "fake_features",
    "feature_cards",
    "glitch",
    "harvest",
    "load_model",
    "load_sae",
    "match_by_activations",
    "merge_lora",
    "open_store",
    "progress",
    "records",
    "register_with_sae_lens",
    "run_suite",
    "score_features",
    "shared_features",
    "stats",
    "steer",
    "train_sae",
    "train_saes",
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
