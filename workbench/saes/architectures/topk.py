"""TopK (Gao et al. 2024): the k largest pre-activations of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.saes.architectures.base import Architecture, Batch, DenseBatch, DenseLosses, StepOptions, StepResult
from workbench.saes.architectures.reconstruction import check_k_of, dense_reconstruction, reconstruction_step
from workbench.saes.config import ARCHITECTURES, ArchitectureSpec, LensSpec
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

    def dense(self, batch: DenseBatch) -> DenseLosses:
        """By a mask over all features."""
        ranks = (batch.pre * batch.norms if self.by_decoder_norm else batch.pre).detach()
        mask = torch.zeros_like(ranks).scatter(1, ranks.topk(self.k).indices, 1.0)
        return dense_reconstruction(batch, batch.pre.relu() * mask, batch.pre.detach())

    def _encode(self, weights: SAEWeights, read: Tensor, dtype: torch.dtype, threshold: float | None) -> SparseActs:
        del threshold
        return select_topk(weights, read, self.k, Ranking(dtype, self.by_decoder_norm))


def _entries(k: int | None) -> dict[str, object]:
    if k is None:
        raise InvalidInputError("A topk SAE is saved with its k, and none was given.")
    return {"k": k, "rescale_acts_by_decoder_norm": False}


ARCHITECTURES.add("topk", ArchitectureSpec(
    build=lambda config: TopK(config.active, by_decoder_norm=config.decoder_norm == "free"),
    options=("k",), check=check_k_of,
    lens=LensSpec(
        saved_as="topk", entries=_entries, instead="batchtopk", trained_as="topk",
        build=lambda cfg: TopK(cfg.k, cfg.rescale_acts_by_decoder_norm),
    ),
))  # fmt: skip
