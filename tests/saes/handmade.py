"""SAEs made by hand, as stock sae_lens objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.models.model import Model
from workbench.saes.io import sae_lens_module


def relu_sae(model: Model, W: Tensor, b_enc: Tensor, site: str = "resid_post.1", tied: bool = True) -> Any:
    """ReLU features with decoder rows `W` and the transpose as encoder; `tied=False` leaves the encoder at zero."""
    lens = sae_lens_module()
    layer = int(site.rsplit(".", 1)[1])
    meta = lens.saes.sae.SAEMetadata(
        hook_name=f"blocks.{layer}.hook_resid_post", model_fingerprint=model.fingerprint, model_name=model.name
    )
    config = lens.StandardSAEConfig(d_in=W.shape[1], d_sae=len(W), apply_b_dec_to_input=False, metadata=meta)
    sae = lens.StandardSAE(config)
    with torch.no_grad():
        sae.W_dec.copy_(W)
        sae.W_enc.copy_(W.T if tied else torch.zeros_like(W.T))
        sae.b_enc.copy_(b_enc)
        sae.b_dec.zero_()
    return sae.eval().requires_grad_(False)
