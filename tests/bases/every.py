"""An SAE of every architecture that sae_lens has, and of this package's own, with every parameter random."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from tests.tiny import D_MODEL
from workbench.saes.formats.build import register_own_classes
from workbench.saes.formats.lensmodule import sae_lens_module

D_SAE, D_OUT = 40, 20
SAES: dict[str, dict[str, Any]] = {
    "standard": {}, "jumprelu": {}, "gated": {}, "topk": {"k": 6}, "abstopk": {"k": 6},
    "topk rescaled": {"k": 6, "rescale_acts_by_decoder_norm": True}, "matching_pursuit": {"max_iterations": 4},
    "workbench_groupmax": {"k": 8}, "topk in training": {"k": 6, "rescale_acts_by_decoder_norm": True},
    "batchtopk in training": {"k": 6.0}, "matryoshka_batchtopk in training": {"k": 6.0, "matryoshka_widths": [20]},
}  # fmt: skip
TRANSCODERS: dict[str, dict[str, Any]] = {
    "transcoder": {}, "skip_transcoder": {}, "jumprelu_transcoder": {}, "jumprelu_skip_transcoder": {},
    "workbench_topk_transcoder": {"k": 6},
}  # fmt: skip
NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")


def made(kind: str, normalisation: str = "none", *, d_in: int = D_MODEL, d_out: int = D_OUT, **more: Any) -> Any:
    """An SAE of a kind; `more` goes to its config."""
    sae_lens_module()
    from sae_lens.registry import get_sae_class, get_sae_training_class

    register_own_classes()
    architecture = kind.partition(" ")[0]
    classes = (get_sae_training_class if "training" in kind else get_sae_class)(architecture)
    options = {**(SAES | TRANSCODERS)[kind], "d_in": d_in, "d_sae": D_SAE, **more}
    if kind in TRANSCODERS:
        options |= {"d_out": d_out, "apply_b_dec_to_input": False}
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matryoshka warns that it appends d_sae to its widths
        sae = classes[0](classes[1](normalize_activations=normalisation, **options))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            parameter.copy_(noise.abs() if name == "threshold" else 0.5 * noise)
    return sae.requires_grad_(False)


@functools.cache
def hidden(n: int = 6, seed: int = 0, width: int = D_MODEL) -> torch.Tensor:
    """Activations with a mean and sizes of their own, so that every normalisation matters; not to be changed."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, width, generator=g) + 0.7) * torch.linspace(0.5, 4, n)[:, None]
