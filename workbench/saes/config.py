"""What an SAE or transcoder is and how it is trained; what a kind of SAE consists of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, UnknownNameError, did_you_mean
from workbench.core.registry import Registry
from workbench.saes.architectures.base import Architecture
from workbench.saes.kernels.weights import SAEWeights

LR_AT_16K_FEATURES = 1e-3
DEFAULT_K = 32

Kernel = Literal["auto", "csr", "csr_bf16", "dense", "triton", "reference"]


def plain_tensors(weights: SAEWeights, threshold: float | None = None) -> dict[str, Tensor]:
    """The tensors of an SAE without parameters of its own, in the names and orientation of sae_lens."""
    del threshold
    return {"W_enc": weights.W_enc.t(), "b_enc": weights.b_enc, "W_dec": weights.W_dec, "b_dec": weights.b_dec}


def _nothing(config: SAEConfig) -> None:
    del config


def _no_entries(k: int | None) -> dict[str, object]:
    del k
    return {}


@dataclass(frozen=True, kw_only=True)
class LensSpec:
    """How a kind of SAE is written in sae_lens.

    Attributes:
        saved_as: the inference architecture of sae_lens that computes the same.
        transcoder: that of a transcoder; None if sae_lens has none.
        instead: the kind of transcoder to train where sae_lens has none of this kind.
        tensors: what is saved, from weights that read raw activations and, for kinds that keep one, the threshold.
        entries: further entries of `cfg.json`, from k.
        trained_as: the training architecture of sae_lens that it can replace; None if there is none.
        build: what computes the steps, from a training config of sae_lens, whose class differs by architecture.
        coefficient: of the penalty, in the words of sae_lens; empty if there is none.
        penalty: name of the penalty in the logs of sae_lens.
    """

    saved_as: str
    transcoder: str | None = None
    instead: str = "jumprelu"
    tensors: Callable[[SAEWeights, float | None], dict[str, Tensor]] = plain_tensors
    entries: Callable[[int | None], dict[str, object]] = _no_entries
    trained_as: str | None = None
    build: Callable[[Any], Architecture] | None = None
    coefficient: str = ""
    penalty: str = ""


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec(OneLine):
    """Everything that a kind of SAE is; registered in `ARCHITECTURES` by the file that defines it.

    Attributes:
        build: what computes the steps of a configuration.
        lens: how it is written in sae_lens.
        options: options that it reads and not every kind has: fields of `SAEConfig`, or names in `SAEConfig.own`.
        check: raises InvalidInputError if their values can't be used.
        sparsity: weight of the penalty after its warm-up, where so many dimensions are reconstructed.
        aliases: other names.
    """

    build: Callable[[SAEConfig], Architecture]
    lens: LensSpec
    options: tuple[str, ...] = ()
    check: Callable[[SAEConfig], None] = _nothing
    sparsity: Callable[[SAEConfig, int], float] = lambda config, width: 0.0  # noqa: ARG005
    aliases: tuple[str, ...] = ()


ARCHITECTURES: Registry[ArchitectureSpec] = Registry("SAE architecture", package="workbench.saes.architectures")
"""Every kind of SAE by its name."""


def architecture_name(name: str) -> str:
    """The name under which a kind is registered, from that name or an alias.

    Raises:
        UnknownNameError: for any other name.

    >>> architecture_name("standard")
    'relu'
    """
    aliases = {alias: kind for kind, spec in ARCHITECTURES.items() for alias in spec.aliases}
    if name not in aliases and name not in ARCHITECTURES:
        raise UnknownNameError(
            f"Architecture {name!r} is unknown. {did_you_mean(name, (*ARCHITECTURES, *aliases))} A kind of your own is "
            "known once its file is imported."
        )
    return aliases.get(name, name)


@checked
@dataclass(frozen=True, kw_only=True)
class SAEConfig(OneLine):
    """An SAE or transcoder and its training.

    Activations are scaled to a variance of 1 per dimension and `b_dec` starts at their mean; the scale is folded into
    the saved weights, so that a saved SAE reads raw activations. Coefficients and thresholds are in these units, in
    which the error of the mean predictor is the number of dimensions.

    Raises:
        UnknownNameError: for an unknown architecture.
        InvalidInputError: for values that can't be used, or options that the architecture does not have.
    """

    architecture: str = "topk"
    """Kind of SAE: topk, batchtopk, matryoshka, relu (or standard), jumprelu, gated."""
    d_sae: int = 4608
    """Number of features."""
    k: int | None = None
    """Features that may be active on one token, in batchtopk and matryoshka on average; None takes 32."""
    l1_coefficient: float | None = None
    """Weight of the sum of activations in relu and gated; None takes sqrt(width) / 12, of what is reconstructed."""
    l0_coefficient: float | None = None
    """Weight of the number of active features in jumprelu; None takes 1."""
    sparsity_warmup: float = 0.1
    """Share of the steps in which that weight rises from zero."""
    bandwidth: float | None = None
    """Width of the window in which jumprelu thresholds get a gradient; None takes 0.05."""
    initial_threshold: float | None = None
    """Threshold that jumprelu starts from; None takes 1."""
    penalty: Literal["step", "tanh"] | None = None
    """What jumprelu sums over features: "step" 1 where active, "tanh" tanh(tanh_scale · activation · decoder norm);
    None takes "step"."""
    tanh_scale: float | None = None
    """Slope of the tanh penalty at zero; None takes 4."""
    frozen_decoder: bool | None = None
    """Whether the second reconstruction of gated leaves the decoder untrained, as in the paper; None trains it, as
    sae_lens does."""
    widths: tuple[int, ...] | None = None
    """Prefixes of a matryoshka SAE that reconstruct by themselves; None takes 1/16, 1/8, 1/4, 1/2 of d_sae and all."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """"unit": decoder rows keep unit norm; "free": they do not, and features are ranked by activation times norm."""
    site: str | None = None
    """Site that is read; None takes the only one in the store."""
    target_site: str | None = None
    """Site that a transcoder reconstructs; None makes an SAE, which reconstructs what it reads."""
    tokens: int = 600_000
    """Token-steps: tokens that are trained on, counted again in each epoch."""
    batch: int = 2048
    """Tokens per step."""
    distinct_tokens: int | None = None
    """Train on the packed rows of only the first so many tokens of the store; None takes all."""
    lr: float | None = None
    """Peak learning rate of Adam; None takes 1e-3 / sqrt(d_sae / 16384), tuned for runs of a few hundred steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's moments."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    decay: float = 0.3
    """Share of the steps, at the end, in which the learning rate falls to zero."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    aux_coefficient: float = 1 / 32
    """Weight of the loss that revives dead features, relative to the main loss; 0 turns it off."""
    aux_k: int | None = None
    """Dead features that reconstruct the residual of a token; None takes half the width of what is reconstructed."""
    dead_after: int = 100_000
    """Tokens without firing after which a feature counts as dead."""
    seed: int = 0
    """Seed of the initial weights."""
    data_seed: int | None = None
    """Seed of the order of tokens; None takes `seed`."""
    buffer: int = 262_144
    """Activations held in memory for shuffling."""
    kernel: Kernel = "auto"
    """How a step is computed; "auto" measures. Results agree up to rounding, those of csr_bf16 up to near ties."""
    device: str = "auto"
    """Where to train: "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one."""
    checkpoint_seconds: float = 20.0
    """Time between checkpoints."""
    own: Mapping[str, float | str] | None = field(default=None, hash=False)
    """Options, by name, of an architecture whose options have no field here, such as one of your own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "architecture", architecture_name(self.architecture))
        self._check_options()
        self._check_training()
        if self.target_site is not None and self.spec.lens.transcoder is None:
            raise InvalidInputError(
                f"architecture={self.architecture!r} with target_site={self.target_site!r}: sae_lens has no transcoder "
                f"of this kind, so it could not be saved. Use {self.spec.lens.instead!r}."
            )

    @property
    def spec(self) -> ArchitectureSpec:
        """What its kind of SAE consists of."""
        return ARCHITECTURES[self.architecture]

    @property
    def given(self) -> dict[str, object]:
        """Options that not every architecture has, as far as they were given."""
        names = {name for spec in ARCHITECTURES.values() for name in spec.options}
        values = {name: getattr(self, name, None) for name in sorted(names)} | dict(self.own or {})
        return {name: value for name, value in values.items() if value is not None}

    def _check_options(self) -> None:
        for name, value in self.given.items():
            if name not in self.spec.options:
                owners = [kind for kind, spec in ARCHITECTURES.items() if name in spec.options]
                raise InvalidInputError(
                    f"{name}={value} has no effect on architecture {self.architecture!r}, which has "
                    f"{', '.join(self.spec.options) or 'no options'}. Leave it out, or choose one of: "
                    f"{', '.join(owners) or '(none has it)'}."
                )
        for name in ("d_sae", "k", "tokens", "batch"):
            if not isinstance(getattr(self, name), int | None):
                raise InvalidInputError(f"{name}={getattr(self, name)!r}: give a whole number.")
        if self.d_sae < 1:
            raise InvalidInputError(f"d_sae={self.d_sae}: an SAE has at least one feature.")
        self.spec.check(self)

    def _check_training(self) -> None:
        if self.batch < 1 or self.tokens < self.batch:
            raise InvalidInputError(
                f"tokens={self.tokens}, batch={self.batch}: train on at least one batch of one token."
            )
        for name in ("warmup", "decay", "sparsity_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name}={getattr(self, name)} is a share of the steps: between 0 and 1.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InvalidInputError(f"betas={self.betas}: two numbers, at least 0 and less than 1.")
        if self.decoder_norm not in ("unit", "free"):
            raise InvalidInputError(f'decoder_norm={self.decoder_norm!r}: choose "unit" or "free".')
        for name in ("seed", "order_seed"):
            if not -(2**63) <= getattr(self, name) < 2**63:
                raise InvalidInputError(f"{name}={getattr(self, name)} has more than 64 bits. Give a smaller seed.")
        if not (self.clip > 0 and (self.lr is None or self.lr > 0)):
            raise InvalidInputError(f"clip={self.clip}, lr={self.lr}: both must be positive.")
        if not (self.aux_coefficient >= 0 and self.dead_after >= 1 and (self.aux_k is None or self.aux_k >= 1)):
            raise InvalidInputError(
                f"aux_coefficient={self.aux_coefficient} must not be negative; dead_after={self.dead_after} and "
                f"aux_k={self.aux_k} must be at least 1."
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
    def active(self) -> int:
        """Features that may be active on one token."""
        return DEFAULT_K if self.k is None else self.k

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Prefixes of a matryoshka SAE, the last of them all features; empty for other architectures.

        >>> SAEConfig(architecture="matryoshka", d_sae=64).prefixes
        (4, 8, 16, 32, 64)
        """
        if "widths" not in self.spec.options:
            return ()
        if self.widths is None:
            return tuple(dict.fromkeys(max(1, self.d_sae // part) for part in (16, 8, 4, 2, 1)))
        return tuple(self.widths) if self.widths and self.widths[-1] == self.d_sae else (*self.widths, self.d_sae)

    @property
    def order_seed(self) -> int:
        """Seed of the order of tokens that is used."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def peak_lr(self) -> float:
        """The learning rate that is used.

        >>> SAEConfig(d_sae=16384).peak_lr
        0.001
        """
        return self.lr if self.lr is not None else LR_AT_16K_FEATURES / math.sqrt(self.d_sae / 2**14)

    def sparsity(self, width: int) -> float:
        """Weight of the sparsity penalty after its warm-up; 0 for architectures without one.

        >>> SAEConfig(architecture="relu").sparsity(576)  # sqrt(576) / 12
        2.0
        """
        return self.spec.sparsity(self, width)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, constant, linear decay.

        >>> SAEConfig(tokens=100, batch=1, lr=1.0, warmup=0.1, decay=0.5).lr_at(0)  # 1 of 10 warm-up steps
        0.1
        """
        up = (step + 1) / max(1.0, self.warmup * self.steps)
        down = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.peak_lr * min(1.0, up, down)

    def sparsity_at(self, step: int, width: int) -> float:
        """Weight of the sparsity penalty at a step, counted from 0, where `width` dimensions are reconstructed.

        >>> config = SAEConfig(architecture="relu", l1_coefficient=4.0, tokens=100, batch=1, sparsity_warmup=0.2)
        >>> config.sparsity_at(4, 16), config.sparsity_at(50, 16)  # 5 of 20 warm-up steps
        (1.0, 4.0)
        """
        return self.sparsity(width) * min(1.0, (step + 1) / max(1.0, self.sparsity_warmup * self.steps))
