"""SAEs and transcoders of EleutherAI's sparsify: `cfg.json` and `sae.safetensors`."""

from __future__ import annotations

from pathlib import Path

from workbench.bases.sitenames import site_metadata, site_of
from workbench.core.errors import CorruptFileError
from workbench.core.jsontext import Record
from workbench.saes.formats.files import read_config, read_tensors
from workbench.saes.formats.overrides import Overrides
from workbench.saes.formats.raw import RawSAE
from workbench.saes.formats.tensors import find, need

NEEDS = ("cfg.json", "sae.safetensors")


def recognise(folder: Path) -> bool:
    """Whether a folder is of this format."""
    return all((folder / name).is_file() for name in NEEDS)


def read(folder: Path, overrides: Overrides) -> RawSAE:
    """The SAE in a folder whose name is the module it reads, such as `layers.15`.

    Both matrices are stored `(d_sae, d_in)`. An SAE subtracts `b_dec` from its input, a transcoder does not; the
    activation takes the k largest after a ReLU, or the largest of each of k groups.

    Raises:
        CorruptFileError: if config and tensors disagree.
    """
    config = read_config(folder / NEEDS[0])
    path = folder / NEEDS[1]
    tensors = read_tensors(path)
    encoder, b_enc, W_dec, b_dec = need(tensors, path, "W_enc", "b_enc", "W_dec", "b_dec")
    _check(folder, config, tuple(encoder.shape))
    transcodes = bool(config.get("transcode", False))
    skip = find(tensors, "W_skip")
    if bool(config.get("skip_connection", False)) != (skip is not None):
        raise CorruptFileError(f"{folder}: skip_connection in cfg.json and W_skip in {path.name} disagree.")
    return RawSAE(
        activation="groupmax" if config.get("activation", "topk") == "groupmax" else "topk",
        W_enc=encoder.T.contiguous(), b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, W_skip=skip,
        k=overrides.k if overrides.k is not None else int(config["k"]), transcodes=transcodes,
        subtracts_b_dec=not transcodes, scale=overrides.scale or 1.0,
        metadata=_metadata(folder, overrides, transcodes),
    )  # fmt: skip


def _check(folder: Path, config: Record, shape: tuple[int, ...]) -> None:
    d_in, activation = config.get("d_in"), config.get("activation", "topk")
    d_sae = config.get("num_latents") or (d_in or 0) * (config.get("expansion_factor") or 0)
    if type(config.get("k")) is not int or activation not in ("topk", "groupmax"):
        raise CorruptFileError(f"{folder}/cfg.json: k={config.get('k')!r}, activation={activation!r} can't be used.")
    if shape != (d_sae, d_in):
        raise CorruptFileError(f"{folder}: cfg.json says {d_sae} features of width {d_in}; encoder.weight is {shape}.")


def _metadata(folder: Path, overrides: Overrides, transcodes: bool) -> Record:
    run = folder.parent / "config.json"
    about = read_config(run) if run.is_file() else {}
    found: Record = {"hf_hook_name": folder.name}
    if isinstance(about.get("model"), str):
        found["model_name"] = about["model"]
    if isinstance(about.get("ctx_len"), int):
        found["context_size"] = about["ctx_len"]
    if "layers." in folder.name or folder.name in ("embed_tokens", "wte") or folder.name.startswith("h."):
        site = site_of(folder.name)
        # a transcoder reads what its module is given, which is no site, and writes what that returns
        here = {"hook_name": f"blocks.{site.layer}.mlp.hook_in"} | site_metadata(None, site)
        found |= here if transcodes else site_metadata(site)
    return found | site_metadata(overrides.site, overrides.site_out)
