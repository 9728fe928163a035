"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): one path opens features, another gives their size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
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
from workbench.saes.config import ARCHITECTURES, ArchitectureSpec, LensSpec, plain_tensors
from workbench.saes.kernels.weights import SAEWeights


@dataclass(frozen=True)
class Gated(Elementwise):
    """A feature is on where its gate `read @ W_enc + b_enc` is positive; its size is that of the magnitude path.

    The magnitude path shares the encoder: `relu((read @ W_enc) * exp(r_mag) + b_mag)`. The penalty is L1 of the
    positive part of the gate times the decoder norm; a second reconstruction, from the gate, is added to the loss.

    Attributes:
        frozen_decoder: the second reconstruction does not train the decoder, as in the paper. Off by default, as in
            sae_lens.
    """

    frozen_decoder: bool = False

    @property
    def trains_decoder(self) -> tuple[bool, ...]:
        """The main reconstruction does, that of the gate as chosen."""
        return (True, not self.frozen_decoder)

    def start(self, weights: SAEWeights) -> SAEWeights:
        """Adds the magnitude path, at first equal to the gate."""
        return replace(weights, r_mag=torch.zeros_like(weights.b_enc), b_mag=torch.zeros_like(weights.b_enc))

    def forward(self, weights: SAEWeights, pre: Tensor, norms: Tensor, at: Spread) -> Forward:
        """Activations and the open gates."""
        gate = pre.clamp_min(0)
        return Forward([self._magnitude(weights, pre, at).clamp_min(0) * (pre > 0), gate], gate * norms)

    def backward(
        self, weights: SAEWeights, pre: Tensor, norms: Tensor, at: Spread, d_paths: Sequence[Tensor], d_penalty: float
    ) -> Backward:
        """The step of the gate has no gradient; the gate learns from its own reconstruction and the penalty."""
        r_mag, _ = _own(weights)
        is_open = pre > 0
        d_magnitude = d_paths[0] * (is_open & (self._magnitude(weights, pre, at) > 0))
        growth = at(r_mag).exp()
        d_gate = (d_paths[1] + d_penalty * norms) * is_open
        own = {"r_mag": d_magnitude * (pre - at(weights.b_enc)) * growth, "b_mag": d_magnitude}
        return Backward(d_magnitude * growth + d_gate, d_penalty * pre.clamp_min(0), own, d_gate)

    def dense(self, batch: DenseBatch) -> DenseLosses:
        """On all features."""
        w, gate = batch.weights, batch.pre.relu()
        r_mag, b_mag = _own(w)
        acts = (batch.pre > 0) * ((batch.read @ w.W_enc.T) * r_mag.exp() + b_mag).relu()
        W, b = (w.W_dec.detach(), w.b_dec.detach()) if self.frozen_decoder else (w.W_dec, w.b_dec)
        aux = batch.mean_square(gate @ W + b - batch.wanted)
        return batch.elementwise(acts, (gate * batch.norms).sum(1).mean(), aux)

    def _magnitude(self, weights: SAEWeights, pre: Tensor, at: Spread) -> Tensor:
        r_mag, b_mag = _own(weights)
        return (pre - at(weights.b_enc)) * at(r_mag).exp() + at(b_mag)


def _own(weights: SAEWeights) -> tuple[Tensor, Tensor]:
    assert weights.r_mag is not None and weights.b_mag is not None, "weights of a gated SAE come from Gated.start"
    return weights.r_mag, weights.b_mag


def _tensors(weights: SAEWeights, threshold: float | None) -> dict[str, Tensor]:
    if weights.r_mag is None or weights.b_mag is None:
        raise InvalidInputError("A gated SAE is saved with r_mag and b_mag, and these weights have none.")
    tensors = plain_tensors(weights, threshold)
    return tensors | {"b_gate": tensors.pop("b_enc"), "r_mag": weights.r_mag, "b_mag": weights.b_mag}


ARCHITECTURES.add("gated", ArchitectureSpec(
    build=lambda config: Gated(frozen_decoder=bool(config.frozen_decoder)),
    options=("l1_coefficient", "frozen_decoder"), check=check_coefficients, sparsity=l1_sparsity,
    lens=LensSpec(
        saved_as="gated", tensors=_tensors, trained_as="gated", coefficient="l1", penalty="l1_loss",
        build=lambda cfg: Gated(),  # noqa: ARG005
    ),
))  # fmt: skip
