"""JumpReLU SAEs and transcoders of Gemma Scope: `params.npz`, and `params.safetensors` in its second release."""

from __future__ import annotations

from pathlib import Path

from workbench.bases.sitenames import site_metadata
from workbench.saes.formats.files import read_config, read_tensors
from workbench.saes.formats.names import GemmaScopeName
from workbench.saes.formats.overrides import Overrides
from workbench.saes.formats.raw import RawSAE
from workbench.saes.formats.tensors import need

NEEDS = ("params.npz", "params.safetensors")


def recognise(folder: Path) -> bool:
    """Whether a folder is of this format."""
    return any((folder / name).is_file() for name in NEEDS)


def read(folder: Path, overrides: Overrides) -> RawSAE:
    """The SAE in a folder; `b_dec` is not subtracted from the input.

    Raises:
        CorruptFileError: if a tensor is missing.
    """
    path = next(folder / name for name in NEEDS if (folder / name).is_file())
    tensors = read_tensors(path)
    W_enc, b_enc, W_dec, b_dec, threshold = need(tensors, path, "W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    skip = tensors.get("affine_skip_connection")
    about = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = GemmaScopeName.of(folder.absolute())
    transcodes = named.kind == "transcoder" or "hf_hook_point_out" in about or skip is not None
    return RawSAE(
        activation="jumprelu", W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=threshold,
        W_skip=None if skip is None else skip.float().T.contiguous(), transcodes=transcodes,
        subtracts_b_dec=False, scale=overrides.scale or 1.0, metadata=_metadata(named, about, overrides),
    )  # fmt: skip


def _metadata(named: GemmaScopeName, about: dict[str, object], overrides: Overrides) -> dict[str, object]:
    found = site_metadata(named.site)
    if named.hooks is not None:
        found |= dict(zip(("hook_name", "hook_name_out"), named.hooks, strict=True))
    for ours, theirs in (("hook_name", "hf_hook_point_in"), ("hook_name_out", "hf_hook_point_out")):
        if isinstance(about.get(theirs), str):
            found[ours] = about[theirs]
    if isinstance(about.get("model_name"), str):
        found["model_name"] = about["model_name"]
    return found | site_metadata(overrides.site, overrides.site_out)
