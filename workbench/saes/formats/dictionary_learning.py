"""Dictionaries of saprmarks/dictionary_learning: `config.json` and `ae.pt`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from workbench.bases.sitenames import site_metadata
from workbench.core.errors import CorruptFileError, MismatchError, UnknownNameError, did_you_mean
from workbench.core.jsontext import Record
from workbench.saes.formats.files import read_config, read_tensors
from workbench.saes.formats.overrides import Overrides
from workbench.saes.formats.raw import Activation, RawSAE
from workbench.saes.formats.tensors import find, linear_names, need, oriented, per_feature

NEEDS = ("config.json", "ae.pt")

_CLASSES: dict[str, tuple[Activation, bool, bool]] = {
    "AutoEncoder": ("relu", True, False),
    "AutoEncoderNew": ("relu", False, False),
    "GatedAutoEncoder": ("gated", True, True),
    "JumpReluAutoEncoder": ("jumprelu", False, True),
    "AutoEncoderTopK": ("topk", True, False),
    "BatchTopKSAE": ("jumprelu", True, False),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, False),
}
"""By class: its activation, whether it subtracts its bias first, whether activations are in units of decoder norms."""


def recognise(folder: Path) -> bool:
    """Whether a folder is of this format."""
    return all((folder / name).is_file() for name in NEEDS)


def read(folder: Path, overrides: Overrides) -> RawSAE:
    """The dictionary in a folder. BatchTopK is used with its threshold, as in its own `encode`.

    Raises:
        UnknownNameError: for a class that is not known here.
        MismatchError: for a BatchTopK dictionary whose threshold was never set.
        CorruptFileError: if config and tensors disagree.
    """
    config = read_config(folder / NEEDS[0])
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or not isinstance(trainer.get("dict_class"), str):
        raise CorruptFileError(
            f"{folder}/config.json names no trainer.dict_class, so the kind of dictionary is unknown."
        )
    name = trainer["dict_class"]
    if name not in _CLASSES:
        raise UnknownNameError(
            f"{folder}: dictionaries of class {name!r} can't be read. {did_you_mean(name, _CLASSES)}"
        )
    activation, subtracts, rescales = _CLASSES[name]
    path = folder / NEEDS[1]
    tensors = read_tensors(path)
    W_enc, W_dec, b_enc, b_dec = need(tensors, path, "W_enc", "W_dec", "b_enc", "b_dec")
    W_enc, W_dec = oriented(W_enc, W_dec, len(b_dec), linear_names(tensors))
    _check(folder, trainer, W_enc)
    threshold = None
    if activation == "jumprelu" and overrides.k is not None:
        activation = "topk"
    elif activation == "jumprelu":
        threshold = _threshold(folder, name, tensors, W_enc.shape[1], overrides)
    return RawSAE(
        activation=activation, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=threshold,
        k=_k(trainer, tensors, overrides) if activation == "topk" else None,
        r_mag=find(tensors, "r_mag"), b_mag=find(tensors, "b_mag"), subtracts_b_dec=subtracts, rescales=rescales,
        scale=overrides.scale or 1.0, metadata=_metadata(config, trainer, overrides),
    )  # fmt: skip


def _check(folder: Path, trainer: Record, W_enc: Tensor) -> None:
    said = (trainer.get("activation_dim", W_enc.shape[0]), trainer.get("dict_size", W_enc.shape[1]))
    if tuple(W_enc.shape) != said:
        raise CorruptFileError(
            f"{folder}: config.json says activation_dim, dict_size = {said}; the encoder is {tuple(W_enc.shape)}."
        )


def _threshold(folder: Path, name: str, tensors: dict[str, Tensor], d_sae: int, overrides: Overrides) -> Tensor | None:
    found = per_feature(find(tensors, "threshold") if overrides.threshold is None else overrides.threshold, d_sae)
    if found is None or (name != "JumpReluAutoEncoder" and bool((found < 0).any())):
        raise MismatchError(
            f"{folder}: the threshold of this {name} was never set (training sets it after 1000 steps). Pass "
            "threshold=, or k= to keep the k largest of each token."
        )
    return found


def _k(trainer: Record, tensors: dict[str, Tensor], overrides: Overrides) -> int | None:
    if overrides.k is not None:
        return overrides.k
    return int(tensors["k"]) if "k" in tensors else trainer.get("k")


def _metadata(config: Record, trainer: Record, overrides: Overrides) -> Record:
    found: Record = {}
    submodule, layer = trainer.get("submodule_name"), trainer.get("layer")
    if isinstance(submodule, str) and submodule:
        found["hook_name"] = submodule
    elif isinstance(layer, int):
        # trainers without a submodule were run on the output of their layer
        found["hook_name"] = f"resid_post.{layer}"
    if isinstance(trainer.get("lm_name"), str):
        found["model_name"] = trainer["lm_name"]
    buffer = config.get("buffer")
    if isinstance(buffer, dict) and isinstance(buffer.get("ctx_len"), int):
        found["context_size"] = buffer["ctx_len"]
    return found | site_metadata(overrides.site, overrides.site_out)
