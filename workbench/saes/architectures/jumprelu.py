"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): thresholds learnt by straight-through estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.saes.architectures.base import DenseBatch, DenseLosses
from workbench.saes.architectures.elementwise import Backward, Elementwise, Forward, Spread, check_coefficients
from workbench.saes.config import ARCHITECTURES, ArchitectureSpec, LensSpec, SAEConfig, plain_tensors
from workbench.saes.kernels.weights import SAEWeights

if TYPE_CHECKING:
    from sae_lens import JumpReLUTrainingSAEConfig

DEFAULT_THRESHOLD = 1.0
"""One standard deviation of what a unit encoder row reads at first. From near zero half of the features are active, and
thresholds, which Adam moves by no more than the learning rate, need thousands of steps to come up."""


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

    def dense(self, batch: DenseBatch) -> DenseLosses:
        """On all features; the threshold gets the estimates of eqs. 11 and 12 of the paper."""
        pre, theta = batch.pre, _threshold(batch.weights)
        active = (pre > theta).to(pre.dtype)
        window = ((pre - theta).detach().abs() < self.bandwidth / 2).to(pre.dtype) / self.bandwidth
        jump = (theta - theta.detach()) * window  # zero; its gradient is that of the jump
        acts = pre * active - theta.detach() * jump
        penalty = active - jump if self.penalty == "step" else torch.tanh(self.tanh_scale * acts * batch.norms)
        return batch.elementwise(acts, penalty.sum(1).mean())


def _threshold(weights: SAEWeights) -> Tensor:
    assert weights.threshold is not None, "weights of a JumpReLU SAE come from JumpReLU.start"
    return weights.threshold


def threshold_tensors(weights: SAEWeights, threshold: float | None) -> dict[str, Tensor]:
    """The tensors with a threshold per feature: the trained ones, or the one for all.

    Raises:
        InvalidInputError: if there is neither.
    """
    if weights.threshold is None and threshold is None:
        raise InvalidInputError("An SAE of this kind is saved with a threshold, and none was given.")
    own = torch.full_like(weights.b_enc, threshold or 0.0) if weights.threshold is None else weights.threshold
    return plain_tensors(weights) | {"threshold": own}


def _of_config(config: SAEConfig) -> JumpReLU:
    given = {name: value for name, value in config.given.items() if name in JumpReLU.__dataclass_fields__}
    return replace(JumpReLU(initial_threshold=DEFAULT_THRESHOLD), **given)


def _check(config: SAEConfig) -> None:
    check_coefficients(config)
    if config.bandwidth is not None and not config.bandwidth > 0:
        raise InvalidInputError(f"bandwidth={config.bandwidth}: thresholds would get no gradient. Give more than 0.")
    if config.initial_threshold is not None and not config.initial_threshold >= 0:
        raise InvalidInputError(f"initial_threshold={config.initial_threshold}: thresholds are not negative.")
    if config.penalty not in (None, "step", "tanh"):
        raise InvalidInputError(f'penalty={config.penalty!r}: choose "step" or "tanh".')
    if config.tanh_scale is not None and not (config.penalty == "tanh" and 0 < config.tanh_scale < math.inf):
        raise InvalidInputError(
            f'tanh_scale={config.tanh_scale}: give a positive number, together with penalty="tanh".'
        )


def _of_sae_lens(cfg: JumpReLUTrainingSAEConfig) -> JumpReLU:
    if cfg.jumprelu_ste_to_input or cfg.pre_act_loss_coefficient is not None:
        raise InvalidInputError("jumprelu_ste_to_input and pre_act_loss_coefficient are not offered. Leave them out.")
    penalty = cfg.jumprelu_sparsity_loss_mode
    if penalty == "quadratic":
        raise InvalidInputError('jumprelu_sparsity_loss_mode="quadratic" is not offered. Choose "step" or "tanh".')
    return JumpReLU(cfg.jumprelu_bandwidth, cfg.jumprelu_init_threshold, penalty, cfg.jumprelu_tanh_scale)


ARCHITECTURES.add("jumprelu", ArchitectureSpec(
    build=_of_config, check=_check,
    options=("l0_coefficient", "bandwidth", "initial_threshold", "penalty", "tanh_scale"),
    sparsity=lambda config, width: 1.0 if config.l0_coefficient is None else config.l0_coefficient,  # noqa: ARG005
    lens=LensSpec(
        saved_as="jumprelu", transcoder="jumprelu_transcoder", tensors=threshold_tensors, trained_as="jumprelu",
        build=_of_sae_lens, coefficient="l0", penalty="l0_loss",
    ),
))  # fmt: skip
