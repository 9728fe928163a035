"""From a configuration to the parts that compute its steps: architecture, kernel, device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workbench.core.errors import InvalidInputError, ResourceError
from workbench.saes.architectures.base import Architecture
from workbench.saes.config import SAEConfig
from workbench.saes.training.kernel_choice import (
    available_kernels,
    can_run,
    choose_kernel,
    measure_kernels,
    with_kernel,
)


def build(config: SAEConfig, kernel: str) -> Architecture:
    """What computes the steps of this configuration with a kernel of this name."""
    return with_kernel(config.spec.build(config), kernel)


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
