"""Interventions on disk: JSON for the structure, safetensors for tensors, sae_lens folders for SAEs; nothing is run."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from workbench.bases.sae import SAEBasis, SAELike
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MissingFileError,
    UnknownConfigKeyError,
    did_you_mean,
)
from workbench.core.jsontext import Record, content_of
from workbench.core.records import load_json, save_json, write_atomic
from workbench.hooks.sites import Site
from workbench.interventions.gates import Gate
from workbench.interventions.op import Op
from workbench.interventions.scopes import Scope

FORMAT = 1
_JSON, _TENSORS = "intervention.json", "tensors.safetensors"
_REGISTRIES: dict[str, Mapping[str, type]] = {"op": Op.registry, "scope": Scope.registry, "gate": Gate.registry}
# Scopes that take any number of arguments, and the field that keeps them.
_ANY_NUMBER = {"Pos": "positions", "TokenIs": "ids"}
_WITH_FUNCTIONS = ("Map", "FnGate")


def save(folder: str | Path, content: Mapping[str, object]) -> Path:
    """Writes plain values, tensors, ops, gates, scopes and SAEs; the JSON file comes last.

    Raises:
        InvalidInputError: for a Python function.
    """
    folder = Path(folder)
    writer = _Writer(folder)
    plain = writer.plain(dict(content), "intervention")
    # Without its JSON file a folder holds nothing; so a crash can't leave the old edits with new tensors.
    (folder / _JSON).unlink(missing_ok=True)
    (folder / _TENSORS).unlink(missing_ok=True)
    if writer.tensors:
        write_atomic(folder / _TENSORS, safetensors.torch.save(writer.tensors))
    for name, sae in writer.saes:
        sae.save_model(folder / name)
    save_json(folder / _JSON, {"format": FORMAT, "content": plain})
    return folder


def pack(folder: Path, file: IO[bytes]) -> None:
    """Writes a ZIP archive of what `save` wrote, which `load` reads too; weights would not shrink by compression."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(folder))


def load(place: str | Path) -> Record:
    """Reads what `save` wrote: a folder, or a ZIP archive of it.

    Raises:
        MissingFileError: if there is no intervention there.
        CorruptFileError: if a file can't be used.
        UnknownConfigKeyError: for an op, gate or scope that does not exist.
    """
    if not Path(place).is_file():
        return _load(Path(place))
    with tempfile.TemporaryDirectory(prefix="workbench-") as folder:
        wrong = (zipfile.BadZipFile, OSError, RuntimeError)  # the last one of an encrypted archive
        with content_of(Path(place), "Download or save it again.", *wrong), zipfile.ZipFile(place) as archive:
            archive.extractall(folder)  # lets no member out of the folder
        return _load(Path(folder))


def _load(folder: Path) -> Record:
    if not (folder / _JSON).is_file():
        raise MissingFileError(f"{folder} holds no intervention: {_JSON} not found. Make one with Intervention.save.")
    record = load_json(folder / _JSON, dict)
    if record.get("format") != FORMAT:
        raise CorruptFileError(f"{folder / _JSON}: not an intervention of format {FORMAT}.")
    tensors = {}
    if (folder / _TENSORS).is_file():
        with content_of(folder / _TENSORS, "Save the intervention again.", safetensors.SafetensorError, OSError):
            tensors = safetensors.torch.load_file(folder / _TENSORS)
    with content_of(folder / _JSON, "Save the intervention again."):
        content = _Reader(folder, tensors).value(record["content"])
    if not isinstance(content, dict):
        raise CorruptFileError(f"{folder / _JSON} is not a saved intervention: its content is no object.")
    return content


class _Writer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.saes: list[tuple[str, Any]] = []

    def plain(self, value: object, path: str) -> object:
        if isinstance(value, Tensor):
            self.tensors[path] = value.detach().cpu().contiguous().clone()
            return {"tensor": path}
        if isinstance(value, Site):
            return {"site": str(value)}
        for kind, base in (("op", Op), ("scope", Scope), ("gate", Gate)):
            if isinstance(value, base):
                fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
                own = {name: self.plain(inner, f"{path}.{name}") for name, inner in fields.items()}
                return {kind: type(value).__name__, "fields": own}
        if isinstance(value, Mapping):
            return {str(key): self.plain(inner, f"{path}.{key}") for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.plain(inner, f"{path}.{i}") for i, inner in enumerate(value)]
        if isinstance(value, float) and math.isinf(value):
            return {"float": str(value)}  # JSON has no infinity
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        value = value.sae if isinstance(value, SAEBasis) else value
        if isinstance(value, SAELike) and hasattr(value, "save_model"):
            return {"sae": self._sae(value)}
        raise InvalidInputError(
            f"{path}: a {type(value).__name__} can't be saved; only tensors, numbers, texts and sae_lens SAEs can. "
            "Python functions (Map, FnGate) have to be built again by the code that loads the rest."
        )

    def _sae(self, sae: Any) -> str:
        for name, known in self.saes:
            if known is sae:
                return name
        self.saes.append((f"sae-{len(self.saes)}", sae))
        return self.saes[-1][0]


