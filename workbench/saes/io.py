"""SAE folders in the format of sae_lens: what is saved here loads there without this package, and the reverse."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors

from workbench.activations.keep import KeepRule
from workbench.errors import CorruptFileError, MismatchError, MissingFileError
from workbench.hooks.sites import Site
from workbench.records import from_jsonable, load_json

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"


def sae_lens_module() -> ModuleType:
    """sae_lens, imported here because it takes seconds; its own use of a deprecated module is kept quiet."""
    with warnings.catch_warnings():
        # sae_lens 6.54 imports transformer_lens.utils, which 3.9 deprecates.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        import sae_lens
    return sae_lens


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
