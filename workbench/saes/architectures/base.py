"""What every architecture offers to the trainer: first weights, one step, activations, and bounds after a step."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.saes.kernels.sparse import Products, SparseActs, SparseProducts
from workbench.saes.kernels.weights import SAEWeights

NO_VARIANCE = 1e-10
"""Variance of the residuals, as a share of their squared norm, up to which there is no auxiliary loss."""


@dataclass(frozen=True)
class AuxTask(OneLine):
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
class StepOptions(OneLine):
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
class StepResult(OneLine):
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


@dataclass(frozen=True)
class Batch:
    """One batch as the step sees it.

    Attributes:
        read: what the encoder reads: `x - b_dec`, or `x` in a transcoder.
        target: what is reconstructed, if it is not `x`.
    """

    read: Float[Tensor, "rows d_in"]
    target: Float[Tensor, "rows d_out"] | None

    @classmethod
    def of(cls, weights: SAEWeights, x: Tensor, target: Tensor | None) -> Batch:
        """Checks the shapes.

        Raises:
            ShapeError: if `x` or `target` has another width than the SAE, or another number of rows than the other.
        """
        d_in, d_out = weights.W_enc.shape[1], weights.W_dec.shape[1]
        if x.ndim != 2 or x.shape[1] != d_in:
            raise ShapeError(f"step: x has shape {tuple(x.shape)}; this SAE reads d_in={d_in}. Give (rows, {d_in}).")
        if target is None:
            if d_in != d_out:
                raise ShapeError(f"step: this SAE reads d_in={d_in} and writes d_out={d_out}. Give a target.")
            return cls(x - weights.b_dec, None)
        if target.shape != (len(x), d_out):
            raise ShapeError(
                f"step: the target has shape {tuple(target.shape)}; x has {len(x)} rows and this transcoder writes "
                f"d_out={d_out}. Give ({len(x)}, {d_out})."
            )
        return cls(x, target)

    def error(self, weights: SAEWeights, decoded: Float[Tensor, "rows d_out"]) -> Float[Tensor, "rows d_out"]:
        """Reconstruction minus what it should be, written into `decoded`, which lacks the decoder bias."""
        if self.target is None:
            return decoded.sub_(self.read)
        return decoded.add_(weights.b_dec).sub_(self.target)

    def add_input_gradient(self, weights: SAEWeights, gradients: SAEWeights, d_read: Float[Tensor, " d_sae"]) -> None:
        """Adds to `b_dec` what it gets through the input `x - b_dec`: one matrix-vector product for the batch.

        Args:
            weights: the SAE.
            gradients: changed in place.
            d_read: gradient of the encoder's products, summed over the rows.
        """
        if self.target is None:
            gradients.b_dec.sub_(d_read @ weights.W_enc)


@dataclass(frozen=True)
class DenseBatch:
    """One batch for the dense reference step; `weights` are leaves that need gradients.

    Attributes:
        weights: the SAE.
        read: what the encoder reads.
        wanted: what is reconstructed.
        options: of the step.
    """

    weights: SAEWeights
    read: Float[Tensor, "rows d_in"]
    wanted: Float[Tensor, "rows d_out"]
    options: StepOptions

    @cached_property
    def pre(self) -> Float[Tensor, "rows d_sae"]:
        """Pre-activations."""
        return self.read @ self.weights.W_enc.T + self.weights.b_enc

    @cached_property
    def norms(self) -> Float[Tensor, " d_sae"]:
        """Decoder norms."""
        return self.weights.W_dec.norm(dim=1)

    def error(self, acts: Float[Tensor, "rows n"]) -> Float[Tensor, "rows d_out"]:
        """Reconstruction by the first `n` features, minus what is wanted."""
        n = acts.shape[1]
        return acts @ self.weights.W_dec[:n] + self.weights.b_dec - self.wanted

    @staticmethod
    def mean_square(error: Tensor) -> Float[Tensor, ""]:
        """Mean over rows of the squared norm."""
        return error.square().sum(1).mean()

    @staticmethod
    def least(values: Tensor) -> Float[Tensor, ""]:
        """The smallest value; NaN if there is none."""
        return values.min() if values.numel() else values.new_full((), float("nan"))

    def elementwise(self, acts: Tensor, penalty: Tensor, aux: Tensor | None = None) -> DenseLosses:
        """Losses where each activation depends on its own pre-activation: error, weighted penalty, and maybe more."""
        return DenseLosses(
            loss=self.mean_square(self.error(acts)), aux=self.wanted.new_zeros(()) if aux is None else aux,
            sparsity=self.options.sparsity * penalty, acts=acts, threshold=self.least(acts[acts > 0]),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DenseLosses(OneLine):
    """What a dense forward pass gives; see `StepResult`.

    Attributes:
        loss: of the reconstruction.
        aux: every other reconstruction loss.
        sparsity: the penalty, coefficient applied.
        acts: activations of all features.
        threshold: smallest positive activation that was kept.
    """

    loss: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]
    acts: Float[Tensor, "rows d_sae"]
    threshold: Float[Tensor, ""]


class Architecture(OneLine, abc.ABC):
    """One kind of SAE: its first weights, a training step, its activations, and bounds after a step.

    A kind gives `_step` and `_encode`; the rest has defaults. `target` is None for an SAE, which reads `x - b_dec` and
    reconstructs `x`; a transcoder reads `x` as it is and reconstructs `target`.
    """

    @property
    def revives(self) -> bool:
        """Whether AuxK revives its dead features."""
        return False

    @property
    def keeps_threshold(self) -> bool:
        """Whether it is used, after training, with one threshold for all features, found by `calibrate`."""
        return False

    def start(self, weights: SAEWeights) -> SAEWeights:
        """Adds the parameters that only this architecture has, at their initial values."""
        return weights

    def step(
        self,
        weights: SAEWeights,
        x: Float[Tensor, "rows d_in"],
        target: Float[Tensor, "rows d_out"] | None = None,
        options: StepOptions = StepOptions(),  # noqa: B008 - frozen
    ) -> StepResult:
        """Loss and gradients of one batch, equal to dense autograd up to rounding; `weights` are not changed.

        Raises:
            ShapeError: if `x` or `target` does not fit the weights.
        """
        return self._step(weights, Batch.of(weights, x, target), options)

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
            dtype: precision of the selection, where features are ranked.
            threshold: of BatchTopK and Matryoshka, which keep what is larger at inference; others ignore it.
        """
        return self._encode(weights, x - weights.b_dec if centred else x, dtype, threshold)

    def after_step(self, weights: SAEWeights) -> None:
        """Puts parameters back into their bounds, in place; by default there are none."""
        del weights

    def calibrate(
        self, weights: SAEWeights, x: Float[Tensor, "rows d_in"], *, start: float, centred: bool
    ) -> float | None:
        """The threshold for use after training; None for kinds that keep none.

        Args:
            weights: the SAE.
            x: activations, in the scale of training.
            start: a guess, such as the running threshold.
            centred: see `encode`.
        """
        del weights, x, start, centred

    def dense(self, batch: DenseBatch) -> DenseLosses:
        """The same losses by dense autograd: short, slow, and what the step is checked against.

        Raises:
            InvalidInputError: if this kind has none.
        """
        del batch
        raise InvalidInputError(
            f"There is no dense reference for {type(self).__name__}. Give it a method `dense`, or use its own step."
        )

    @abc.abstractmethod
    def _step(self, weights: SAEWeights, batch: Batch, options: StepOptions) -> StepResult: ...

    @abc.abstractmethod
    def _encode(self, weights: SAEWeights, read: Tensor, dtype: torch.dtype, threshold: float | None) -> SparseActs: ...
