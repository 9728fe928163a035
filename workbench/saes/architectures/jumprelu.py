"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): thresholds learnt by straight-through estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.saes.architectures.elementwise import Backward, Elementwise, Forward, Spread
from workbench.saes.kernels.weights import SAEWeights


@dataclass(frozen=True)
class JumpReLU(Elementwise):
    """Pre-activations above the threshold of their feature.

    The threshold itself is the parameter, as in sae_lens; the paper trains its logarithm, which Adam moves too slowly
    from a small start.

    Attributes:
        bandwidth: width of the rectangle around the threshold within which a pre-activation moves it.
        initial_threshold: of every feature.
        penalty: "step" counts active features (the paper); "tanh" takes `tanh(tanh_scale * a * ||W_dec||)`.
        tanh_scale: of that penalty.
    """

    bandwidth: float = 0.05
    initial_threshold: float = 0.01
    penalty: Literal["step", "tanh"] = "step"
    tanh_scale: float = 4.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.initial_threshold < 0 or self.tanh_scale <= 0:
            raise InvalidInputError(
                f"JumpReLU: bandwidth={self.bandwidth} and tanh_scale={self.tanh_scale} must be positive, "
                f"initial_threshold={self.initial_threshold} not negative."
            )
        if self.penalty not in ("step", "tanh"):
            raise InvalidInputError(f'JumpReLU: penalty={self.penalty!r}. Choose "step" or "tanh".')

    def start(self, weights: SAEWeights) -> SAEWeights:
        """Adds the thresholds."""
        return replace(weights, threshold=torch.full_like(weights.b_enc, self.initial_threshold))

    def after_step(self, weights: SAEWeights) -> None:
        """Below zero a threshold would let negative pre-activations through."""
        _threshold(weights).clamp_min_(0)

    def cut(self, weights: SAEWeights) -> Float[Tensor, " d_sae"]:
        """The lower end of the window; what lies between it and the threshold is inactive but moves the threshold."""
        return _threshold(weights) - self.bandwidth / 2

    def forward(self, weights: SAEWeights, pre: Tensor, norms: Tensor, at: Spread) -> Forward:
        """Activations, and the penalty of each."""
        active = (pre > at(_threshold(weights))).to(pre.dtype)
        acts = pre * active
        return Forward([acts], active if self.penalty == "step" else torch.tanh(self.tanh_scale * acts * norms))

    def backward(
        self, weights: SAEWeights, pre: Tensor, norms: Tensor, at: Spread, d_paths: Sequence[Tensor], d_penalty: float
    ) -> Backward:
        """The threshold is moved by the jump it makes within the window; the pre-activation by the slope alone."""
        theta = at(_threshold(weights))
        active, off = pre > theta, (pre - theta) / self.bandwidth
        window = ((off > -0.5) & (off < 0.5)).to(pre.dtype) / self.bandwidth
        if self.penalty == "step":
            return Backward(
                d_paths[0] * active, torch.zeros_like(pre), {"threshold": -window * (theta * d_paths[0] + d_penalty)}
            )
        acts = pre * active
        slope = d_penalty * self.tanh_scale * (1 - torch.tanh(self.tanh_scale * acts * norms).square())
        d_acts = d_paths[0] + slope * norms
        return Backward(d_acts * active, slope * acts, {"threshold": -window * theta * d_acts})


def _threshold(weights: SAEWeights) -> Tensor:
    assert weights.threshold is not None, "weights of a JumpReLU SAE come from JumpReLU.start"
    return weights.threshold
