"""BatchTopK (Bussmann et al. 2024) and its nested form Matryoshka (Bussmann et al. 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.saes.architectures.base import Architecture, Batch, DenseBatch, DenseLosses, StepOptions, StepResult
from workbench.saes.architectures.jumprelu import threshold_tensors
from workbench.saes.architectures.reconstruction import (
    check_k_of,
    dense_reconstruction,
    reconstruction_step,
    smallest_positive,
)
from workbench.saes.config import ARCHITECTURES, ArchitectureSpec, LensSpec, SAEConfig
from workbench.saes.kernels.select import Encoder, Ranking, check_k, select_above, select_batch_topk
from workbench.saes.kernels.sparse import SparseActs
from workbench.saes.kernels.weights import SAEWeights


class _OverTheBatch(Architecture):
    """What BatchTopK and Matryoshka share."""

    k: float | int
    by_decoder_norm: bool

    @property
    def revives(self) -> bool:
        """AuxK revives dead features."""
        return True

    @property
    def keeps_threshold(self) -> bool:
        """What is above it is kept, one token at a time."""
        return True

    def calibrate(self, weights: SAEWeights, x: Tensor, *, start: float, centred: bool) -> float:
        """The threshold at which `k` features per token of `x` are active on average, 0 if fewer are ever positive."""
        wanted, low = int(self.k * len(x)), start / 2
        while True:
            values = self.encode(weights, x, centred=centred, threshold=low).values
            if int((values > 0).sum()) > wanted:
                largest = values.topk(wanted + 1).values
                # In the middle between two neighbours neither depends on how the last bit was rounded.
                return float(largest[-2] + largest[-1]) / 2
            if low == 0.0:
                return 0.0
            low = low / 2 if low > 1e-3 * start else 0.0

    def _encode(self, weights: SAEWeights, read: Tensor, dtype: torch.dtype, threshold: float | None) -> SparseActs:
        """Activations above the threshold; without one, the largest of this batch, as in training."""
        if threshold is None:
            return self._select(weights, read, Ranking(dtype, self.by_decoder_norm), None)
        # Which activations exceed the threshold is part of the result, so the precision is that of x.
        encoder = Encoder(weights, read, Ranking(read.dtype, self.by_decoder_norm))
        acts = select_above(encoder, torch.full_like(weights.b_enc, max(threshold, 0.0)))
        assert acts is not None
        return acts.with_values(encoder.values(acts))

    def _select(self, weights: SAEWeights, read: Tensor, ranking: Ranking, start: float | None) -> SparseActs:
        check_k(self.k, weights.b_enc.numel())
        return select_batch_topk(weights, read, math.floor(self.k * len(read)), ranking, start)

    def _nested_step(
        self, weights: SAEWeights, batch: Batch, options: StepOptions, widths: tuple[int, ...]
    ) -> StepResult:
        acts = self._select(weights, batch.read, Ranking(options.dtype, self.by_decoder_norm), options.threshold)
        result = reconstruction_step(weights, batch, acts, options, widths)
        if not self.by_decoder_norm:
            return result
        norms = weights.W_dec.norm(dim=1)
        return replace(result, threshold=smallest_positive(acts.values * norms[acts.indices]))

    def _nested_dense(self, batch: DenseBatch, widths: tuple[int, ...] | None = None) -> DenseLosses:
        ranks = (batch.pre * batch.norms if self.by_decoder_norm else batch.pre).detach()
        mask = torch.zeros_like(ranks).flatten()
        mask[ranks.flatten().sort(descending=True, stable=True).indices[: int(self.k * len(ranks))]] = 1.0
        return dense_reconstruction(batch, batch.pre.relu() * mask.view_as(ranks), ranks, widths)


@dataclass(frozen=True)
class BatchTopK(_OverTheBatch):
    """The `k * rows` largest positive pre-activations of a batch; at inference those above a fixed threshold.

    Attributes:
        k: mean number of features per token; need not be whole.
        by_decoder_norm: rank by pre-activation times decoder norm, as sae_lens does by default; the threshold is then
            in these units.
    """

    k: float | int
    by_decoder_norm: bool = False

    def _step(self, weights: SAEWeights, batch: Batch, options: StepOptions) -> StepResult:
        return self._nested_step(weights, batch, options, (weights.b_enc.numel(),))

    def dense(self, batch: DenseBatch) -> DenseLosses:
        """By a mask over the batch."""
        return self._nested_dense(batch)


@dataclass(frozen=True)
class Matryoshka(_OverTheBatch):
    """BatchTopK whose first features must also reconstruct alone: the loss is summed over nested prefixes.

    Attributes:
        k: mean number of features per token, of all levels together.
        widths: how many first features each reconstruction uses, increasing; the last is `d_sae`.
        by_decoder_norm: as in BatchTopK.
    """

    k: float | int
    widths: tuple[int, ...]
    by_decoder_norm: bool = False

    def __post_init__(self) -> None:
        if not self.widths or self.widths[0] < 1 or list(self.widths) != sorted(set(self.widths)):
            raise InvalidInputError(
                f"Matryoshka widths are {self.widths}. Give increasing numbers of features, the last of them d_sae, "
                "such as (512, 2048, 4608)."
            )

    def _step(self, weights: SAEWeights, batch: Batch, options: StepOptions) -> StepResult:
        d_sae = weights.b_enc.numel()
        if self.widths[-1] != d_sae:
            raise InvalidInputError(
                f"Matryoshka widths end at {self.widths[-1]}; the SAE has d_sae={d_sae}. End there."
            )
        return self._nested_step(weights, batch, options, self.widths)

    def dense(self, batch: DenseBatch) -> DenseLosses:
        """By a mask over the batch, for each prefix."""
        return self._nested_dense(batch, self.widths)


def _check_prefixes(config: SAEConfig) -> None:
    check_k_of(config)
    widths = config.prefixes
    if widths[0] < 1 or any(a >= b for a, b in zip(widths, widths[1:], strict=False)):
        raise InvalidInputError(
            f"widths={config.widths}, d_sae={config.d_sae}: prefixes must increase, from at least 1 to at most d_sae."
        )


_SAVED = LensSpec(saved_as="jumprelu", transcoder="jumprelu_transcoder", tensors=threshold_tensors)

ARCHITECTURES.add("batchtopk", ArchitectureSpec(
    build=lambda config: BatchTopK(float(config.active), by_decoder_norm=config.decoder_norm == "free"),
    options=("k",), check=check_k_of, aliases=("batch_topk",),
    lens=replace(
        _SAVED, trained_as="batchtopk", build=lambda cfg: BatchTopK(cfg.k, cfg.rescale_acts_by_decoder_norm)
    ),
))  # fmt: skip
ARCHITECTURES.add("matryoshka", ArchitectureSpec(
    build=lambda config: Matryoshka(float(config.active), config.prefixes, config.decoder_norm == "free"),
    options=("k", "widths"), check=_check_prefixes, aliases=("matryoshka_batchtopk",),
    lens=replace(
        _SAVED, trained_as="matryoshka_batchtopk",
        build=lambda cfg: Matryoshka(cfg.k, tuple(cfg.matryoshka_widths), cfg.rescale_acts_by_decoder_norm),
    ),
))  # fmt: skip