class _Reader:
    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self.folder, self.tensors = folder, tensors
        self.saes: dict[str, object] = {}

    def value(self, plain: object) -> object:
        if isinstance(plain, list):
            return tuple(self.value(inner) for inner in plain)
        if not isinstance(plain, dict):
            return plain
        if set(plain) == {"tensor"}:
            if plain["tensor"] not in self.tensors:
                raise CorruptFileError(f"{self.folder / _TENSORS} has no tensor {plain['tensor']!r}.")
            return self.tensors[plain["tensor"]]
        if set(plain) == {"site"}:
            return Site.parse(plain["site"])
        if set(plain) == {"float"}:
            return math.inf if plain["float"] == "inf" else -math.inf
        if set(plain) == {"sae"}:
            return self._sae(plain["sae"])
        for kind, registry in _REGISTRIES.items():
            if set(plain) == {kind, "fields"}:
                return self._object(kind, registry, plain[kind], plain["fields"])
        return {key: self.value(inner) for key, inner in plain.items()}

    def _object(self, kind: str, registry: Mapping[str, type], name: str, saved: Mapping[str, object]) -> object:
        if name not in registry:
            raise UnknownConfigKeyError(
                f"{self.folder / _JSON}: there is no {kind} {name!r}. {did_you_mean(name, registry)}"
            )
        if name in _WITH_FUNCTIONS:
            raise CorruptFileError(f"{self.folder / _JSON}: {name} needs a Python function, which no file can hold.")
        fields: Record = {key: self.value(inner) for key, inner in saved.items()}
        known = {field.name for field in dataclasses.fields(registry[name])}
        for key in fields:
            if key not in known:
                raise UnknownConfigKeyError(f"{self.folder / _JSON}: {name} has no {key!r}. {did_you_mean(key, known)}")
        if name in _ANY_NUMBER:
            return registry[name](*fields[_ANY_NUMBER[name]])
        made = registry[name](**fields)
        for key, value in fields.items():
            if isinstance(value, Tensor) and _same(getattr(made, key), value):
                object.__setattr__(made, key, value)
        return made

    def _sae(self, name: str) -> object:
        if name not in self.saes:
            if not name or Path(name).name != name or name == "..":
                raise CorruptFileError(f"{self.folder / _JSON}: the SAE {name!r} is outside its folder.")
            with warnings.catch_warnings():
                # sae_lens 6.54 imports transformer_lens.utils, which 3.9 deprecates.
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                from sae_lens import SAE
            if not (self.folder / name).is_dir():
                raise MissingFileError(f"{self.folder} lacks the folder {name} of an SAE. Copy the whole folder.")
            try:
                with torch.device("cpu"):
                    self.saes[name] = SAE.load_from_disk(self.folder / name)
            except (OSError, LookupError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
                raise CorruptFileError(f"{self.folder / name} is not an SAE of sae_lens: {error}.") from error
        return self.saes[name]


def _same(made: object, saved: Tensor) -> bool:
    """Whether a constructor only rounded a saved tensor; unit vectors and bases come normalised from a file.

    Of one subspace there are many bases, so two of them count as the same if they span the same.
    """
    if not isinstance(made, Tensor) or made.shape != saved.shape or made.dtype != saved.dtype:
        return False
    if not saved.is_floating_point() or torch.allclose(made, saved, rtol=1e-5, atol=1e-6):
        return True
    if saved.ndim < 2 or saved.shape[-2] > saved.shape[-1]:
        return False
    gram = saved @ saved.transpose(-1, -2)
    spans = torch.allclose(made.transpose(-1, -2) @ made, saved.transpose(-1, -2) @ saved, atol=1e-5)
    return spans and torch.allclose(gram, torch.eye(gram.shape[-1]).expand_as(gram), atol=1e-5)
