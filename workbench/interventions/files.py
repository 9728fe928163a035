"""Interventions on disk: JSON for the structure, safetensors for tensors, sae_lens folders for SAEs; nothing is run."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from workbench.errors import CorruptFileError, InvalidInputError, MissingFileError, UnknownConfigKeyError, did_you_mean
from workbench.hooks.sites import Site
from workbench.interventions import gates, ops, replacing, saes, shapes
from workbench.interventions.op import Op
from workbench.interventions.scopes import Scope
from workbench.records import load_json, save_json, write_atomic

FORMAT = 1
_JSON, _TENSORS = "intervention.json", "tensors.safetensors"
_REGISTRIES: dict[str, Mapping[str, type]] = {"op": Op.registry, "scope": Scope.registry, "gate": gates.Gate.registry}
_KNOWN = (gates, ops, replacing, saes, shapes)  # importing them fills the registries


def save(folder: str | Path, content: Mapping[str, Any]) -> Path:
    """Writes plain values, tensors, ops, gates, scopes and SAEs; the JSON file comes last.

    Raises:
        InvalidInputError: for a Python function.
    """
    folder = Path(folder)
    writer = _Writer(folder)
    plain = writer.plain(dict(content), "intervention")
    if writer.tensors:
        write_atomic(folder / _TENSORS, safetensors.torch.save(writer.tensors))
    for name, sae in writer.saes:
        sae.save_model(folder / name)
    save_json(folder / _JSON, {"format": FORMAT, "content": plain})
    return folder


def load(folder: str | Path) -> dict[str, Any]:
    """Reads what `save` wrote.

    Raises:
        MissingFileError: if there is no intervention in the folder.
        CorruptFileError: if a file can't be used.
        UnknownConfigKeyError: for an op, gate or scope that does not exist.
    """
    folder = Path(folder)
    if not (folder / _JSON).is_file():
        raise MissingFileError(f"{folder} holds no intervention: {_JSON} not found. Make one with Intervention.save.")
    record = load_json(folder / _JSON)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CorruptFileError(f"{folder / _JSON}: not an intervention of format {FORMAT}.")
    tensors = {}
    if (folder / _TENSORS).is_file():
        try:
            tensors = safetensors.torch.load_file(folder / _TENSORS)
        except safetensors.SafetensorError as error:
            raise CorruptFileError(f"{folder / _TENSORS} can't be read: {error}.") from error
    return _Reader(folder, tensors).value(record["content"])


class _Writer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.saes: list[tuple[str, Any]] = []

    def plain(self, value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            self.tensors[path] = value.detach().cpu().contiguous().clone()
            return {"tensor": path}
        if isinstance(value, Site):
            return {"site": str(value)}
        for kind, base in (("op", Op), ("scope", Scope), ("gate", gates.Gate)):
            if isinstance(value, base):
                fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
                own = {name: self.plain(inner, f"{path}.{name}") for name, inner in fields.items()}
                return {kind: type(value).__name__, "fields": own}
        if isinstance(value, Mapping):
            return {str(key): self.plain(inner, f"{path}.{key}") for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.plain(inner, f"{path}.{i}") for i, inner in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if hasattr(value, "W_dec") and hasattr(value, "save_model"):
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
        self.saes: dict[str, Any] = {}

    def value(self, plain: Any) -> Any:
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
        if set(plain) == {"sae"}:
            return self._sae(plain["sae"])
        for kind, registry in _REGISTRIES.items():
            if set(plain) == {kind, "fields"}:
                return self._object(kind, registry, plain)
        return {key: self.value(inner) for key, inner in plain.items()}

    def _object(self, kind: str, registry: Mapping[str, type], plain: Mapping[str, Any]) -> Any:
        name = plain[kind]
        if name not in registry:
            raise UnknownConfigKeyError(
                f"{self.folder / _JSON}: there is no {kind} {name!r}. {did_you_mean(name, registry)}"
            )
        fields = {key: self.value(inner) for key, inner in plain["fields"].items()}
        # Scopes that take any number of arguments keep them in their one field.
        if name in ("Pos", "TokenIs"):
            return registry[name](*next(iter(fields.values())))
        known = {field.name for field in dataclasses.fields(registry[name])}
        for key in fields:
            if key not in known:
                raise UnknownConfigKeyError(f"{self.folder / _JSON}: {name} has no {key!r}. {did_you_mean(key, known)}")
        return registry[name](**fields)

    def _sae(self, name: str) -> Any:
        if name not in self.saes:
            if Path(name).name != name:
                raise CorruptFileError(f"{self.folder / _JSON}: the SAE {name!r} is outside its folder.")
            with warnings.catch_warnings():
                # sae_lens 6.54 imports transformer_lens.utils, which 3.9 deprecates.
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                from sae_lens import SAE
            with torch.device("cpu"):
                self.saes[name] = SAE.load_from_disk(self.folder / name)
        return self.saes[name]
