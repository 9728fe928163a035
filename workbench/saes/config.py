"""What an SAE is and how it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from workbench.errors import InvalidInputError, UnknownNameError, did_you_mean

ARCHITECTURES = ("topk",)
LR_AT_16K_FEATURES = 1e-3


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """A TopK SAE and its training.

    Activations are centred on their mean through `b_dec` and scaled to a variance of 1 per dimension; the scale is
    folded into the saved weights, so a saved SAE reads raw activations. Decoder rows have unit norm throughout.

    Raises:
        UnknownNameError: for an unknown architecture.
        InvalidInputError: for values that can't be used.
    """

    architecture: str = "topk"
    """Kind of SAE. Only "topk" so far."""
    d_sae: int = 4608
    """Number of features."""
    k: int = 32
    """Features that may be active on one token."""
    tokens: int = 600_000
    """Token-steps: tokens that are trained on, counted again in each epoch."""
    batch: int = 2048
    """Tokens per step."""
    distinct_tokens: int | None = None
    """Train on the packed rows of only the first so many tokens of the store; None takes all."""
    lr: float | None = None
    """Peak learning rate of Adam; None takes 1e-3 / sqrt(d_sae / 16384), tuned for runs of a few hundred steps."""
    seed: int = 0
    """Seed of the initial weights and of the order of tokens."""
    site: str | None = None
    """Site to train on; None takes the only one in the store."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    decay: float = 0.3
    """Share of the steps, at the end, in which the learning rate falls to zero."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    aux_coefficient: float = 1 / 32
    """Weight of the loss that revives dead features, relative to the main loss; 0 turns it off."""
    dead_after: int = 100_000
    """Tokens without firing after which a feature counts as dead."""
    buffer: int = 262_144
    """Activations held in memory for shuffling."""
    select: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision in which features are ranked; "auto" measures. Activations and gradients are fp32 in any case."""
    checkpoint_seconds: float = 20.0
    """Time between checkpoints."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UnknownNameError(
                f"Architecture {self.architecture!r} can't be trained yet. "
                f"{did_you_mean(self.architecture, ARCHITECTURES)}"
            )
        if not 1 <= self.k <= self.d_sae:
            raise InvalidInputError(f"k={self.k}, d_sae={self.d_sae}: choose 1 <= k <= d_sae.")
        if self.batch < 1 or self.tokens < self.batch:
            raise InvalidInputError(
                f"tokens={self.tokens}, batch={self.batch}: train on at least one batch of one token."
            )
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1):
            raise InvalidInputError(f"warmup={self.warmup}, decay={self.decay}: both are shares, between 0 and 1.")
        if self.clip <= 0 or (self.lr is not None and self.lr <= 0) or self.aux_coefficient < 0 or self.dead_after < 1:
            raise InvalidInputError(
                f"clip={self.clip}, lr={self.lr}, dead_after={self.dead_after} must be positive, "
                f"aux_coefficient={self.aux_coefficient} not negative."
            )
        if self.distinct_tokens is not None and self.distinct_tokens < 1:
            raise InvalidInputError(f"distinct_tokens={self.distinct_tokens}: give at least 1, or None for all.")
        if self.buffer < 2:
            raise InvalidInputError(f"buffer={self.buffer}: hold at least 2 activations.")

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.tokens // self.batch

    @property
    def peak_lr(self) -> float:
        """The learning rate that is used.

        >>> SAEConfig(d_sae=16384).peak_lr
        0.001
        """
        return self.lr if self.lr is not None else LR_AT_16K_FEATURES / math.sqrt(self.d_sae / 2**14)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, constant, linear decay.

        >>> SAEConfig(tokens=100, batch=1, lr=1.0, warmup=0.1, decay=0.5).lr_at(0)  # 1 of 10 warm-up steps
        0.1
        """
        up = (step + 1) / max(1.0, self.warmup * self.steps)
        down = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.peak_lr * min(1.0, up, down)
