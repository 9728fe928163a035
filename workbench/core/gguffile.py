"""A GGUF file: its metadata, its table of tensors, their rows in fp32, and the tokenizer that it describes."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbench.core.errors import CorruptFileError, InvalidInputError, MissingFileError
from workbench.core.jsontext import Record
from workbench.core.numbers import counted, number

MAX_STRING_BYTES = 1 << 24
MAX_ITEMS = 1 << 22
"""Above any vocabulary or chat template: a damaged length must not claim the memory of the weights behind it."""

_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

_PRE_WITH_BOS = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
    "chameleon",
)  # fmt: skip
"""Byte-level pre-tokenizers for which llama.cpp adds BOS when a file has no `add_bos_token` (llama-vocab.cpp)."""

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's place in the file.

    Attributes:
        shape: slowest dimension first, as in torch.
        kind: name of the storage type, such as "Q4_K".
        row_bytes: bytes of one row of `shape[-1]` numbers.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    row_bytes: int

    @property
    def n_rows(self) -> int:
        """Number of rows of `shape[-1]` numbers."""
        return math.prod(self.shape[:-1])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, dequantised to fp32, of shape (stop - start, `shape[-1]`).

        Raises:
            InvalidInputError: if the `gguf` package can't dequantise this type.
        """
        import gguf

        raw = np.fromfile(
            self.path, np.uint8, (stop - start) * self.row_bytes, offset=self.start + start * self.row_bytes
        )
        try:
            found = gguf.dequantize(raw.reshape(stop - start, self.row_bytes), gguf.GGMLQuantizationType[self.kind])
        except NotImplementedError as error:
            raise InvalidInputError(
                f"{self.path}: {self.name} is stored as {self.kind}, which the gguf package can't turn into numbers. "
                "Use a file of another quantisation."
            ) from error
        return found.reshape(stop - start, self.shape[-1]).astype(np.float32, copy=False)


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """The header of one GGUF file.

    Attributes:
        fields: value of each metadata key; arrays are lists.
        tensors: tensors by name, those of this file only.
    """

    path: Path
    fields: Record
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """The header of a GGUF file, read once, with every length held against the size of the file.

    Raises:
        MissingFileError: if there is no such file.
        CorruptFileError: if it is not a whole GGUF file.
    """
    if not path.is_file():
        raise MissingFileError(f"There is no GGUF file {path}. Check the path; a split model needs all its parts.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (ValueError, struct.error) as error:
        raise CorruptFileError(f"{path} is not a readable GGUF file ({error}). Fetch it again.") from error


class _Reader:
    """Reads forward through the header; whatever is wrong is a ValueError or struct.error."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def header(self) -> GGUFFile:
        if self.data[:4] != b"GGUF":
            raise ValueError(f"it begins with {self.data[:4]!r}, not with b'GGUF'")
        self.at = 4
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; versions 2 and 3 in little-endian order are read")
        n_tensors, n_fields = self.number("Q"), self.number("Q")
        fields: Record = {}
        for _ in range(self.count(n_fields, 13, "metadata fields")):
            key = self.string()
            if key in fields:
                raise ValueError(f"the key {key!r} is there twice")
            fields[key] = self.value(self.number("I"))
        table = [self.entry() for _ in range(self.count(n_tensors, 24, "tensors"))]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
        begin = -(-self.at // alignment) * alignment
        tensors = {entry[0]: self.tensor(begin, *entry) for entry in table}
        if len(tensors) < len(table):
            raise ValueError("two tensors have one name")
        return GGUFFile(self.path, fields, tensors)

    def number(self, code: str) -> Any:
        (found,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return found

    def count(self, n: int, least_bytes: int, what: str, most: int = MAX_ITEMS) -> int:
        """`n`, if so many items of at least `least_bytes` fit between here and the end of the file."""
        if n > most or n * least_bytes > len(self.data) - self.at:
            raise ValueError(f"it claims {number(n)} {what} at byte {number(self.at)} of {number(len(self.data))}")
        return n

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, n: int) -> list[str]:
        data, at, end, unpack = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        found = []
        for _ in range(n):
            start = at + 8
            at = start + unpack(data, at)[0]
            if at > end or at - start > MAX_STRING_BYTES:
                raise ValueError(
                    f"it claims a text of {counted(at - start, 'bytes')} at byte {number(start)} of {number(end)}"
                )
            found.append(data[start:at].decode())
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        of, n = self.number("I"), self.number("Q")
        if of == _STRING:
            return self.strings(self.count(n, 8, "texts"))
        if of not in _NUMBERS:
            raise ValueError(f"it has an array of the type {of}, where numbers and texts are known")
        code = _NUMBERS[of]
        width = struct.calcsize("<" + code)
        found = struct.unpack_from(f"<{self.count(n, width, 'numbers')}{code}", self.data, self.at)
        self.at += n * width
        return list(found)

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, storage type and offset of the next tensor in the table."""
        name = self.string()
        n = self.count(self.number("I"), 8, "dimensions", _MAX_DIMENSIONS)
        shape = tuple(self.number("Q") for _ in range(n))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def tensor(self, begin: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        stored = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[stored]
        shape = shape or (1,)
        if shape[-1] % block:
            raise ValueError(f"{name} has rows of {shape[-1]} numbers, {stored.name} stores blocks of {block}")
        found = GGUFTensor(self.path, name, shape, stored.name, begin + offset, shape[-1] // block * size)
        if found.start + found.n_rows * found.row_bytes > len(self.data):
            raise ValueError(f"{name} ends behind the end of the file, {counted(len(self.data), 'bytes')}")
        return found


def gguf_tokenizer(file: GGUFFile) -> Any:
    """The Hugging Face tokenizer that the file describes; see `gguf_backend`."""
    from transformers import PreTrainedTokenizerFast

    backend, settings = gguf_backend(file)
    return PreTrainedTokenizerFast(tokenizer_object=backend, is_local=True, **settings)


def gguf_backend(file: GGUFFile) -> tuple[Any, Record]:
    """The `tokenizers.Tokenizer` that the file describes, with the tokens that the file lists and no others.

    The settings name its special tokens and chat template, and say whether BOS is added, as llama.cpp decides it: by
    `add_bos_token`, else by the kind of the tokenizer.

    Raises:
        InvalidInputError: if transformers knows no tokenizer of this kind.
        CorruptFileError: if the parts of the vocabulary don't fit together.
    """
    from tokenizers import AddedToken
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        GGUF_TOKENIZER_TYPES,
        convert_gguf_tokenizer,
    )

    vocabulary, settings = (
        {new: file.fields[f"tokenizer.{key}"] for key, new in names.items() if f"tokenizer.{key}" in file.fields}
        for names in (GGUF_TOKENIZER_MAPPING["tokenizer"], GGUF_TOKENIZER_MAPPING["tokenizer_config"])
    )
    kind, n = vocabulary.get("tokenizer_type"), len(_texts(file, "tokenizer.ggml.tokens"))
    if kind not in GGUF_TOKENIZER_TYPES:
        raise InvalidInputError(
            f"{file.path}: its tokenizer is of the kind {kind!r}; transformers builds "
            f"{', '.join(GGUF_TOKENIZER_TYPES)}. "
            "Use the safetensors folder of the model, which holds a tokenizer of its own."
        )
    try:
        backend = _only(convert_gguf_tokenizer(str(file.fields.get("general.architecture")), vocabulary)[0], n)
    except Exception as error:  # tokenizers raises Exception itself
        raise CorruptFileError(
            f"{file.path}: its vocabulary makes no tokenizer ({_brief(error)}). Fetch it again."
        ) from error
    for role, key in _ROLES.items():
        i = file.fields.get(f"tokenizer.ggml.{key}_token_id")
        text = None if i is None else backend.id_to_token(i) if isinstance(i, int) and 0 <= i < n else ""
        if text == "":
            raise CorruptFileError(
                f"{file.path}: its {role} has the id {i!r} among {counted(n, 'tokens')}. Fetch it again."
            )
        if text is not None:
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        settings[role] = text
    with_bos = kind == "llama" or (kind == "gpt2" and vocabulary.get("pre_tokenizer_type") in _PRE_WITH_BOS)
    settings.setdefault("add_bos_token", with_bos)
    if kind == "gemma4":  # its chat template writes BOS, and the reference tokenizer adds none, whatever the file says
        settings["add_bos_token"] = False
    return backend, settings


def _texts(file: GGUFFile, key: str) -> list[str]:
    found = file.fields.get(key)
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise CorruptFileError(f"{file.path} holds no list of texts {key}, so it has no tokenizer. Fetch it again.")
    return found


def _only(backend: Any, n: int) -> Any:
    """The tokenizer without added tokens whose ids are n or more.

    transformers starts from a class whose default special tokens, such as <|endoftext|>, need not be in the file; their
    ids would be rows that the model lacks.
    """
    from tokenizers import Tokenizer

    added = sorted(backend.get_added_tokens_decoder().items())
    if not added or added[-1][0] < n:
        return backend
    kept = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(backend, part) is not None:
            setattr(kept, part, getattr(backend, part))
    for i, token in added:
        if i < n:
            (kept.add_special_tokens if token.special else kept.add_tokens)([token])
    return kept


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
