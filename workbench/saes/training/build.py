"""From a configuration to the parts that compute its steps: architecture, kernel, device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from workbench.core.errors import InvalidInputError, ResourceError
from workbench.saes.architectures import Architecture, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from workbench.saes.training.config import DEFAULT_BANDWIDTH, DEFAULT_TANH_SCALE, DEFAULT_THRESHOLD, SAEConfig
from workbench.saes.training.kernel_choice import (
    available_kernels,
    can_run,
    choose_kernel,
    measure_kernels,
    with_kernel,
)


def _topk(config: SAEConfig) -> Architecture:
    return TopK(config.active, by_decoder_norm=config.decoder_norm == "free")


def _batchtopk(config: SAEConfig) -> Architecture:
    return BatchTopK(float(config.active), by_decoder_norm=config.decoder_norm == "free")


def _matryoshka(config: SAEConfig) -> Architecture:
    return Matryoshka(float(config.active), by_decoder_norm=config.decoder_norm == "free", widths=config.prefixes)


def _relu(config: SAEConfig) -> Architecture:
    del config
    return ReLU()


def _jumprelu(config: SAEConfig) -> Architecture:
    return JumpReLU(
        DEFAULT_BANDWIDTH if config.bandwidth is None else config.bandwidth,
        DEFAULT_THRESHOLD if config.initial_threshold is None else config.initial_threshold,
        config.penalty or "step",
        DEFAULT_TANH_SCALE if config.tanh_scale is None else config.tanh_scale,
    )


def _gated(config: SAEConfig) -> Architecture:
    return Gated(frozen_decoder=bool(config.frozen_decoder))


_BUILDERS: dict[str, Callable[[SAEConfig], Architecture]] = {
    "topk": _topk,
    "batchtopk": _batchtopk,
    "matryoshka": _matryoshka,
    "relu": _relu,
    "jumprelu": _jumprelu,
    "gated": _gated,
}


def build(config: SAEConfig, kernel: str) -> Architecture:
    """What computes the steps of this configuration with a kernel of this name."""
    return with_kernel(_BUILDERS[config.architecture](config), kernel)


@dataclass(frozen=True)
class KernelChoice:
    """A kernel, and how it was chosen.

    Attributes:
        name: of the kernel.
        seconds: what a TopK step of 512 tokens took with each kernel that was measured; empty if none was.
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)


def kernel_for(config: SAEConfig, d_in: int, device: torch.device, known: str | None = None) -> KernelChoice:
    """The kernel that is used: the one that a run began with, the one asked for, or the fastest here.

    A new measurement could choose otherwise than the first, and a run that goes on would differ in the last bits. It is
    made nevertheless where a run goes on at a device that lacks its first kernel; there the bits differ anyway.

    Raises:
        ResourceError: if the kernel that is asked for can't run on the device.
    """
    wanted = known or config.kernel
    if wanted != "auto" and can_run(wanted, device):
        return KernelChoice(wanted)
    if config.kernel != "auto":
        raise ResourceError(
            f"kernel={config.kernel!r} can't run on device {str(device)!r}, where there are "
            f"{', '.join(available_kernels(device))}. Take one of these or 'auto', in a folder of its own if training "
            "began with this one."
        )
    name = choose_kernel(device, d_in, config.d_sae, config.active)
    return KernelChoice(name, measure_kernels(device, d_in, config.d_sae, config.active))


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

    Raises:
        InvalidInputError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).split("\n", 1)[0]
        raise InvalidInputError(f"device={name!r} can't be used ({first}). Give cpu, cuda or auto.") from None
    return device
