"""Checkpoints of training: whole or not there, and refused for another run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.core.atomic import replacing
from workbench.core.errors import MismatchError
from workbench.core.jsontext import Record, content_of, parse_json
from workbench.core.records import json_lines, load_json, to_jsonable, write_atomic
from workbench.saes.config import SAEConfig
from workbench.saes.formats.load import CONFIG_FILE, WEIGHTS_FILE

State = Record
"""JSON of a checkpoint, whose values differ in type."""
CHECKPOINT_FILE = "checkpoint.safetensors"
METRICS_FILE = "metrics.jsonl"
_RETRAIN = "Delete it to train from the start."
FREE_TO_CHANGE = ("checkpoint_seconds", "device")
"""Fields that may differ when a run is continued."""


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], state: State) -> Path:
    """Writes tensors and state beside the previous checkpoint, then puts them in its place in one step.

    A process that is killed at any moment leaves the previous checkpoint or the new one.
    """
    with replacing(folder / CHECKPOINT_FILE) as file:
        safetensors.torch.save_file(tensors, file.name, metadata={"state": json.dumps(state)})
    return folder / CHECKPOINT_FILE


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], State] | None:
    """Tensors and state of the checkpoint in a folder; None if there is none.

    Raises:
        CorruptFileError: if it can't be read.
    """
    state = checkpoint_state(folder)
    if state is None:
        return None
    with content_of(folder / CHECKPOINT_FILE, _RETRAIN, safetensors.SafetensorError, OSError):
        return safetensors.torch.load_file(folder / CHECKPOINT_FILE), state


def checkpoint_state(folder: Path) -> State | None:
    """The state alone, as JSON, without reading the tensors; None if there is no checkpoint.

    Raises:
        CorruptFileError: if it can't be read.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return None
    with (
        content_of(path, _RETRAIN, safetensors.SafetensorError, OSError),
        safetensors.safe_open(path, framework="pt") as file,
    ):
        return parse_json(file.metadata()["state"], str(path), dict, foreign=True, remedy=_RETRAIN)


def store_id(store: ActivationStore) -> str:
    """What tells one store from another: the checksums of its shards."""
    return hashlib.sha256(" ".join(shard.sha256 for shard in store.manifest.shards).encode()).hexdigest()[:16]


def check_same(path: Path, config: State, made_from: str, wanted: SAEConfig, store: ActivationStore) -> None:
    """Refuses to continue what was made with another configuration or store.

    Raises:
        MismatchError: naming each field that differs.
    """
    mine = to_jsonable(wanted)
    differ = [key for key in mine if key not in FREE_TO_CHANGE and config.get(key) != mine[key]]
    if differ:
        shown = ", ".join(f"{key}={config.get(key)!r} (asked for {mine[key]!r})" for key in differ)
        raise MismatchError(f"{path} belongs to another run: {shown}. Use another folder, or delete it.")
    if made_from != store_id(store):
        raise MismatchError(f"{path} was made from another store than {store.path}. Use another folder, or delete it.")


def finished_metrics(folder: Path, config: SAEConfig, store: ActivationStore) -> dict[str, float] | None:
    """Final metrics of the SAE in a folder, if it is there and the one that is wanted; None if it is not there.

    Raises:
        MismatchError: if the folder holds another SAE.
    """
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        return None
    file = folder / CONFIG_FILE
    with content_of(file, "Use another folder, or delete it."):
        ours = load_json(file, dict, foreign=True).get("metadata", {}).get("workbench")
        if not ours:
            raise MismatchError(f"{folder} holds an SAE that was not trained here. Use another folder.")
        check_same(file, ours["config"], ours["store"], config, store)
        return ours["metrics"]


def truncate_metrics(folder: Path, step: int) -> None:
    """Drops the lines after a step, which is made again; with step 0 all of them."""
    path = folder / METRICS_FILE
    if path.is_file():
        with content_of(path):
            kept = [line for line in json_lines(path, only_whole=True) if line["step"] <= step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
