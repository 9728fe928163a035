"""The two token matrices of a model, read block by block from its files: the model itself is never loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.display import first_few
from workbench.core.errors import CorruptFileError, InvalidInputError, MissingFileError, UnknownNameError
from workbench.core.gguffile import GGUFFile, GGUFTensor, read_gguf
from workbench.core.jsontext import Record
from workbench.core.records import load_json

INDEX = "model.safetensors.index.json"
BLOCK_ROWS = 16_384
"""Rows per block: 16k rows of width 8,192 are half a GiB in fp32."""

_INPUT = ("shared", "embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embedding", "embeddings")
_OUTPUT = ("lm_head", "embed_out", "output", "ff_out", "output_layer", "head")
_FLOATS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
_NOT_TEXT = (
    "vision", "visual", "audio", "image", "speech", "per_layer", "position", "token_type", "mtp", "draft",
    ".layers.", ".h.", ".blocks.",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix with one row per token id, on disk or in memory; `read(start, stop)` gives rows.

    Rows are handed out in fp32 on the CPU; `stored` is the type of number in the file.
    """

    name: str
    n_rows: int
    width: int
    stored: str
    read: Callable[[int, int], Tensor]

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Float[Tensor, "rows d_model"]]]:
        """Index of the first row, and the rows, block after block."""
        for start in range(0, self.n_rows, size):
            yield start, self.read(start, min(start + size, self.n_rows)).to("cpu", torch.float32)

    def rows(self, ids: Sequence[int]) -> Float[Tensor, "rows d_model"]:
        """The named rows, in the order asked."""
        wanted, inverse = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        if not len(wanted):
            return torch.zeros(0, self.width)
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)
        rows = torch.cat([self.read(int(run[0]), int(run[-1]) + 1).to("cpu", torch.float32) for run in runs])
        return rows[torch.from_numpy(inverse)]


@dataclass(frozen=True, eq=False)
class TokenMatrices:
    """What a weights-only scan reads; `E_out` is the same object as `E_in` when tied, `bias` is the output layer's."""

    E_in: Matrix
    E_out: Matrix
    bias: Float[Tensor, " d_vocab"] | None
    tied: bool
    tied_why: str


def in_memory(hf: Any) -> TokenMatrices:
    """The matrices of a loaded Hugging Face model."""
    inner, outer = hf.get_input_embeddings(), hf.get_output_embeddings()
    E_in = _of_tensor("input embedding", inner.weight)
    if outer is None:
        raise MissingFileError("The loaded model has no output embedding. Load it with its language-model head.")
    bias = getattr(outer, "bias", None)
    bias = None if bias is None else bias.detach().float().cpu()
    if outer.weight is inner.weight or outer.weight.data_ptr() == inner.weight.data_ptr():
        return TokenMatrices(E_in, E_in, bias, True, "input and output embedding share their memory")
    return _untied(E_in, _of_tensor("output embedding", outer.weight), bias, "two matrices in memory")


def in_folder(folder: Path) -> TokenMatrices:
    """The matrices of a safetensors folder, sharded or not.

    Raises:
        MissingFileError: without config.json or safetensors files.
        UnknownNameError: if the matrices cannot be told by their names.
        CorruptFileError: if the config promises an output matrix that no file holds.
        InvalidInputError: if a matrix is stored in packed integers, whose scales lie elsewhere.
    """
    names = tensor_files(folder)
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{folder} is not a model folder: it has no config.json. Name a save_pretrained folder.")
    config: Record = load_json(folder / "config.json", dict, foreign=True)
    E_in = _safetensors(names, _choose(names, _INPUT, folder))
    heads = _candidates(names, _OUTPUT, E_in)
    output = _choose(names, _OUTPUT, folder, E_in) if heads else None
    bias = _bias(names, output or "lm_head.weight")
    nested = config.get("text_config") or {}
    says = {part["tie_word_embeddings"] for part in (config, nested) if part.get("tie_word_embeddings") is not None}
    if says == {True} or (output is None and says != {False}):
        why = "config says tie_word_embeddings" if True in says else "the files hold no separate output matrix"
        return TokenMatrices(E_in, E_in, bias, True, why)
    if output is None:
        raise CorruptFileError(
            f"{folder}: the config says tie_word_embeddings=false, but no file holds an output matrix "
            f"({', '.join(_OUTPUT)}). Its {len(names)} tensors: {first_few(names)}. Save the model again with its head."
        )
    return _untied(E_in, _safetensors(names, output), bias, "config and files hold two matrices")


def in_gguf(file: GGUFFile | Path) -> TokenMatrices:
    """The matrices of a GGUF file, dequantised block by block; of a split file all parts are read.

    Raises:
        MissingFileError: if the file, or a part of a split one, is missing.
        CorruptFileError: if it is not a GGUF file with a token embedding.
    """
    file = read_gguf(file) if isinstance(file, Path) else file
    tensors = dict(file.tensors)
    # the other parts of a split file: without the last one an untied model would look tied
    if split := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", file.path.name):
        for k in set(range(1, int(split[3]) + 1)) - {int(split[2])}:
            tensors |= read_gguf(file.path.with_name(f"{split[1]}-{k:05d}-of-{split[3]}.gguf")).tensors
    if "token_embd.weight" not in tensors:
        raise CorruptFileError(
            f"{file.path} holds no token_embd.weight; it has {first_few(tensors)}. Use a language model."
        )
    E_in = _of_gguf(tensors["token_embd.weight"])
    bias = torch.from_numpy(tensors["output.bias"].rows(0, 1)[0]) if "output.bias" in tensors else None
    if "output.weight" not in tensors:
        return TokenMatrices(E_in, E_in, bias, True, "the file holds no output.weight")
    return _untied(E_in, _of_gguf(tensors["output.weight"]), bias, "the file holds output.weight")


