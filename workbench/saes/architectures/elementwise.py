"""The step that ReLU, JumpReLU and gated SAEs share: each activation depends on its own pre-activation alone.

Early in training most activations are positive; a chunk of rows is then taken as it is. Once few are, only those few
are computed with. Neither form makes a tensor of shape `[rows, d_sae]`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.saes.architectures.base import Architecture, Batch, StepOptions, StepResult
from workbench.saes.architectures.reconstruction import smallest_positive, squared_norm
from workbench.saes.config import SAEConfig
from workbench.saes.kernels.select import Encoder, Ranking, select_above
from workbench.saes.kernels.sparse import FeatureLists, Products, SparseActs
from workbench.saes.kernels.weights import SAEWeights

L1_PER_ROOT_WIDTH = 1 / 12
"""Default weight of the L1 penalty, times the square root of the width, with which activations grow: 2 at 576
dimensions, 5 at 3,600."""
SPARSE_BELOW = 1 / 20
"""Density of the pattern below which the sparse form costs less."""

Spread = Callable[[Tensor], Tensor]
"""Gives a parameter of the features the shape of the entries."""


@dataclass(frozen=True)
class Forward(OneLine):
    """What the entries contribute.

    Attributes:
        paths: activations that each reconstruct the target; the first are those of the SAE.
        penalty: of each entry, before the coefficient.
    """

    paths: Sequence[Tensor]
    penalty: Tensor


@dataclass(frozen=True)
class Backward(OneLine):
    """Gradients with respect to what each entry used.

    Attributes:
        read: the product of what the encoder reads with `W_enc`.
        norm: the decoder norm.
        own: parameters that only this architecture has, by name.
        bias: `b_enc`, if it differs from `read`.
    """

    read: Tensor
    norm: Tensor
    own: dict[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None


@runtime_checkable
class _View(Protocol):
    """Entries of some rows, sparse or dense, and the products with them."""

    @property
    def pre(self) -> Tensor: ...
    def at(self, parameter: Tensor) -> Tensor: ...
    def decode(self, values: Tensor, W: Tensor) -> Tensor: ...
    def dots(self, x: Tensor, W: Tensor) -> Tensor: ...
    def weighted_sums(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]: ...
    def sum(self, values: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _SparseView:
    acts: SparseActs
    lists: FeatureLists
    products: Products

    @property
    def pre(self) -> Tensor:
        return self.acts.values

    def at(self, parameter: Tensor) -> Tensor:
        return parameter[self.acts.indices]

    def decode(self, values: Tensor, W: Tensor) -> Tensor:
        return self.products.decode(self.acts.with_values(values), W)

    def dots(self, x: Tensor, W: Tensor) -> Tensor:
        return self.products.dots(self.acts, x, W)

    def weighted_sums(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return self.products.sums(self.acts, self.lists, pairs)

    def sum(self, values: Tensor) -> Tensor:
        return self.lists.sum(values)


@dataclass(frozen=True)
class _DenseView:
    pre: Tensor

    def at(self, parameter: Tensor) -> Tensor:
        return parameter

    def decode(self, values: Tensor, W: Tensor) -> Tensor:
        return values @ W

    def dots(self, x: Tensor, W: Tensor) -> Tensor:
        return x @ W.t()

    def weighted_sums(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [values.t() @ x for values, x in pairs]

    def sum(self, values: Tensor) -> Tensor:
        return values.sum(0)


class _Totals:
    """Losses and gradients, added up over the parts of a batch."""

    def __init__(self, weights: SAEWeights) -> None:
        self.gradients = SAEWeights(**{name: torch.zeros_like(t) for name, t in weights.named().items()})
        self.loss, self.aux, self.penalty = (weights.b_dec.new_zeros(()) for _ in range(3))
        self.fired, self.read = torch.zeros_like(weights.b_enc), torch.zeros_like(weights.b_enc)
        self.least = weights.b_dec.new_full((), float("nan"))


@dataclass(frozen=True)
class _Part:
    """Adds some rows of a batch of `rows` to the totals."""

    rule: Elementwise
    weights: SAEWeights
    norms: Tensor
    sparsity: float
    rows: int

    def add(self, view: _View, batch: Batch, totals: _Totals) -> None:
        W, scale, norms = self.weights.W_dec, 2 / self.rows, view.at(self.norms)
        forward = self.rule.forward(self.weights, view.pre, norms, view.at)
        errors = [batch.error(self.weights, view.decode(values, W)).mul_(scale) for values in forward.paths]
        d_paths = [view.dots(error, W) for error in errors]
        weight = self.sparsity / self.rows
        backward = self.rule.backward(self.weights, view.pre, norms, view.at, d_paths, weight)
        losses = [squared_norm(error) / (scale * scale * self.rows) for error in errors]
        totals.loss, totals.aux = totals.loss + losses[0], totals.aux + sum(losses[1:])
        totals.penalty = totals.penalty + weight * forward.penalty.sum()
        acts = forward.paths[0]
        totals.fired += view.sum((acts > 0).to(acts.dtype))
        totals.least = torch.fmin(totals.least, smallest_positive(acts.flatten()))
        totals.read += view.sum(backward.read)
        self._add_gradients(view, totals.gradients, backward, batch.read)
        self._add_decoder_gradients(view, totals.gradients, list(zip(forward.paths, errors, strict=True)))

    def _add_gradients(self, view: _View, gradients: SAEWeights, backward: Backward, read: Tensor) -> None:
        gradients.W_enc += view.weighted_sums([(backward.read, read)])[0]
        gradients.b_enc += view.sum(backward.read if backward.bias is None else backward.bias)
        along = view.sum(backward.norm) / self.norms.clamp_min(1e-12)
        gradients.W_dec.addcmul_(along[:, None], self.weights.W_dec)
        for name, values in backward.own.items():
            getattr(gradients, name).add_(view.sum(values))

    def _add_decoder_gradients(
        self, view: _View, gradients: SAEWeights, paths: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        for (values, error), trained in zip(paths, self.rule.trains_decoder, strict=True):
            if trained:
                gradients.W_dec += view.weighted_sums([(values, error)])[0]
                gradients.b_dec += error.sum(0)


class Elementwise(Architecture):
    """An architecture as functions of single entries; `at` spreads a parameter of the features over the entries."""

    @property
    def trains_decoder(self) -> tuple[bool, ...]:
        """Whether the reconstruction of each path trains the decoder and its bias."""
        return (True,)

    def cut(self, weights: SAEWeights) -> Float[Tensor, " d_sae"]:
        """Pre-activations up to here contribute nothing, and get no gradient."""
        return torch.zeros_like(weights.b_enc)

    @abc.abstractmethod
    def forward(self, weights: SAEWeights, pre: Tensor, norms: Tensor, at: Spread) -> Forward:
        """Activations and penalty."""

    @abc.abstractmethod
    def backward(
        self, weights: SAEWeights, pre: Tensor, norms: Tensor, at: Spread, d_paths: Sequence[Tensor], d_penalty: float
    ) -> Backward:
        """Gradients, from those of the activations of each path and of the penalty."""

    def _step(self, weights: SAEWeights, batch: Batch, options: StepOptions) -> StepResult:
        """The pattern depends on values, so `options.dtype` has no effect on it."""
        encoder = Encoder(weights, batch.read, Ranking(batch.read.dtype))
        norms, totals = weights.W_dec.norm(dim=1), _Totals(weights)
        limit = max(1, int(SPARSE_BELOW * norms.numel()))
        entries = select_above(encoder, self.cut(weights), limit)
        part = _Part(self, weights, norms, options.sparsity, len(batch.read))
        if entries is not None:
            part.add(_SparseView(entries, entries.by_feature(), options.products), batch, totals)
        else:
            for start, pre in encoder.chunks():
                rows = slice(start, start + len(pre))
                target = None if batch.target is None else batch.target[rows]
                part.add(_DenseView(pre), Batch(batch.read[rows], target), totals)
        batch.add_input_gradient(weights, totals.gradients, totals.read)
        return StepResult(totals.loss, totals.aux, totals.penalty, totals.gradients, totals.fired.long(), totals.least)

    def _encode(self, weights: SAEWeights, read: Tensor, dtype: torch.dtype, threshold: float | None) -> SparseActs:
        """The activations above zero."""
        del dtype, threshold
        entries = select_above(Encoder(weights, read, Ranking(read.dtype)), self.cut(weights))
        assert entries is not None
        norms = weights.W_dec.norm(dim=1)[entries.indices]
        values = self.forward(weights, entries.values, norms, lambda p: p[entries.indices]).paths[0]
        kept = values > 0
        before = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])
        return SparseActs(before[entries.offsets], entries.indices[kept], values[kept], entries.d_sae)


def l1_sparsity(config: SAEConfig, width: int) -> float:
    """Weight of the L1 penalty where so many dimensions are reconstructed."""
    return L1_PER_ROOT_WIDTH * math.sqrt(width) if config.l1_coefficient is None else config.l1_coefficient


def check_coefficients(config: SAEConfig) -> None:
    """Refuses weights of a penalty that can't be used.

    Raises:
        InvalidInputError: if one is negative or not a number.
    """
    for name in ("l1_coefficient", "l0_coefficient"):
        if not (getattr(config, name) or 0) >= 0:
            raise InvalidInputError(
                f"{name}={getattr(config, name)} can't be used: less than 0 rewards density. Give 0 or more."
            )
