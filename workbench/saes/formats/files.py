"""Reads tensors from files of unknown origin: no pickle, sizes checked before anything is allocated."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from workbench.core.errors import CorruptFileError, MissingFileError, ResourceError, WorkbenchError
from workbench.core.jsontext import Record
from workbench.core.numbers import byte_size
from workbench.core.records import load_json
from workbench.models.weights import pickled_class

_MEMORY_SHARE = 0.9
_NESTED = ("state_dict", "model_state_dict", "sae", "ae")


def read_config(path: Path) -> Record:
    """The JSON object in a file.

    Raises:
        CorruptFileError: if it is not an object.
    """
    return load_json(path, dict, foreign=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .npz file, on the CPU.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: if it is damaged, or holds something else than tensors.
        ResourceError: if it does not fit in memory.
    """
    if not path.is_file():
        raise MissingFileError(f"No file {path}. Check the path.")
    _require_memory(path, path.stat().st_size)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".npz":
            return _read_npz(path)
        return _plain(path, torch.load(path, map_location="cpu", weights_only=True))
    except WorkbenchError:
        raise
    except (safetensors.SafetensorError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise CorruptFileError(f"{path} can't be read: {type(error).__name__}: {str(error)[:200]}.") from error
    except Exception as error:
        # what torch raises for anything but tensors is defined in the module that must not be used here
        raise CorruptFileError(
            f"{path} holds {pickled_class(error) or type(error).__name__}, not only tensors, and loading it would run "
            "its code. Ask its author for safetensors."
        ) from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        # an archive can promise far more than it weighs
        _require_memory(path, sum(entry.file_size for entry in archive.infolist()))
        for entry in archive.infolist():
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize > entry.file_size:
                raise CorruptFileError(f"{path}: {entry.filename} claims {shape} of {dtype}, which it does not hold.")
    with np.load(path, allow_pickle=False) as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data.files}


def _plain(path: Path, loaded: object) -> dict[str, Tensor]:
    """The tensors of a state dict, which may be one level down."""
    if isinstance(loaded, Mapping):
        inner = next((loaded[name] for name in _NESTED if isinstance(loaded.get(name), Mapping)), loaded)
        tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
        for name, value in tensors.items():
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise CorruptFileError(f"{path}: {name} is no plain tensor ({value.layout}, {value.dtype}).")
        tensors |= {str(n): torch.tensor(v) for n, v in inner.items() if isinstance(v, int | float)}
        if tensors:
            return tensors
    raise CorruptFileError(f"{path} holds a {type(loaded).__name__} without tensors; an SAE is a dict of tensors.")


def _require_memory(path: Path, size: int) -> None:
    import psutil

    there = psutil.virtual_memory().available
    if size > _MEMORY_SHARE * there:
        raise ResourceError(
            f"{path} needs {byte_size(size)}; {byte_size(there)} of memory are free. "
            "Free some, or use a larger machine."
        )
