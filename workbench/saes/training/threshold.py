"""The threshold by which BatchTopK and Matryoshka SAEs are used after training, one token at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

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
