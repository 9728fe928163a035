"""Loads SAEs of this package and of others, each as a sae_lens SAE whose conventions are folded into its weights."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, TypedDict, Unpack

import safetensors
import torch

from workbench.bases.fits import placed_at
from workbench.bases.sae import AnySAE, as_basis
from workbench.bases.sitenames import named_site, site_metadata
from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    WorkbenchError,
    did_you_mean,
)
from workbench.core.jsontext import Record
from workbench.core.records import from_jsonable
from workbench.models.model import Model
from workbench.models.weights import is_float, stored_dtypes
from workbench.saes.formats import releases
from workbench.saes.formats.build import build, placed, register_own_classes, unbuilt
from workbench.saes.formats.files import read_config, read_tensors
from workbench.saes.formats.gains import take_up_gain
from workbench.saes.formats.known import READERS, SAE_LENS, SAE_LENS_FILES, located, recognise, require_format
from workbench.saes.formats.lensmodule import LensSAE, sae_lens_module
from workbench.saes.formats.overrides import Overrides
from workbench.saes.formats.placement import check_sae
from workbench.saes.formats.raw import RawSAE
from workbench.saes.formats.tensors import bare

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "load_sae", "sae_keep_rule", "sae_lens_module"]

CONFIG_FILE, WEIGHTS_FILE = SAE_LENS_FILES
_SCALER_FILE = "activation_scaler.json"


class Reading(TypedDict, total=False):
    """What the caller knows about an SAE that its files do not say: where to find it, and the fields of `Overrides`."""

    format: str | None
    release: str | None
    site: str | None
    site_out: str | None
    k: int | None
    threshold: float | None
    scale: float | None
    activation: str | None
    subtracts_b_dec: bool | None


@checked
def load_sae(
    where: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    model: Model | None = None,
    check: bool = True,
    **reading: Unpack[Reading],
) -> LensSAE:
    """An SAE as a sae_lens `SAE` that reads raw activations: scales, means and decoder norms are in its weights.

    Args:
        where: a folder of sae_lens (also of this package), sparsify, dictionary_learning or Gemma Scope; a file of
            tensors; or `release/sae_id` of sae_lens.
        device: where to put it.
        dtype: of its weights; None takes that of the file for sae_lens, fp32 for others. Thresholds stay in fp32.
        model: a `Model`; the SAE is then run on real activations, and refused if it does not belong where it says.
        check: False loads it even if it does not fit `model`.
        **reading: `format` instead of guessing it; `release` if `where` is the id alone; `site` and `site_out` for an
            SAE that names none, or the wrong one; `k`, `threshold`, `scale`, `activation`, `subtracts_b_dec` for what
            its files do not say.

    Raises:
        MissingFileError: if there is no SAE of a known format.
        CorruptFileError: if its files can't be used.
        MismatchError: if it is not an SAE of `model`, or its files leave something open.
        ModelUnavailableError: if a release can't be fetched.
    """
    if unknown := sorted(set(reading) - set(Reading.__annotations__)):
        raise InvalidInputError(f"load_sae({unknown[0]}=...): {did_you_mean(unknown[0], Reading.__annotations__)}")
    name, release = reading.get("format"), reading.get("release")
    known: Record = {key: value for key, value in reading.items() if key not in ("format", "release")}
    overrides = Overrides(**known)
    place, kind = str(device), _dtype(dtype)
    path = located(Path(where)) if name is None else Path(where)
    if release is None and (path.exists() or name is not None):
        sae = _load_path(path, require_format(name) if name else recognise(path), overrides, place, kind)
    else:
        sae = _load_release(str(where), release, overrides, place, kind)
    sae.cfg.metadata.__dict__.update(site_metadata(overrides.site, overrides.site_out))
    _translate_names(sae)
    if model is not None:
        take_up_gain(model, sae)
    if model is not None and check:
        placed_at(sae, model)
        check_sae(model, sae).require()
    return sae


def sae_keep_rule(sae: AnySAE) -> TokenPolicy | None:
    """The rule by which its training tokens were kept; None for SAEs from elsewhere.

    Raises:
        CorruptFileError: if this package saved it and the rule is gone.
    """
    ours = as_basis(sae).metadata.get("workbench")
    if not ours:
        return None
    if not isinstance(ours, dict) or "keep" not in ours:
        raise CorruptFileError(
            "This SAE's metadata.workbench names no keep rule (keep), so nobody knows which tokens it was trained on. "
            "Delete the entry to have the rule estimated, or train the SAE again."
        )
    return from_jsonable(TokenPolicy, ours["keep"])


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InvalidInputError(f"dtype={dtype!r}: {did_you_mean(dtype, ('float32', 'bfloat16', 'float16'))}")
    return found


def _load_path(path: Path, name: str, overrides: Overrides, device: str, dtype: torch.dtype | None) -> LensSAE:
    if name != SAE_LENS:
        return build(READERS[name](path, overrides), device, dtype)
    missing = [part for part in SAE_LENS_FILES if not (path / part).is_file()]
    if missing:
        raise MissingFileError(f"{path} is no folder of sae_lens: {', '.join(missing)} not found. Check format=.")
    config = read_config(path / CONFIG_FILE)
    if not {"d_in", "d_sae"} <= set(config):
        raise CorruptFileError(f"{path / CONFIG_FILE} does not describe an SAE: it needs d_in, d_sae and architecture.")
    _require_metadata(path, config.get("metadata", {}))
    if config.get("architecture") in ("batchtopk", "matryoshka_batchtopk"):
        return build(_checkpoint(path, config, overrides), device, dtype)
    register_own_classes()
    try:
        for tensor, stored in stored_dtypes(path).items():
            if tensor.startswith(("W_", "b_")) and not is_float(stored):
                raise CorruptFileError(f"{path}: {tensor} is stored as {stored}; an SAE has floating-point weights.")
        with warnings.catch_warnings():
            # sae_lens warns about SAEs that have no model name; here the metadata decides.
            warnings.simplefilter("ignore")
            sae = sae_lens_module().SAE.load_from_disk(path, device="cpu")
    except (RuntimeError, KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        if isinstance(error, WorkbenchError):
            raise
        said = " ".join(str(error).split())[:300]
        raise CorruptFileError(f"sae_lens can't load {path}: {type(error).__name__}: {said}.") from error
    return _folded(sae, overrides, _scale_beside(path, overrides), device, dtype)


def _load_release(
    where: str, release: str | None, overrides: Overrides, device: str, dtype: torch.dtype | None
) -> LensSAE:
    found = (release, where) if release is not None else releases.split(where)
    if found is None:
        raise MissingFileError(
            f"There is no folder or file {where!r}, and it is no release/sae_id of sae_lens. {releases.matching(where)}"
        )
    return _folded(releases.fetch(*found), overrides, overrides.scale, device, dtype)


def _folded(sae: LensSAE, overrides: Overrides, scale: float | None, device: str, dtype: torch.dtype | None) -> LensSAE:
    """An SAE that sae_lens loaded, its own conventions folded; as it is where nothing is left to fold."""
    if overrides.k is not None or overrides.threshold is not None:
        raise InvalidInputError(
            f"k={overrides.k}, threshold={overrides.threshold}: an SAE in the format of sae_lens has its own "
            f"({sae.cfg.architecture()}). Leave them out."
        )
    _require_values(sae)
    raw = unbuilt(sae, scale)
    return placed(sae, device, dtype) if raw is None else build(raw, device, dtype)


def _require_metadata(path: Path, metadata: Any) -> None:
    wrong = {"metadata": metadata} if not isinstance(metadata, dict) else {
        name: metadata[name] for name in ("hook_name", "hook_name_out")
        if not isinstance(metadata.get(name), str | None)
    }  # fmt: skip
    for name, value in wrong.items():
        raise CorruptFileError(
            f"{path / CONFIG_FILE}: {name}={value!r:.100} can't be used ({type(value).__name__}). Mend it."
        )


def _require_values(sae: LensSAE) -> None:
    """What sae_lens does not look at: NaN stays unseen until everything is NaN, and a k until the first token."""
    for name, tensor in sae.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise CorruptFileError(f"{name} holds NaN or infinite values. Fetch the file again.")
    k, d_sae = getattr(sae.cfg, "k", None), int(sae.cfg.d_sae)
    if k is not None and not (type(k) is int and 1 <= k <= d_sae):
        raise CorruptFileError(f"k={k!r} of an SAE with {d_sae} features: its config should say 1 <= k <= {d_sae}.")


def _scale_beside(path: Path, overrides: Overrides) -> float | None:
    """The factor that a checkpoint of sae_lens keeps beside weights that still need it."""
    file = path / _SCALER_FILE
    if overrides.scale is not None or not file.is_file():
        return overrides.scale
    factor = read_config(file).get("scaling_factor")
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise CorruptFileError(f"{file}: scaling_factor={factor!r} is no positive number. Pass scale= instead.")
    return float(factor)


def _checkpoint(path: Path, config: Record, overrides: Overrides) -> RawSAE:
    """A training checkpoint of BatchTopK, whose running threshold is not yet what inference needs."""
    if overrides.threshold is None and overrides.k is None:
        raise MismatchError(
            f"{path} is a training checkpoint ({config['architecture']}): its running threshold starts at zero and is "
            "too low after a short run. Load what save_inference_model wrote, or pass threshold= or k=."
        )
    tensors = read_tensors(path / WEIGHTS_FILE)
    raw = bare(tensors, path / WEIGHTS_FILE, overrides)
    extra = {
        "rescales": bool(config.get("rescale_acts_by_decoder_norm", True)),
        "scale": _scale_beside(path, overrides) or 1.0,
    }
    if raw.threshold is not None:
        # the threshold is one of activations, in units of the decoder norm
        norms = raw.W_dec.norm(dim=1).clamp_min(1e-30) if extra["rescales"] else torch.ones(raw.W_dec.shape[0])
        extra["threshold"] = raw.threshold / norms
    metadata = {**config.get("metadata", {}), **raw.metadata}
    parts = {name: value for name, value in vars(raw).items() if name not in (*extra, "metadata")}
    return RawSAE(**parts, **extra, metadata=metadata)


def _translate_names(sae: LensSAE) -> None:
    """Names of other libraries become those of TransformerLens, which every user of sae_lens understands.

    A name of no known site is kept: whoever asks for the site is told what is wrong with it.
    """
    metadata = sae.cfg.metadata
    for end in ("", "_out"):
        if metadata.get(f"hook_name{end}") and (site := named_site(vars(metadata), end)) is not None:
            metadata[f"hook_name{end}"] = site.tl_name
