"""Safetensors files written straight from memory, and read a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from workbench.core.errors import CorruptFileError
from workbench.core.jsontext import Json, parse_json
from workbench.engine.local import Folder, Part

_DTYPES = {torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8"}
"""In the order of the file: wide types first keep every tensor aligned."""


def safetensors_parts(tensors: Mapping[str, Tensor]) -> Iterator[Part]:
    """The bytes of a safetensors file, piece by piece and without a copy of the tensors.

    The same bytes as `safetensors.torch.save` gives, which holds the whole file in memory twice.
    """
    order = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Json] = {}
    start = 0
    for name in names:
        x = tensors[name]
        end = start + x.numel() * x.element_size()
        header[name] = {"dtype": _DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensor(folder: Folder, file: str, name: str) -> Tensor:
    """One tensor of a safetensors file, without reading the others.

    Raises:
        CorruptFileError: if the file has no such tensor.
    """
    size = int.from_bytes(folder.read(file, 0, 8), "little")
    try:
        entry = parse_json(folder.read(file, 8, 8 + size), f"{folder.where}/{file}", dict)[name]
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        dtype = next(dtype for dtype, code in _DTYPES.items() if code == entry["dtype"])
        raw = bytearray(folder.read(file, start, end))
        return torch.frombuffer(raw, dtype=dtype).view(entry["shape"])
    except (ValueError, KeyError, StopIteration, RuntimeError) as error:
        raise CorruptFileError(
            f"{folder.where}/{file} has no readable tensor {name!r} ({error}). Run the same harvest with repair=True "
            "(--repair)."
        ) from None
