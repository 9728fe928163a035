"""Which kernel computes the steps of an SAE, chosen by measurement on this machine."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from workbench.core.errors import UnknownNameError, did_you_mean
from workbench.saes.architectures import Architecture, StepOptions, StepResult, TopK
from workbench.saes.architectures.dense_reference import reference_step
from workbench.saes.kernels.sparse import DenseProducts, Products, SparseProducts
from workbench.saes.kernels.triton_kernels import TritonProducts, has_triton
from workbench.saes.kernels.weights import SAEWeights

KERNELS = ("csr", "csr_bf16", "dense", "triton", "reference")
PROBE_ROWS = 512
PROBE_FEATURES = 2**14
MIN_SPEEDUP = 1.1
"""Times as fast as csr that a kernel of lower precision must be to be preferred."""


def choose_kernel(device: torch.device | str, d_in: int, d_sae: int, k: int) -> str:
    """The kernel that is fastest here, by `measure_kernels`; bf16 only if it is clearly faster."""
    seconds = measure_kernels(device, d_in, d_sae, k)
    penalised = {name: s if name == "csr" else s * MIN_SPEEDUP for name, s in seconds.items()}
    return min(penalised, key=lambda name: penalised[name])


def measure_kernels(device: torch.device | str, d_in: int, d_sae: int, k: int) -> dict[str, float]:
    """Seconds per TopK step of 512 tokens with each kernel that this device has; measured once per process.

    Takes about half a second. More than 16384 features are measured as 16384.
    """
    return dict(_measured(str(torch.device(device)), d_in, min(d_sae, PROBE_FEATURES), k))


def available_kernels(device: torch.device | str) -> tuple[str, ...]:
    """Kernels that are worth measuring on a device; the reference never is."""
    if torch.device(device).type != "cuda":
        return ("csr", "csr_bf16")
    return ("csr", "csr_bf16", "dense", "triton") if has_triton() else ("csr", "csr_bf16", "dense")


def can_run(kernel: str, device: torch.device | str) -> bool:
    """Whether a device has what a kernel needs, which need not be worth measuring there."""
    return kernel != "triton" or (torch.device(device).type == "cuda" and has_triton())


def with_kernel(architecture: Architecture, kernel: str) -> Architecture:
    """The same architecture, its steps computed by a kernel of this name.

    Args:
        architecture: what is trained.
        kernel: "csr" (sparse, features ranked in fp32), "csr_bf16" (ranked in bf16), "dense" (bf16 products; for a
            GPU and few features), "triton" (sparse, on a GPU) or "reference" (dense autograd, slow).

    Raises:
        UnknownNameError: for another name.
    """
    if kernel not in KERNELS:
        raise UnknownNameError(f"There is no kernel {kernel!r}. {did_you_mean(kernel, KERNELS)}")
    if kernel == "csr":
        return architecture
    step = reference_step if kernel == "reference" else functools.partial(_ranked_step, kernel)
    other = copy.copy(architecture)
    vars(other)["step"] = functools.partial(step, architecture)
    return other


def _ranked_step(
    kernel: str,
    architecture: Architecture,
    weights: SAEWeights,
    x: Tensor,
    target: Tensor | None = None,
    options: StepOptions = StepOptions(),  # noqa: B008 - frozen
) -> StepResult:
    ranked = replace(options, dtype=torch.bfloat16, products=_products(kernel))
    return architecture.step(weights, x, target, ranked)


def _products(kernel: str) -> Products:
    if kernel == "dense":
        return DenseProducts()
    return TritonProducts() if kernel == "triton" else SparseProducts()


@cache
def _measured(device: str, d_in: int, d_sae: int, k: int) -> dict[str, float]:
    random = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, d_in, generator=random).to(device) for n in (PROBE_ROWS, d_sae))
    W /= W.norm(dim=1, keepdim=True)
    weights = SAEWeights(W, W.new_zeros(d_sae), W, W.new_zeros(d_in))
    steps: dict[str, Callable[[], object]] = {}
    for name in available_kernels(device):
        kind = with_kernel(TopK(min(k, d_sae)), name)
        steps[name] = lambda kind=kind: kind.step(weights, x)
    return _best_seconds(steps, torch.device(device))


def _best_seconds(steps: dict[str, Callable[[], object]], device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Fastest of the repeats, taken in turns so that a busy moment does not decide."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best
