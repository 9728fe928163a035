"""SAE folders in the format of sae_lens: what is saved here loads there without this package, and the reverse."""

from __future__ import annotations

import importlib.metadata
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch

from workbench.activations.keep import KeepRule
from workbench.errors import CorruptFileError, MismatchError, MissingFileError
from workbench.hooks.sites import Site
from workbench.records import from_jsonable, load_json, save_json, to_jsonable, write_atomic
from workbench.saes.kernels import TopKWeights

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"


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


def sae_lens_module() -> ModuleType:
    """sae_lens, imported here because it takes seconds; its own use of a deprecated module is kept quiet."""
    with warnings.catch_warnings():
        # sae_lens 6.54 imports transformer_lens.utils, which 3.9 deprecates.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import sae_lens
    return sae_lens


def save_topk(weights: TopKWeights, k: int, path: str | Path, origin: Provenance, scale: float = 1.0) -> Path:
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


def load_sae(path: str | Path, device: str = "cpu") -> Any:
    """The SAE in a folder, as a sae_lens `SAE`; folders that sae_lens wrote load as well.

    Raises:
        MissingFileError: if the folder holds no SAE.
        CorruptFileError: if its files can't be used.
    """
    folder = Path(path)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        what = "an unfinished training run" if (folder / "checkpoint.safetensors").is_file() else "no SAE"
        raise MissingFileError(
            f"{folder} holds {what}: {', '.join(missing)} not found. Train one with `workbench sae train`."
        )
    config = load_json(folder / CONFIG_FILE)
    if not isinstance(config, dict) or not {"d_in", "d_sae", "architecture"} <= set(config):
        raise CorruptFileError(
            f"{folder / CONFIG_FILE} does not describe an SAE: it needs d_in, d_sae and architecture."
        )
    try:
        with warnings.catch_warnings():
            # sae_lens warns about SAEs that have no model name; here the metadata decides.
            warnings.simplefilter("ignore")
            sae = sae_lens_module().SAE.load_from_disk(folder, device=device)
    except (RuntimeError, KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise CorruptFileError(f"sae_lens can't load {folder}: {type(error).__name__}: {error}.") from error
    return sae.eval().requires_grad_(False)


def sae_site(sae: Any) -> str:
    """The site that an SAE reads, from its metadata.

    Raises:
        MismatchError: if the metadata names none.
    """
    name = sae.cfg.metadata.get("hook_name")
    if not name:
        raise MismatchError("This SAE does not say which site it reads (metadata.hook_name). Name the site yourself.")
    return str(Site.parse(name))


def sae_keep_rule(sae: Any) -> KeepRule | None:
    """The rule by which its training tokens were kept; None for SAEs from elsewhere."""
    ours = sae.cfg.metadata.get("workbench")
    return from_jsonable(KeepRule, ours["keep"]) if ours else None


def check_sae_fits(model: Any, sae: Any) -> str:
    """The site of the SAE, if the SAE belongs to this model.

    An SAE without fingerprint (from elsewhere) is judged by its width alone.

    Raises:
        MismatchError: if it was trained on another model, or its width is not that of its site.
        UnknownSiteError: if the model does not have its site.
    """
    site = str(model.resolve(sae_site(sae)))
    meta = sae.cfg.metadata
    fingerprint = meta.get("model_fingerprint")
    if fingerprint and fingerprint != model.fingerprint:
        raise MismatchError(
            f"This SAE was trained on {meta.get('model_name')} ({fingerprint}); the model is {model.name} "
            f"({model.fingerprint}). Load that model, or train an SAE on this one."
        )
    if int(sae.cfg.d_in) != model.width(site):
        raise MismatchError(
            f"This SAE reads d_in={sae.cfg.d_in}; {site} of {model.name} has width {model.width(site)}."
        )
    return site


def topk_weights(sae: Any) -> TopKWeights:
    """The weights of a TopK SAE in the feature-major layout of the kernels; shares memory where it can."""
    with torch.no_grad():
        return TopKWeights(sae.W_enc.t().contiguous(), sae.b_enc, sae.W_dec, sae.b_dec)
