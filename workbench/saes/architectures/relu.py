"""ReLU with an L1 penalty: the standard SAE, penalised by activation times decoder norm (Conerly et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from workbench.saes.architectures.elementwise import Backward, Elementwise, Forward, Spread
from workbench.saes.kernels.weights import SAEWeights


@dataclass(frozen=True)
class ReLU(Elementwise):
    """Every positive pre-activation; the penalty is `sparsity * mean over tokens of sum_j a_j ||W_dec[j]||`."""

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
