"""Lenses on disk: `lens.json` says what they are, `lens.safetensors` holds the maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
from torch import Tensor

from workbench.core.atomic import write_atomic
from workbench.core.errors import CorruptFileError, MissingFileError
from workbench.core.jsontext import Json, content_of
from workbench.core.records import from_jsonable, load_json, save_json

LensKind = Literal["logit", "regression", "tuned", "jacobian"]

FORMAT = 1
JSON, TENSORS = "lens.json", "lens.safetensors"
PARTS = ("", "a/", "b/")
"""Prefixes of the whole lens and of its halves."""
_REMEDY = "Save the lens again."
BEGIN_AGAIN = "Delete it to begin again."


@dataclass(frozen=True, kw_only=True)
class About:
    """What `lens.json` says."""

    format: int
    lens: LensKind  # not `kind`, by which a union of records is told apart
    target: str
    sites: tuple[str, ...]
    n_fit: int
    unit: str
    norms: dict[str, float] = field(default_factory=dict)
    model_name: str
    fingerprint: str
    recipe: dict[str, Json] = field(default_factory=dict)
    n_halves: tuple[int, ...] = ()


def save(folder: Path, about: About, parts: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> Path:
    """Writes maps and biases of a lens and its halves; the JSON file last, so that a folder that has one is whole."""
    tensors = {}
    for part, (weights, biases) in zip(PARTS, parts, strict=False):
        tensors |= {f"{part}weight/{site}": weight for site, weight in weights.items()}
        tensors |= {f"{part}bias/{site}": bias for site, bias in biases.items()}
    raw = safetensors.torch.save({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).unlink(missing_ok=True)
    write_atomic(folder / TENSORS, raw)
    save_json(folder / JSON, about)
    return folder


def read(folder: Path) -> tuple[About, list[tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    """What `save` wrote.

    Raises:
        MissingFileError: if there is no lens.
        CorruptFileError: if a file can't be used.
    """
    if not (folder / JSON).is_file():
        raise MissingFileError(
            f"{folder} holds no lens: neither {JSON}, nor config.json with params.pt (tuned-lens), and it is no .pt "
            "file (Jacobian lens). Make one with wb.fit_lens(...).save(folder)."
        )
    about = from_jsonable(About, load_json(folder / JSON, dict))
    if about.format != FORMAT:
        raise CorruptFileError(f"{folder / JSON}: format {about.format}; this version reads {FORMAT}. {_REMEDY}")
    with content_of(folder / TENSORS, _REMEDY, safetensors.SafetensorError, OSError):
        tensors = safetensors.torch.load_file(folder / TENSORS)
    return about, [(_under(tensors, f"{part}weight/"), _under(tensors, f"{part}bias/")) for part in PARTS]


def load_with_metadata(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what its header says."""
    with safetensors.safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