def _untied(E_in: Matrix, E_out: Matrix, bias: Tensor | None, why: str) -> TokenMatrices:
    """Two matrices, unless the second is a bit-for-bit copy of the first."""
    same = (E_in.n_rows, E_in.width) == (E_out.n_rows, E_out.width) and all(
        torch.equal(a, b) for (_, a), (_, b) in zip(E_in.blocks(), E_out.blocks(), strict=True)
    )
    if same:
        return TokenMatrices(E_in, E_in, bias, True, f"{why}, but they are bit-identical copies")
    return TokenMatrices(E_in, E_out, bias, False, why)


def _of_tensor(name: str, weight: Tensor) -> Matrix:
    weight = weight.detach()
    stored = str(weight.dtype).removeprefix("torch.")
    return Matrix(name, weight.shape[0], weight.shape[1], stored, lambda start, stop: weight[start:stop])


def _of_gguf(tensor: GGUFTensor) -> Matrix:
    if len(tensor.shape) != 2:
        raise CorruptFileError(f"{tensor.path}: {tensor.name} has the shape {tensor.shape}, not one row per token.")
    return Matrix(
        tensor.name, *tensor.shape, tensor.kind, lambda start, stop: torch.from_numpy(tensor.rows(start, stop))
    )


def _safetensors(names: dict[str, Path], name: str) -> Matrix:
    from safetensors import safe_open

    opened = safe_open(names[name], framework="pt")
    part = opened.get_slice(name)
    n_rows, width = part.get_shape()
    if part.get_dtype() not in _FLOATS:
        raise InvalidInputError(
            f"{names[name]}: {name} is stored as {part.get_dtype()} {n_rows} x {width}: packed integers, not numbers "
            f"({', '.join(_FLOATS)}). Load the model with load_model and scan that object, or scan the unpacked model."
        )
    return Matrix(name, n_rows, width, part.get_dtype(), lambda start, stop: part[start:stop])


def _bias(names: dict[str, Path], output: str) -> Tensor | None:
    """The output layer's bias, of its own or (BART, Marian) one that the model adds to the logits."""
    from safetensors import safe_open

    name = next((n for n in (output.removesuffix("weight") + "bias", "final_logits_bias") if n in names), None)
    if name is None:
        return None
    with safe_open(names[name], framework="pt") as opened:
        return opened.get_tensor(name).float().flatten()


def tensor_files(folder: Path) -> dict[str, Path]:
    """File of each tensor: those of the index, if there is one, since other layouts of the weights may lie beside it.

    Raises:
        MissingFileError: without safetensors files.
        CorruptFileError: for a file that cannot be read, or one that the index names and that is not there.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    if index.is_file():
        files = load_json(index, dict, foreign=True).get("weight_map", {})
        for file in set(files.values()):
            if Path(file).name != file or not (folder / file).is_file():
                raise CorruptFileError(f"{index} names {file!r}, which is not in {folder}. Fetch the missing shard.")
        return {name: folder / file for name, file in files.items()}
    file_of: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                file_of |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise CorruptFileError(f"{file} is not a readable safetensors file ({error}). Fetch it again.") from error
    if not file_of:
        other = ", ".join(sorted(file.name for file in folder.glob("*.bin"))) or "no weights"
        raise MissingFileError(
            f"{folder} has no .safetensors file (found: {other}). Pickled weights are not read; "
            "convert them with save_pretrained(safe_serialization=True)."
        )
    return file_of


def _candidates(names: dict[str, Path], kinds: tuple[str, ...], like: Matrix | None = None) -> list[str]:
    """Tensors whose module has one of the names, best first; not those of vision, audio, positions or single layers.

    With `like` only those of its width and at least half its rows: a classifier's head is no output embedding.
    """
    from safetensors import safe_open

    fits = []
    for name in names:
        if not name.endswith(".weight") or _module(name) not in kinds or any(bad in name for bad in _NOT_TEXT):
            continue
        with safe_open(names[name], framework="pt") as opened:
            shape = opened.get_slice(name).get_shape()
        if len(shape) == 2 and (like is None or (shape[1] == like.width and 2 * shape[0] >= like.n_rows)):
            fits.append(name)
    return sorted(fits, key=lambda name: (kinds.index(_module(name)), len(name)))


def _module(name: str) -> str:
    return name.split(".")[-2:][0]


def _choose(names: dict[str, Path], kinds: tuple[str, ...], folder: Path, like: Matrix | None = None) -> str:
    """The one tensor that fits; of several kinds the one listed first."""
    fits = _candidates(names, kinds, like)
    if len(fits) == 1 or (len(fits) > 1 and _module(fits[0]) != _module(fits[1])):
        return fits[0]
    raise UnknownNameError(
        f"{folder}: looked for one {' or '.join(kinds)} matrix and found {len(fits)} ({first_few(fits) or 'none'}) "
        f"among {len(names)} tensors ({first_few(names)}). Load the model with load_model and scan that object."
    )
