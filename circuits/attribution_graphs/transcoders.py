"""Reads sets of transcoders, one per layer or across layers, in the files that circuit-tracer reads.

A folder holds `config.yaml` (kind, hooks, activation) and one file of tensors per layer. Encoder rows are features:
`W_enc (F, d)`, `W_dec (F, d)`; a decoder across layers is `(F, layers from its own to the last, d)`. The linear path is
`x @ W_skip.T` in a transcoder of one layer, `x @ W_skip` in one across layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor

from circuits.attribution_graphs.coders import CrossLayerTranscoder
from circuits.decomposition import bases
from workbench.bases.base import Basis
from workbench.bases.fits import placed_at
from workbench.bases.sae import as_basis
from workbench.core.arguments import checked
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    did_you_mean,
    require_known,
)
from workbench.core.progress import track
from workbench.hooks.sites import Site
from workbench.models.hub import files_of
from workbench.models.model import Model
from workbench.saes.formats.build import build
from workbench.saes.formats.files import read_tensors
from workbench.saes.formats.gains import take_up_gain
from workbench.saes.formats.raw import RawSAE

CONFIG_FILE = "config.yaml"
SET, CROSS = "transcoder_set", "cross_layer_transcoder"
SetActivation = Literal["relu", "topk", "jumprelu"]

_READS = {
    "mlp.hook_in": "blocks.{}.mlp.hook_in", "ln2.hook_normalized": "blocks.{}.ln2.hook_normalized",
    "hook_resid_mid": "blocks.{}.hook_resid_mid", "hook_mlp_in": "blocks.{}.hook_resid_mid",
    "hook_resid_pre": "blocks.{}.hook_resid_pre",
}  # fmt: skip
"""What a set may read: its own names, and those of TransformerLens with the layer."""
_ACTIVATIONS: Mapping[str | None, SetActivation] = {
    "relu": "relu", "topk": "topk", "jumprelu": "jumprelu", "jump_relu": "jumprelu",
}  # fmt: skip
_WRITES = ("hook_mlp_out", "mlp.hook_out")


@dataclass(frozen=True, kw_only=True)
class _Set:
    """What `config.yaml` says.

    Attributes:
        folder: where it lies.
        kind: one transcoder per layer, or one across layers.
        reads: name of the hook that is read, without its layer.
        writes: name of the hook that is written.
        activation: None where it is not named.
        k: of TopK.
        files: by layer the file of a transcoder.
    """

    folder: Path
    kind: str
    reads: str
    writes: str
    activation: SetActivation | None
    k: int | None
    files: Mapping[int, Path]


@checked
def load_transcoders(
    model: Model,
    where: str | Path,
    *,
    layers: Collection[int] | None = None,
    activation: SetActivation | None = None,
) -> dict[str, Basis] | CrossLayerTranscoder:
    """The transcoders of a folder with `config.yaml`, or of a repository of the Hugging Face hub.

    Transcoders that read a norm without its gain (Gemma Scope) are changed to read the MLP's input; what they encode is
    the same.

    Args:
        model: the model that they are of.
        where: the folder, or `owner/name` of the hub.
        layers: which layers of a set are loaded; None takes all. One across layers is loaded whole.
        activation: of features without thresholds, where the config names none.

    Returns:
        A basis per layer by the site that it writes, or the transcoder across layers: what `attribution_graph` takes.

    Raises:
        MissingFileError: if there is no config, or the file of a layer is missing.
        CorruptFileError: if the config or a file can't be used.
        MismatchError: if they are not of this model, or nothing says what the activation is.
        InvalidInputError: for layers that are not there.
    """
    found = _read_config(_folder(where, layers))
    if layers is not None and found.kind == CROSS:
        raise InvalidInputError(f"load_transcoders(layers={list(layers)}): {where} is across layers. Leave layers out.")
    for layer in layers or ():
        require_known("layer", str(layer), [str(n) for n in found.files])
    chosen = [layer for layer in found.files if layers is None or layer in layers]
    if found.kind == CROSS:
        return _across(model, found, activation)
    return bases(
        model,
        {
            f"mlp_out.{layer}": _basis(model, found, layer, _of_one_layer(read_tensors(found.files[layer])), activation)
            for layer in track(chosen, total=len(chosen), description="loading transcoders", unit="layers")
        },
    )


def _folder(where: str | Path, layers: Collection[int] | None) -> Path:
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(where, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        raise MissingFileError(f"{where}: there is no such folder. Give one that holds {CONFIG_FILE}, or a hub id.")
    some = ["*.safetensors"] if layers is None else [f"layer_{layer}.safetensors" for layer in layers]
    return files_of(where, [CONFIG_FILE, *some])


def _read_config(folder: Path) -> _Set:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise MissingFileError(f"{folder} holds no {CONFIG_FILE}, so it is no set of transcoders. Check the folder.")
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CorruptFileError(
            f"{path} can't be read: {' '.join(str(error).split())[:200]}. Fetch it again."
        ) from error
    if not isinstance(said, dict):
        raise CorruptFileError(f"{path} holds a {type(said).__name__}, where names and values were expected.")
    text = {name: said.get(name) for name in ("feature_input_hook", "feature_output_hook")}
    if missing := [name for name, value in text.items() if not isinstance(value, str)]:
        raise CorruptFileError(f"{path} does not say {missing[0]}, so the site is unknown. Add it.")
    kind = said.get("model_kind", SET)
    if kind not in (SET, CROSS):
        raise CorruptFileError(f"{path}: model_kind={kind!r}. {did_you_mean(str(kind), (SET, CROSS))}")
    activation, k = said.get("activation", said.get("activation_function")), said.get("k")
    if activation is not None and activation not in _ACTIVATIONS:
        raise CorruptFileError(f"{path}: activation={activation!r}; known are {', '.join(map(str, _ACTIVATIONS))}.")
    if activation == "topk" and not (type(k) is int and k > 0):
        raise CorruptFileError(f"{path}: activation is topk and k={k!r}; give how many features are active.")
    return _Set(
        folder=folder, kind=kind, reads=str(text["feature_input_hook"]), writes=str(text["feature_output_hook"]),
        activation=_ACTIVATIONS.get(activation), k=k,
        files=_listed(folder, said.get("transcoders")) or _in_folder(folder, kind),
    )  # fmt: skip


def _listed(folder: Path, entries: object) -> dict[int, Path]:
    """The files that the config names, as paths from its folder or as addresses on the hub."""
    found: dict[int, Path] = {}
    for entry in entries if isinstance(entries, list) else []:
        layer, place = (entry.get("layer"), entry.get("filepath")) if isinstance(entry, dict) else (None, None)
        if type(layer) is not int or not isinstance(place, str) or layer in found:
            raise CorruptFileError(
                f"{folder / CONFIG_FILE}: {str(entry)[:100]} names no layer of its own and filepath."
            )
        address = re.fullmatch(r"hf://([^/]+/[^/]+)/([^?]+)(?:\?revision=(.+))?", place)
        if address is None:
            found[layer] = folder / place
        else:
            name, inside, revision = address.groups()
            found[layer] = files_of(name, [inside], revision) / inside
    return dict(sorted(found.items()))


def _in_folder(folder: Path, kind: str) -> dict[int, Path]:
    pattern = r"W_enc_(\d+)\.safetensors" if kind == CROSS else r"layer_(\d+)\.safetensors"
    named = ((re.fullmatch(pattern, path.name), path) for path in folder.iterdir())
    found = dict(sorted((int(name[1]), path) for name, path in named if name))
    if not found:
        form = "W_enc_0.safetensors" if kind == CROSS else "layer_0.safetensors"
        raise MissingFileError(f"{folder} holds {CONFIG_FILE} and no {form} or the like. Fetch the files of tensors.")
    return found


Tensors = dict[str, Tensor]


def _need(tensors: Tensors, path: Path, *names: str) -> list[Tensor]:
    if missing := [name for name in names if name not in tensors]:
        held = ", ".join(sorted(tensors)[:20])
        raise CorruptFileError(f"{path} lacks {', '.join(missing)}; it holds {held}. It is not of this format.")
    return [tensors[name].float() for name in names]


def _of_one_layer(tensors: Tensors) -> Callable[[_Set, int], Tensors]:
    """The tensors of one file in the orientation of `RawSAE`; `.npz` keeps `W_enc (d, F)`, others `(F, d)`."""

    def read(found: _Set, layer: int) -> Tensors:
        path = found.files[layer]
        W_enc, W_dec, b_enc, b_dec = _need(tensors, path, "W_enc", "W_dec", "b_enc", "b_dec")
        rows = path.suffix != ".npz" if W_enc.shape[0] == W_enc.shape[1] else W_enc.shape[0] == len(b_enc)
        columns = W_dec.shape[0] != W_dec.shape[1] and W_dec.shape[0] != len(b_enc)
        parts = {
            "W_enc": W_enc.T if rows else W_enc, "W_dec": W_dec.T if columns else W_dec, "b_enc": b_enc, "b_dec": b_dec,
        }  # fmt: skip
        for name, stored in (("W_skip", "W_skip"), ("threshold", "activation_function.threshold"),
                             ("threshold", "threshold")):  # fmt: skip
            if stored in tensors:
                parts[name] = tensors[stored].float()
        return parts

    return read


def _across(model: Model, found: _Set, activation: SetActivation | None) -> CrossLayerTranscoder:
    n = max(found.files) + 1
    if gone := [layer for layer in range(n) if layer not in found.files]:
        raise MissingFileError(
            f"{found.folder} lacks W_enc_{gone[0]}.safetensors. Fetch it; one across layers is whole."
        )
    if n != model.n_layers:
        raise MismatchError(
            f"{found.folder} is across {n} layers; {model.name} has {model.n_layers}. Load the model that it is of."
        )
    of_layer, later = {}, {}
    for layer in track(range(n), total=n, description="loading the transcoder", unit="layers"):
        path = found.folder / f"W_dec_{layer}.safetensors"
        W_dec = _need(read_tensors(path), path, f"W_dec_{layer}")[0]
        if W_dec.ndim != 3 or W_dec.shape[1] != n - layer:
            raise CorruptFileError(
                f"{path}: W_dec_{layer} has shape {tuple(W_dec.shape)}; layer {layer} of {n} writes {n - layer} "
                "layers, on its second axis. Fetch it again."
            )
        read = _of_many_layers(read_tensors(found.files[layer]), W_dec[:, 0].contiguous())
        of_layer[layer] = _basis(model, found, layer, read, activation)
        later |= {(layer, layer + j): W_dec[:, j].contiguous() for j in range(1, n - layer)}
    return CrossLayerTranscoder(layers=of_layer, later=later)


def _of_many_layers(tensors: Tensors, W_dec: Tensor) -> Callable[[_Set, int], Tensors]:
    """The tensors of one layer of a transcoder across layers, each named with its layer."""

    def read(found: _Set, layer: int) -> Tensors:
        names = (f"W_enc_{layer}", f"b_enc_{layer}", f"b_dec_{layer}")
        W_enc, b_enc, b_dec = _need(tensors, found.files[layer], *names)
        parts = {"W_enc": W_enc.T, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
        if (skip := tensors.get(f"W_skip_{layer}")) is not None:
            parts["W_skip"] = skip.float().T
        if (threshold := tensors.get(f"threshold_{layer}")) is not None:
            parts["threshold"] = threshold.float()
        return parts

    return read


def _basis(
    model: Model, found: _Set, layer: int, read: Callable[[_Set, int], Tensors], activation: SetActivation | None
) -> Basis:
    """One layer, at its sites of the model."""
    parts = {name: tensor.contiguous() for name, tensor in read(found, layer).items()}
    threshold = parts.pop("threshold", None)
    kind = activation or found.activation or (None if threshold is None else "jumprelu")
    if kind is None:
        raise MismatchError(
            f"{found.folder}: neither {CONFIG_FILE} nor a threshold says which activation its features have. Pass "
            "activation='relu' if they have none but that."
        )
    if kind == "jumprelu" and threshold is None:
        raise CorruptFileError(f"{found.files[layer]}: activation is jumprelu, and there is no threshold.")
    if threshold is not None:
        threshold = threshold.reshape(-1).expand(len(parts["b_enc"])).contiguous()
    extra: dict[str, Any] = {"k": found.k} if kind == "topk" else {"threshold": threshold} if kind == "jumprelu" else {}
    raw = RawSAE(
        activation=kind, transcodes=True, subtracts_b_dec=False, **parts, **extra,
        metadata={"hook_name": _hook(found, layer), "hook_name_out": _written(model, found, layer)},
    )  # fmt: skip
    sae = build(raw, str(model.device))
    take_up_gain(model, sae)
    return placed_at(as_basis(sae), model)


def _hook(found: _Set, layer: int) -> str:
    name = re.sub(r"^blocks\.(\{layer\}|\d+)\.", "", found.reads)
    if name not in _READS:
        raise MismatchError(f"{found.folder}: feature_input_hook={found.reads!r}. {did_you_mean(name, _READS)}")
    return _READS[name].format(layer)


def _written(model: Model, found: _Set, layer: int) -> str:
    name = re.sub(r"^blocks\.(\{layer\}|\d+)\.", "", found.writes)
    if name not in _WRITES:
        raise MismatchError(f"{found.folder}: feature_output_hook={found.writes!r}. {did_you_mean(name, _WRITES)}")
    site = Site("mlp_out", layer)
    if name == "mlp.hook_out" and model.site_map[site].module is not model.site_map[Site("mlp_in", layer)].module:
        raise MismatchError(
            f"{found.folder} writes mlp.hook_out, before the norm that {model.name} has behind its MLP; only behind it "
            "is a site (hook_mlp_out). Load transcoders that write there."
        )
    return site.tl_name
