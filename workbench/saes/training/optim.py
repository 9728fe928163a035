"""Fused Adam whose clipping costs no pass over the gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def adam_step(optimiser: torch.optim.Adam, lr: float, clip: float) -> Float[Tensor, ""]:
    """One step of fused Adam on clipped gradients; returns the norm before clipping.

    The clipping rides in the `grad_scale` of the fused kernel.
    """
    parameters = optimiser.param_groups[0]["params"]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    # Attributes that torch.amp.GradScaler sets too. A gradient that is not finite must reach the parameters, where the
    # trainer sees it, so nothing is skipped.
    vars(optimiser).update(grad_scale=(norm / clip).clamp_min(1.0), found_inf=torch.zeros((), device=norm.device))
    optimiser.param_groups[0]["lr"] = lr
    optimiser.step()
    return norm
