"""TopK (Gao et al. 2024): the k largest pre-activations of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.saes.architectures.base import StepOptions, StepResult
from workbench.saes.architectures.reconstruction import Batch, reconstruction_step
from workbench.saes.select import Ranking, select_topk
from workbench.saes.sparse import SparseActs
from workbench.saes.weights import SAEWeights


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of each token, those that are positive.

    Attributes:
        k: features per token.
        by_decoder_norm: rank by pre-activation times decoder norm, as sae_lens does by default; the norm cancels
            everywhere else.
    """

    k: int
    by_decoder_norm: bool = False

    @property
    def revives(self) -> bool:
        """AuxK revives dead features."""
        return True

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
        batch = Batch.of(weights, x, target)
        acts = select_topk(weights, batch.read, self.k, Ranking(options.dtype, self.by_decoder_norm))
        return reconstruction_step(weights, batch, acts, options, (acts.d_sae,))

    def encode(
        self,
        weights: SAEWeights,
        x: Float[Tensor, "rows d_in"],
        *,
        centred: bool = True,
        dtype: torch.dtype = torch.float32,
        threshold: float | None = None,
    ) -> SparseActs:
        """Activations of the chosen features; `threshold` is not used."""
        del threshold
        read = x - weights.b_dec if centred else x
        return select_topk(weights, read, self.k, Ranking(dtype, self.by_decoder_norm))

    def after_step(self, weights: SAEWeights) -> None:
        """Nothing is bounded."""
