"""TopK (Gao et al. 2024): the k largest pre-activations of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.saes.architectures.base import Architecture, Batch, StepOptions, StepResult
from workbench.saes.architectures.reconstruction import reconstruction_step
from workbench.saes.kernels.select import Ranking, select_topk
from workbench.saes.kernels.sparse import SparseActs
from workbench.saes.kernels.weights import SAEWeights


@dataclass(frozen=True)
class TopK(Architecture):
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

    def _step(self, weights: SAEWeights, batch: Batch, options: StepOptions) -> StepResult:
        acts = select_topk(weights, batch.read, self.k, Ranking(options.dtype, self.by_decoder_norm))
        return reconstruction_step(weights, batch, acts, options, (acts.d_sae,))

    def _encode(self, weights: SAEWeights, read: Tensor, dtype: torch.dtype, threshold: float | None) -> SparseActs:
        del threshold
        return select_topk(weights, read, self.k, Ranking(dtype, self.by_decoder_norm))
