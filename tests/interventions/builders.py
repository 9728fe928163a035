"""What the tests of this folder share: SAEs of every architecture, batches, and the edited stream."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.tiny import D_MODEL
from workbench.core.tokens import TokenBatch
from workbench.interventions.intervention import Intervention
from workbench.models.model import Model

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # sae_lens 6.54 imports transformer_lens.utils
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

D_SAE = 40
ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 6}),
    "topk_rescaled": (TopKSAE, TopKSAEConfig, {"k": 6, "rescale_acts_by_decoder_norm": True}),
}
NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")


def sae_lens_sae(
    architecture: str = "standard", normalisation: str = "none", *, b_dec_in: bool = True, d_in: int = D_MODEL
) -> Any:
    """An SAE of sae_lens with every parameter random."""
    kind, config, extra = ARCHITECTURES[architecture]
    with torch.device("cpu"):
        sae = kind(
            config(
                d_in=d_in, d_sae=D_SAE, dtype="float32", device="cpu", normalize_activations=normalisation,
                apply_b_dec_to_input=b_dec_in, **extra,
            )
        )  # fmt: skip
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            parameter.copy_(noise.abs() if name == "threshold" else 0.5 * noise)
    return sae.requires_grad_(False)


@dataclass(eq=False)
class ReluSAE:
    """The smallest SAE: `relu(x W_enc + b_enc)`; its decoder explains little of anything."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    cfg: Any = field(default=None)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_enc + self.b_enc)


def golden() -> ReluSAE:
    """d0=(1,0), d1=(.6,.8), W_enc = W_dec^T, bias -.5; at x=(2,1): acts (1.5, 1.5), rec (2.4, 1.2), error (-.4, -.2)."""
    w_dec = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    return ReluSAE(w_dec.T.clone(), torch.tensor([-0.5, -0.5]), w_dec, torch.zeros(2))


def bad_sae(d: int = D_MODEL, f: int = 9, seed: int = 0) -> ReluSAE:
    """Random: it reconstructs nothing."""
    g = torch.Generator().manual_seed(seed)
    return ReluSAE(*(torch.randn(*s, generator=g) for s in ((d, f), (f,), (f, d), (d,))))


def edited(model: Model, batch: Any, intervention: Intervention, site: str = "resid_pre.2") -> torch.Tensor:
    """An activation under an intervention; the default is what an edit of resid_post.1 hands to the next block."""
    with model.plan(intervention):
        return model.capture(batch, [site])[site]


def padded(rows: list[list[int]], side: str, pad: int = 1) -> TokenBatch:
    """Rows of any lengths, padded on a side; `pad` may be a token that also occurs inside the text."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), True
    return TokenBatch(ids, mask)
