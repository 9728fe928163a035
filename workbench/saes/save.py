"""Writes SAEs as stock sae_lens folders: what is saved here loads there without this package."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from workbench.activations.keep import KeepRule
from workbench.hooks.sites import Site
from workbench.records import save_json, to_jsonable, write_atomic
from workbench.saes.io import CONFIG_FILE, WEIGHTS_FILE
from workbench.saes.weights import SAEWeights


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What an SAE was trained on; travels in the metadata of its `cfg.json`.

    Attributes:
        model_name: name of the model.
        model_fingerprint: fingerprint of the model.
        site: where it reads, such as `resid_post.15`.
        context: tokens per row in training.
        keep: which tokens it was trained on.
        training: configuration and final metrics, in JSON types.
    """

    model_name: str
    model_fingerprint: str
    site: str
    context: int
    keep: KeepRule
    training: dict[str, Any]


def save_topk(weights: SAEWeights, k: int, path: str | Path, origin: Provenance, scale: float = 1.0) -> Path:
    """Writes a TopK SAE as a stock sae_lens folder; atomic, `cfg.json` last.

    Args:
        weights: weights that read activations multiplied by `scale`.
        k: active features per token.
        path: the folder.
        origin: what it was trained on.
        scale: folded into the weights, so that the saved SAE reads raw activations.
    """
    folder = Path(path)
    tensors = {
        "W_enc": weights.W_enc.t(),
        "b_enc": weights.b_enc / scale,
        "W_dec": weights.W_dec,
        "b_dec": weights.b_dec / scale,
    }
    raw = safetensors.torch.save({name: t.detach().cpu().float().contiguous() for name, t in tensors.items()})
    write_atomic(folder / WEIGHTS_FILE, raw)
    d_sae, d_in = weights.W_dec.shape
    save_json(folder / CONFIG_FILE, _config(d_in, d_sae, k, origin))
    return folder


def _config(d_in: int, d_sae: int, k: int, origin: Provenance) -> dict[str, Any]:
    version = importlib.metadata.version("sae-lens")
    return {
        "architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": k, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            # Without sae_lens_version the loader takes the folder for one of before version 6 and converts it.
            "sae_lens_version": version, "sae_lens_training_version": version, "training_architecture": "topk",
            "model_name": origin.model_name, "model_fingerprint": origin.model_fingerprint,
            "hook_name": Site.parse(origin.site).tl_name, "context_size": origin.context, "prepend_bos": True,
            "workbench": to_jsonable(
                {"version": importlib.metadata.version("interp-workbench") if _installed() else "source",
                 "site": origin.site, "keep": origin.keep, **origin.training}
            ),
        },
    }  # fmt: skip


def _installed() -> bool:
    try:
        importlib.metadata.version("interp-workbench")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
