"""The files that lenses are published in, both ways: folders of tuned-lens, and `.pt` files of Jacobian lenses."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.atomic import write_atomic
from workbench.core.display import first_few
from workbench.core.errors import CorruptFileError, InvalidInputError, MismatchError, WidthError
from workbench.core.jsontext import Record, content_of
from workbench.core.records import load_json, save_json
from workbench.features.lenses.linear import LinearLens
from workbench.features.lenses.places import target_of
from workbench.hooks.ends import unembedding
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.models.weights import pickled_class

CONFIG, PARAMS = "config.json", "params.pt"
"""The two files of a tuned-lens."""


def is_published(place: Path) -> bool:
    """Whether this is a file or folder of another library's lens."""
    return place.suffix == ".pt" or (place / CONFIG).is_file() and (place / PARAMS).is_file()


def load_published(place: Path, model: Model, *, any_model: bool = False) -> LinearLens:
    """The lens of such a file, checked against the model as far as the file says what it belongs to.

    Raises:
        MismatchError: for another number of layers, unembedding, target layer or place than the output of blocks.
        WidthError: for another width.
        CorruptFileError: if the file can't be used.
    """
    return _jacobian(place, model) if place.suffix == ".pt" else _tuned(place, model, any_model)


def _tuned(folder: Path, model: Model, any_model: bool) -> LinearLens:
    config = load_json(folder / CONFIG, dict, foreign=True)
    with content_of(folder / CONFIG, "Fetch the lens again."):
        d_model, n_layers, name = config["d_model"], config["num_hidden_layers"], config["base_model_name_or_path"]
    if d_model != model.d_model:
        raise WidthError(f"{folder} is a lens of width {d_model}, for {name}; {model.name} has {model.d_model}.")
    if n_layers != model.n_layers:
        raise MismatchError(
            f"{folder} is a lens of {n_layers} layers, for {name}; {model.name} has {model.n_layers}. Take the lens of "
            "this model."
        )
    wanted = config.get("unembed_hash")
    if wanted and wanted not in unembed_hashes(model) and not any_model:
        raise MismatchError(
            f"{folder} was trained with another unembedding than that of {model.name} (its SHA-256 begins "
            f"{str(wanted)[:12]}): another model, revision or precision. Load the model in the precision of its files, "
            "or pass any_model=True if it is the same model."
        )
    state = _read(folder / PARAMS)
    sites = tuned_sites(model)
    with content_of(folder / PARAMS, "Fetch the lens again."):
        eye = torch.eye(d_model)
        weights = {site: eye + state[f"{i}.weight"].float() for i, site in enumerate(sites)}
        biases = {site: state[f"{i}.bias"].float() for i, site in enumerate(sites) if f"{i}.bias" in state}
    _require_shapes(folder / PARAMS, weights, d_model)
    return LinearLens(
        kind="tuned", target=target_of(model), sites=sites, weights=weights, biases=biases, model_name=str(name),
        recipe={"file": "tuned-lens"},
    )  # fmt: skip


def tuned_sites(model: Model) -> tuple[str, ...]:
    """The sites of a tuned-lens: the embedding, and the output of every block but the last."""
    return ("resid_pre.0", *(f"resid_post.{layer}" for layer in range(model.n_layers - 1)))


def unembed_hashes(model: Model) -> tuple[str, ...]:
    """What tuned-lens writes about a model's unembedding, which depends on its version: of the weights, or in fp32."""
    weight = unembedding(model.hf).weight.detach().cpu().contiguous()
    forms = (weight.view(torch.uint8), weight.float().view(torch.uint8))
    return tuple(dict.fromkeys(hashlib.sha256(form.numpy().tobytes()).hexdigest() for form in forms))


def _jacobian(path: Path, model: Model) -> LinearLens:
    content = _read(path)
    with content_of(path, "Fetch the lens again."):
        maps = {int(layer): matrix.float() for layer, matrix in content["J"].items()}
        d_model, n_prompts = int(content["d_model"]), int(content["n_prompts"])
        about = {**content.get("metadata", {}), **content.get("provenance", {})}
    if d_model != model.d_model:
        raise WidthError(f"{path} is a lens of width {d_model}; {model.name} has {model.d_model}. Take another file.")
    if not maps or max(maps) >= model.n_layers:
        raise MismatchError(
            f"{path} has maps of layers {first_few(sorted(maps))}; {model.name} has layers 0 to {model.n_layers - 1}. "
            "Take the lens of this model."
        )
    point, target = about.get("capture_point", "block_output"), about.get("target_layer", model.n_layers - 1)
    if point != "block_output":
        raise MismatchError(f"{path} maps activations at {point}; only those at block_output can be read here.")
    if target not in (model.n_layers - 1, -1):
        raise MismatchError(
            f"{path} leads to the output of layer {target}; the end of {model.name} reads that of layer "
            f"{model.n_layers - 1}. Take a lens that was fitted to the last layer."
        )
    weights = {f"resid_post.{layer}": maps[layer] for layer in sorted(maps)}
    _require_shapes(path, weights, d_model)
    return LinearLens(
        kind="jacobian", target=target_of(model), sites=tuple(weights), weights=weights, n_fit=n_prompts,
        unit="prompts", recipe={"file": "Jacobian lens", **{str(k): v for k, v in about.items() if _plain(v)}},
    )  # fmt: skip


