"""What every architecture offers to the trainer: first weights, one step, activations, and bounds after a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.saes.sparse import Products, SparseActs, SparseProducts
from workbench.saes.weights import SAEWeights

NO_VARIANCE = 1e-10
"""Variance of the residuals, as a share of their squared norm, up to which there is no auxiliary loss."""


@dataclass(frozen=True)
class AuxTask:
    """The auxiliary loss (AuxK) that revives dead features: they alone must explain the residual.

    Attributes:
        dead: indices of the features that count as dead.
        k: how many of them reconstruct the residual of each token.
        coefficient: weight of the loss, which is normalised by the variance of the residual; where that is nothing, as
            in a batch of one row, the loss is 0.

    Source: Gao et al. 2024 (arXiv 2406.04093) A.2. The activations go through a ReLU, as there.
    """

    dead: Int[Tensor, " n_dead"]
    k: int
    coefficient: float = 1 / 32


@dataclass(frozen=True)
class StepOptions:
    """What may differ from step to step.

    Attributes:
        dtype: precision in which features are ranked; values and gradients are computed in that of `x`.
        aux: the auxiliary task of dead features, if any; only architectures with `revives` use it.
        sparsity: coefficient of the sparsity penalty at this step, warm-up applied.
        threshold: smallest activation that was kept lately; BatchTopK begins its search there. No effect on the result.
        products: how the sparse products are computed.
    """

    dtype: torch.dtype = torch.float32
    aux: AuxTask | None = None
    sparsity: float = 0.0
    threshold: float | None = None
    products: Products = SparseProducts()


@dataclass(frozen=True)
class StepResult:
    """What one training step computed; tensors stay on the device.

    Attributes:
        loss: mean over tokens of the squared reconstruction error, summed over `d_out`; of Matryoshka summed over
            prefixes.
        aux_loss: every other reconstruction loss, coefficient applied (AuxK, the gate of a gated SAE).
        sparsity_loss: the penalty, coefficient applied.
        gradients: of `loss + aux_loss + sparsity_loss`.
        fired: number of tokens on which each feature was positive.
        threshold: smallest positive activation that was kept, times its decoder norm if features are ranked so; NaN if
            none was positive.
    """

    loss: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    sparsity_loss: Float[Tensor, ""]
    gradients: SAEWeights
    fired: Int[Tensor, " d_sae"]
    threshold: Float[Tensor, ""]


@runtime_checkable
class Architecture(Protocol):
    """One kind of SAE or transcoder.

    `target` is None for an SAE, which then reads `x - b_dec` and reconstructs `x`; a transcoder reads `x` as it is and
    reconstructs `target`.
    """

    @property
    def revives(self) -> bool:
        """Whether AuxK revives its dead features."""
        ...

    def start(self, weights: SAEWeights) -> SAEWeights:
        """Adds the parameters that only this architecture has, at their initial values."""
        ...

    def step(
        self,
        weights: SAEWeights,
        x: Float[Tensor, "rows d_in"],
        target: Float[Tensor, "rows d_out"] | None = None,
        options: StepOptions = StepOptions(),  # noqa: B008 - frozen
    ) -> StepResult:
        """Loss and gradients of one batch, equal to dense autograd up to rounding; `weights` are not changed."""
        ...

    def encode(
        self,
        weights: SAEWeights,
        x: Float[Tensor, "rows d_in"],
        *,
        centred: bool = True,
        dtype: torch.dtype = torch.float32,
        threshold: float | None = None,
    ) -> SparseActs:
        """Feature activations as the saved SAE would give them.

        Args:
            weights: the SAE.
            x: activations.
            centred: subtract `b_dec` first; False for a transcoder.
            dtype: precision of the selection.
            threshold: of BatchTopK and Matryoshka, which keep what is larger at inference; others ignore it.
        """
        ...

    def after_step(self, weights: SAEWeights) -> None:
        """Puts parameters back into their bounds, in place (thresholds are not negative)."""
        ...
