"""Kinds of SAE that can be trained."""

from workbench.saes.architectures.base import Architecture, AuxTask, StepOptions, StepResult
from workbench.saes.architectures.batch_topk import BatchTopK, Matryoshka
from workbench.saes.architectures.gated import Gated
from workbench.saes.architectures.jumprelu import JumpReLU
from workbench.saes.architectures.relu import ReLU
from workbench.saes.architectures.topk import TopK

__all__ = [
    "Architecture",
    "AuxTask",
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "Matryoshka",
    "ReLU",
    "StepOptions",
    "StepResult",
    "TopK",
]
