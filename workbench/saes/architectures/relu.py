"""ReLU with an L1 penalty: the standard SAE, penalised by activation times decoder norm (Conerly et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.saes.architectures.base import StepOptions, StepResult
from workbench.saes.architectures.elementwise import Backward, Forward, Spread, elementwise_encode, elementwise_step
from workbench.saes.architectures.reconstruction import Batch
from workbench.saes.sparse import SparseActs
from workbench.saes.weights import SAEWeights


@dataclass(frozen=True)
class ReLU:
    """Every positive pre-activation; the penalty is `sparsity * mean over tokens of sum_j a_j ||W_dec[j]||`."""

    @property
    def revives(self) -> bool:
        """AuxK is not used."""
        return False

    @property
    def trains_decoder(self) -> tuple[bool, ...]:
        """There is one reconstruction, and it does."""
        return (True,)

    def start(self, weights: SAEWeights) -> SAEWeights:
        """No parameters of its own."""
        return weights

    def step(
        self,
        weights: SAEWeights,
        x: Float[Tensor, "rows d_in"],
        target: Float[Tensor, "rows d_out"] | None = None,
        options: StepOptions = StepOptions(),  # noqa: B008 - frozen
    ) -> StepResult:
        """Loss and gradients of one batch."""
        return elementwise_step(self, weights, Batch.of(weights, x, target), options)

    def encode(
        self,
        weights: SAEWeights,
        x: Float[Tensor, "rows d_in"],
        *,
        centred: bool = True,
        dtype: torch.dtype = torch.float32,
        threshold: float | None = None,
    ) -> SparseActs:
        """The positive pre-activations; `dtype` and `threshold` are not used."""
        del dtype, threshold
        return elementwise_encode(self, weights, x - weights.b_dec if centred else x)

    def after_step(self, weights: SAEWeights) -> None:
        """Nothing is bounded."""

    def cut(self, weights: SAEWeights) -> Float[Tensor, " d_sae"]:
        """Zero."""
        return torch.zeros_like(weights.b_enc)

    def forward(self, weights: SAEWeights, pre: Tensor, norms: Tensor, at: Spread) -> Forward:
        """Activations, and their product with the decoder norm."""
        del weights, at
        acts = pre.clamp_min(0)
        return Forward([acts], acts * norms)

    def backward(
        self, weights: SAEWeights, pre: Tensor, norms: Tensor, at: Spread, d_paths: Sequence[Tensor], d_penalty: float
    ) -> Backward:
        """Gradients pass where the pre-activation is positive."""
        del weights, at
        return Backward((d_paths[0] + d_penalty * norms) * (pre > 0), d_penalty * pre.clamp_min(0))