def _plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _require_shapes(path: Path, weights: Mapping[str, Tensor], d_model: int) -> None:
    for site, weight in weights.items():
        if tuple(weight.shape) != (d_model, d_model):
            raise CorruptFileError(f"{path}: the map at {site} is {tuple(weight.shape)}, not {(d_model, d_model)}.")


def _read(path: Path) -> Record:
    """A file of torch that holds tensors, numbers and texts alone."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CorruptFileError(f"{path} is missing. Fetch the lens again.") from error
    except Exception as error:
        # torch's refusal of anything but tensors is defined in a module that must not be used here
        held = pickled_class(error)
        what = f"holds {held}, and loading it would run code" if held else f"can't be read ({str(error)[:200]})"
        raise CorruptFileError(f"{path} {what}. Ask its author for a file of tensors.") from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path} holds a {type(content).__name__}, not the maps of a lens. Name another file.")
    return content


@checked
def export_lens(lens: LinearLens, place: str | Path, model: Model) -> Path:
    """Writes a lens for its other library: a Jacobian lens to a `.pt` file, a tuned or regression lens to a folder.

    Jacobian maps are rounded to fp16, as in published files.

    Args:
        lens: the lens.
        place: `NAME.pt` for a Jacobian lens; a folder, which tuned-lens loads, for the others.
        model: the model that it belongs to.

    Raises:
        InvalidInputError: for a lens that the format can't hold.
        MismatchError: for another model.
    """
    lens.require(model)
    place = Path(place)
    if lens.kind == "jacobian":
        return _export_jacobian(lens, place, model)
    if place.suffix == ".pt" or lens.kind == "logit":
        raise InvalidInputError(
            f"export_lens({lens.kind}, {place}): .pt files hold Jacobian lenses; a tuned or regression lens is written "
            "to a folder, and the logit lens has nothing to write."
        )
    return _export_tuned(lens, place, model)


def _export_jacobian(lens: LinearLens, place: Path, model: Model) -> Path:
    layers = {Site.parse(site): site for site in lens.sites}
    if place.suffix != ".pt" or any(site.kind != "resid_post" for site in layers):
        raise InvalidInputError(
            f"export_lens(jacobian, {place}): name a .pt file, and fit at outputs of blocks alone (resid_post)."
        )
    maps = {int(site.layer or 0): lens.weights[name].detach().cpu().half() for site, name in layers.items()}
    if not all(bool(matrix.isfinite().all()) for matrix in maps.values()):
        raise InvalidInputError(f"export_lens(jacobian, {place}): a map has entries beyond the range of fp16 (65504).")
    about = {"model": lens.model_name, "target_layer": model.n_layers - 1, "capture_point": "block_output"}
    if isinstance(lens.recipe.get("skip_first"), int):
        about["skip_first"] = lens.recipe["skip_first"]
    content = {"J": maps, "n_prompts": lens.n_fit, "source_layers": sorted(maps), "d_model": model.d_model,
               "metadata": about}  # fmt: skip
    return write_atomic(place, _bytes(content))


def _export_tuned(lens: LinearLens, folder: Path, model: Model) -> Path:
    if lens.sites != tuned_sites(model):
        raise InvalidInputError(
            f"export_lens({lens.kind}, {folder}): tuned-lens has a map at resid_pre.0 and behind every block but the "
            f"last; this lens reads {first_few(lens.sites)}. Fit it with sites=['resid_pre.0', 'resid_post.0', ...]."
        )
    eye = torch.eye(model.d_model)
    state = {f"{i}.weight": lens.weights[site].detach().cpu().float() - eye for i, site in enumerate(lens.sites)}
    state |= {f"{i}.bias": lens.biases[s].detach().cpu().float() for i, s in enumerate(lens.sites) if s in lens.biases}
    config = {
        "base_model_name_or_path": lens.model_name or model.name, "d_model": model.d_model,
        "num_hidden_layers": model.n_layers, "bias": bool(lens.biases), "base_model_revision": None,
        "unembed_hash": unembed_hashes(model)[0], "lens_type": "linear_tuned_lens",
    }  # fmt: skip
    write_atomic(folder / PARAMS, _bytes(state))
    save_json(folder / CONFIG, config)
    return folder


def _bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)  # proves that reading it runs no code
    return buffer.getvalue()
