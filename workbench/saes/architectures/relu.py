"""ReLU with an L1 penalty: the standard SAE, penalised by activation times decoder norm (Conerly et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.saes.architectures.base import DenseBatch, DenseLosses
from workbench.saes.architectures.elementwise import (
    Backward,
    Elementwise,
    Forward,
    Spread,
    check_coefficients,
    l1_sparsity,
)
from workbench.saes.config import ARCHITECTURES, ArchitectureSpec, LensSpec
from workbench.saes.kernels.weights import SAEWeights

if TYPE_CHECKING:
    from sae_lens import StandardTrainingSAEConfig


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

    def dense(self, batch: DenseBatch) -> DenseLosses:
        """On all features."""
        acts = batch.pre.relu()
        return batch.elementwise(acts, (acts * batch.norms).sum(1).mean())


def _of_sae_lens(cfg: StandardTrainingSAEConfig) -> ReLU:
    if cfg.lp_norm != 1.0:
        raise InvalidInputError(f"lp_norm={cfg.lp_norm}: the sparse step knows the L1 penalty alone. Use lp_norm=1.")
    return ReLU()


ARCHITECTURES.add("relu", ArchitectureSpec(
    build=lambda config: ReLU(),  # noqa: ARG005
    options=("l1_coefficient",), check=check_coefficients, sparsity=l1_sparsity, aliases=("standard",),
    lens=LensSpec(
        saved_as="standard", transcoder="transcoder", trained_as="standard", build=_of_sae_lens, coefficient="l1",
        penalty="l1_loss",
    ),
))  # fmt: skip
