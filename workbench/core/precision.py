"""In which precision results are computed."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, float64


def precise(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """In fp32, or in fp64 where it is that already: what low precision gives is added up in fp32."""
    return x if x.dtype == float64 else x.float()
