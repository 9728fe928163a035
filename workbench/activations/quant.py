"""Activations as int8: standardised per channel, then one scale per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int8
from torch import Tensor

from workbench.core.errors import DegenerateInputError

ROWS = 1024
"""Rows handled at once, so that the fp32 copy stays in the cache."""


@dataclass(frozen=True, eq=False)
class Int8Code:
    """Between activations and int8: `x = q * scale * std + mean`, with one `scale` per token.

    A few channels of a residual stream are many times wider than the rest, and one scale for all would leave the others
    a handful of levels. Standardising first gives every channel the same number.

    Attributes:
        std: of each channel; 1 where a channel is constant.
    """

    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]

    @classmethod
    def estimate(cls, x: Float[Tensor, "n d"]) -> Int8Code:
        """The code for activations like these.

        Raises:
            DegenerateInputError: with fewer than two rows.

        >>> code = Int8Code.estimate(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))
        >>> code.mean, code.std  # the second channel is constant
        (tensor([1., 5.]), tensor([1.4142, 1.0000]))
        """
        if len(x) < 2:
            raise DegenerateInputError(f"int8 needs at least 2 kept tokens to standardise channels, not {len(x)}.")
        std, mean = torch.std_mean(x.float(), dim=0)
        return cls(mean, torch.where(std > 0, std, 1.0))

    def encode(self, x: Float[Tensor, "n d"]) -> tuple[Int8[Tensor, "n d"], Float16[Tensor, " n"]]:
        """Levels from -127 to 127, and the scale of each row.

        >>> code = Int8Code(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]))
        >>> q, scale = code.encode(torch.tensor([[128.0, -127.0]]))  # standardised: 127 and -63.5
        >>> q, scale
        (tensor([[127, -64]], dtype=torch.int8), tensor([1.], dtype=torch.float16))
        """
        q = torch.empty(x.shape, dtype=torch.int8)
        scale = torch.empty(len(x), dtype=torch.float16)
        for start in range(0, len(x), ROWS):
            z = (x[start : start + ROWS].float() - self.mean) / self.std
            part = (z.abs().amax(dim=1) / 127).clamp(max=torch.finfo(torch.float16).max).half()
            scale[start : start + ROWS] = part
            # a scale that rounds to zero belongs to a row at the mean
            levels = z / part.float().where(part > 0, 1.0)[:, None]
            q[start : start + ROWS] = levels.round_().clamp_(-127, 127)
        return q, scale

    def decode(self, q: Int8[Tensor, "n d"], scale: Float16[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """The activations, in bfloat16 as an unquantised store gives them."""
        x = torch.empty(q.shape, dtype=torch.bfloat16)
        for start in range(0, len(q), ROWS):
            levels = q[start : start + ROWS].float() * scale[start : start + ROWS, None].float()
            x[start : start + ROWS] = torch.addcmul(self.mean, levels, self.std, out=levels)
        return x

    def fvu(self, x: Float[Tensor, "n d"]) -> float:
        """Variance of `x` that is lost, as a share: error / variance over all rows, or 0 if nothing varies."""
        mean, error, variance = x.mean(dim=0, dtype=torch.float32), 0.0, 0.0
        for part in x.split(ROWS):
            error += float((self.decode(*self.encode(part)).float() - part.float()).square().sum())
            variance += float((part.float() - mean).square().sum())
        return error / variance if variance else 0.0
