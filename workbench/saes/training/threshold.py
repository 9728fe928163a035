"""The threshold by which BatchTopK and Matryoshka SAEs are used after training, one token at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.saes.architectures.base import Architecture
from workbench.saes.kernels.weights import SAEWeights

RATE = 0.01


class RunningThreshold:
    """Exponential average of the smallest activation that each batch kept, corrected for its start at zero.

    Without the correction the average after n steps is (1 - 0.99^n) of the truth: 8 % after 8 steps, and an SAE saved
    with it would keep far too many features.

    >>> running = RunningThreshold(torch.device("cpu"))
    >>> running.add(torch.tensor(2.0)); running.add(torch.tensor(2.0))
    >>> running.value()  # 0.0398 / 0.0199
    2.0
    """

    def __init__(self, device: torch.device) -> None:
        self.state = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, smallest: Float[Tensor, ""]) -> None:
        """Takes the smallest activation of one batch; NaN, for a batch that kept none, is passed over."""
        step = torch.stack([smallest.double(), torch.ones_like(smallest, dtype=torch.float64)])
        self.state.copy_(torch.where(smallest.isnan(), self.state, torch.lerp(self.state, step, RATE)))

    def value(self) -> float | None:
        """The average so far; None before the first batch that kept anything."""
        total, weight = self.state.tolist()
        return total / weight if weight else None


def calibrate_threshold(
    architecture: Architecture,
    weights: SAEWeights,
    x: Float[Tensor, "rows d_in"],
    k: int,
    *,
    start: float,
    centred: bool = True,
) -> float:
    """The threshold at which `k` features per token of `x` are active on average, 0 if fewer are ever positive.

    Args:
        architecture: a BatchTopK or Matryoshka SAE.
        weights: its weights.
        x: activations, in the scale of training.
        k: active features per token that are wanted.
        start: a guess, such as the running threshold.
        centred: see `Architecture.encode`.
    """
    wanted, low = k * len(x), start / 2
    while True:
        values = architecture.encode(weights, x, centred=centred, threshold=low).values
        if int((values > 0).sum()) > wanted:
            largest = values.topk(wanted + 1).values
            # In the middle between two neighbours neither depends on how the last bit was rounded.
            return float(largest[-2] + largest[-1]) / 2
        if low == 0.0:
            return 0.0
        low = low / 2 if low > 1e-3 * start else 0.0
