"""Writes SAEs and transcoders as stock sae_lens folders: what is saved here loads there without this package."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import InvalidInputError
from workbench.core.jsontext import Record
from workbench.core.records import save_json, to_jsonable, write_atomic
from workbench.hooks.sites import Site
from workbench.saes.config import ARCHITECTURES
from workbench.saes.formats.load import CONFIG_FILE, WEIGHTS_FILE
from workbench.saes.formats.normalise import Normaliser, SiteScale
from workbench.saes.kernels.weights import SAEWeights


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
        target_site: where a transcoder writes; None for an SAE.
        starts_with_bos: whether the rows that it was trained on opened with BOS.
    """

    model_name: str
    model_fingerprint: str
    site: str
    context: int
    keep: TokenPolicy
    training: Record
    target_site: str | None = None
    starts_with_bos: bool = True


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Which features are active, beyond what the weights say.

    Attributes:
        architecture: kind of SAE, by its name here.
        k: active features per token, of kinds that are saved with it.
        threshold: of kinds that keep what is larger; in the units of the saved activations.
    """

    architecture: str
    k: int | None = None
    threshold: float | None = None


def save_sae(weights: SAEWeights, encoder: Encoder, path: str | Path, origin: Provenance) -> Path:
    """Writes a stock sae_lens inference folder; atomic, `cfg.json` last.

    Args:
        weights: weights that read raw activations; see `Normaliser.fold` and `fold_decoder_norm`.
        encoder: the kind of SAE and what belongs to it.
        path: the folder.
        origin: what it was trained on.

    Raises:
        InvalidInputError: if sae_lens has no architecture that computes the same, or k or a threshold is missing.
    """
    folder = Path(path)
    stock, lens = _stock(encoder, origin), ARCHITECTURES[encoder.architecture].lens
    entries, tensors = lens.entries(encoder.k), lens.tensors(weights, encoder.threshold)
    raw = safetensors.torch.save({name: t.detach().cpu().float().contiguous() for name, t in tensors.items()})
    write_atomic(folder / WEIGHTS_FILE, raw)
    save_json(folder / CONFIG_FILE, _config(stock, weights, encoder, origin) | entries)
    return folder


def save_topk(weights: SAEWeights, k: int, path: str | Path, origin: Provenance, scale: float = 1.0) -> Path:
    """Writes a TopK SAE whose weights read activations multiplied by `scale`; the saved one reads raw activations."""
    raw = Normaliser(SiteScale(torch.zeros_like(weights.b_dec), scale)).fold(weights)
    return save_sae(raw, Encoder(architecture="topk", k=k), path, origin)


def _stock(encoder: Encoder, origin: Provenance) -> str:
    """The inference architecture of sae_lens that computes the same."""
    is_sae = origin.target_site is None
    known = {name: spec.lens.saved_as if is_sae else spec.lens.transcoder for name, spec in ARCHITECTURES.items()}
    stock = known.get(encoder.architecture)
    if stock is None:
        names = ", ".join(name for name, saved in known.items() if saved is not None)
        raise InvalidInputError(
            f"sae_lens has no {'SAE' if is_sae else 'transcoder'} that computes what {encoder.architecture!r} does. "
            f"Known: {names}."
        )
    return stock


def _config(stock: str, weights: SAEWeights, encoder: Encoder, origin: Provenance) -> Record:
    is_transcoder = origin.target_site is not None
    config: Record = {
        "architecture": stock, "d_in": weights.W_enc.shape[1], "d_sae": weights.W_enc.shape[0], "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": not is_transcoder, "normalize_activations": "none",
        "reshape_activations": "none",
    }  # fmt: skip
    if is_transcoder:
        config["d_out"] = weights.W_dec.shape[1]
    return config | {"metadata": _metadata(encoder, origin)}


def _metadata(encoder: Encoder, origin: Provenance) -> Record:
    version = importlib.metadata.version("sae-lens")
    site = Site.parse(origin.site)
    places: Record = {} if site.head is None else {"hook_head_index": site.head}
    if origin.target_site is not None:
        target = Site.parse(origin.target_site)
        places |= {"hook_name_out": target.tl_name}
        places |= {} if target.head is None else {"hook_head_index_out": target.head}
    ours = {
        "version": importlib.metadata.version("interp-workbench") if _installed() else "source",
        "site": origin.site, "target_site": origin.target_site, "keep": origin.keep,
        "architecture": encoder.architecture, "threshold": encoder.threshold, **origin.training,
    }  # fmt: skip
    return {
        # Without sae_lens_version the loader takes the folder for one of before version 6 and converts it.
        "sae_lens_version": version, "sae_lens_training_version": version,
        "training_architecture": encoder.architecture, "model_name": origin.model_name,
        "model_fingerprint": origin.model_fingerprint, "hook_name": site.tl_name, **places,
        "context_size": origin.context, "prepend_bos": origin.starts_with_bos, "workbench": to_jsonable(ours),
    }  # fmt: skip


def _installed() -> bool:
    try:
        importlib.metadata.version("interp-workbench")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
