"""Lenses that were saved, here or by another library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from workbench.core.arguments import checked
from workbench.features.lenses.files import read
from workbench.features.lenses.linear import LinearLens
from workbench.features.lenses.published import is_published, load_published
from workbench.models.model import Model


@checked
def load_lens(place: str | Path, model: Model, *, any_model: bool = False) -> LinearLens:
    """A lens that `save` wrote, or a published one: a folder of tuned-lens, or a `.pt` file of Jacobian lenses.

    Args:
        place: folder or file.
        model: the model that it will read; its maps are moved to that device.
        any_model: accept a lens that was made for another model of the same width and depth.

    Raises:
        MissingFileError: if there is none.
        CorruptFileError: if a file can't be used.
        MismatchError: if it was made for another model, width or target.
    """
    place = Path(place)
    lens = load_published(place, model, any_model=any_model) if is_published(place) else _load(place)
    if any_model:
        lens = replace(lens, fingerprint="")
    lens.require(model)
    return _on(lens, model)


def _load(folder: Path) -> LinearLens:
    about, parts = read(folder)
    whole, *halves = (
        LinearLens(
            kind=about.lens, target=about.target, sites=about.sites, n_fit=n, unit=about.unit, norms=about.norms,
            model_name=about.model_name, fingerprint=about.fingerprint, recipe=about.recipe, weights=weights,
            biases=biases,
        )
        for (weights, biases), n in zip(parts, (about.n_fit, *about.n_halves), strict=False)
    )  # fmt: skip
    return replace(whole, halves=(halves[0], halves[1])) if len(halves) == 2 else whole


def _on(lens: LinearLens, model: Model) -> LinearLens:
    """The lens on the model's device."""
    if model.device.type == "cpu":
        return lens
    halves = None if lens.halves is None else (_on(lens.halves[0], model), _on(lens.halves[1], model))
    weights, biases = ({site: x.to(model.device) for site, x in maps.items()} for maps in (lens.weights, lens.biases))
    return replace(lens, weights=weights, biases=biases, halves=halves)
