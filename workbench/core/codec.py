"""One view of every tokenizer: raw token strings, decoding and encoding of many texts at once, no model needed."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.core.errors import InvalidInputError, MissingFileError
from workbench.core.gguffile import GGUFFile, gguf_backend, read_gguf
from workbench.core.jsontext import Json
from workbench.core.records import load_json
from workbench.core.tokenizer import NoTokenizer, TokenizerLike

ByteStyle = Literal["byte_level", "byte_fallback", "raw_bytes", "none"]


def _byte_table() -> dict[str, int]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + k): b for k, b in enumerate(rest)}


BYTE_OF_CHAR = _byte_table()
"""Byte of each stand-in character in byte-level vocabularies: printable Latin-1 as is, the rest from U+0100 on."""


@dataclass(frozen=True)
class Codec(abc.ABC):
    """What the analysis needs from a tokenizer.

    Attributes:
        raw: vocabulary string of each id; None where an id below the largest has no token.
        special: ids that the tokenizer itself marks as special.
        style: how bytes are written in the vocabulary; "raw_bytes" are characters of the same number (ByT5).
    """

    raw: tuple[str | None, ...]
    special: frozenset[int]
    style: ByteStyle

    @abc.abstractmethod
    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids, special tokens included."""

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; nothing is added in front or behind."""

    @abc.abstractmethod
    def normalize(self, text: str) -> str:
        """The text after the tokenizer's own normalisation."""

    @property
    def marks(self) -> tuple[str, str]:
        """Marks that decoding leaves in the text: before a piece that continues a word, behind one that ends it."""
        return "", ""

    def digest(self) -> str:
        """Twelve hex digits of everything that encoding depends on, as far as it is known."""
        return _hash(json.dumps([self.raw, sorted(self.special)]))


@dataclass(frozen=True)
class FastCodec(Codec):
    """A `tokenizers.Tokenizer`, copied, without truncation or padding."""

    backend: Any

    @classmethod
    def of(cls, backend: Any, special: Sequence[int] = ()) -> FastCodec:
        """Wraps a copy: the caller's truncation and padding settings stay as they are."""
        from tokenizers import Tokenizer

        text = backend.to_str()
        copy = Tokenizer.from_str(text)
        copy.no_truncation()
        copy.no_padding()
        marked = {i for i, token in copy.get_added_tokens_decoder().items() if token.special}
        raw = _by_id(copy.get_vocab(with_added_tokens=True))
        return cls(raw, frozenset(marked | set(special)), _style(text), copy)

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids."""
        return self.backend.decode_batch([list(row) for row in rows], skip_special_tokens=False)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def normalize(self, text: str) -> str:
        """The text after the tokenizer's own normalisation."""
        return text if self.backend.normalizer is None else self.backend.normalizer.normalize_str(text)

    @property
    def marks(self) -> tuple[str, str]:
        """The marks of the model, where there is no decoder."""
        if self.backend.decoder is not None:
            return "", ""
        model = self.backend.model
        return getattr(model, "continuing_subword_prefix", None) or "", getattr(model, "end_of_word_suffix", None) or ""

    def digest(self) -> str:
        """Twelve hex digits of the whole tokenizer."""
        return _hash(self.backend.to_str())


@dataclass(frozen=True)
class SlowCodec(Codec):
    """A Hugging Face tokenizer without a `tokenizers` backend: the same answers, one text at a time."""

    tokenizer: TokenizerLike

    @classmethod
    def of(cls, tokenizer: TokenizerLike) -> SlowCodec:
        """Wraps the tokenizer as it is."""
        raw = _by_id(tokenizer.get_vocab())
        codec = cls(
            raw, frozenset(tokenizer.all_special_ids), "byte_fallback" if "<0x41>" in raw else "none", tokenizer
        )
        return codec if codec.style != "none" else dataclasses.replace(codec, style=codec._style_by_decoding())

    def _style_by_decoding(self) -> ByteStyle:
        """Whether the stand-ins of bytes that can't be printed, such as Ġ for a space, decode to these bytes."""
        ids = {token: i for i, token in enumerate(self.raw)}
        known = [(byte, ids[char]) for char, byte in BYTE_OF_CHAR.items() if byte <= 0x20 and char in ids]
        back = self.decode([[i] for _, i in known])
        same = sum(text == chr(byte) for (byte, _), text in zip(known, back, strict=True))
        if same <= len(known) / 2:
            return "raw_bytes" if self.encode(["é"]) == [[ids.get(chr(b), -1) for b in "é".encode()]] else "none"
        return "byte_level"

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [self.tokenizer.decode(list(row), **options) for row in rows]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [list(self.tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    def normalize(self, text: str) -> str:
        """The text as it is: what such a tokenizer normalises is not known."""
        return text


def codec_of(tokenizer: TokenizerLike) -> Codec:
    """The codec of a loaded Hugging Face tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
    if backend is not None and hasattr(backend, "get_added_tokens_decoder"):
        return FastCodec.of(backend, tokenizer.all_special_ids)
    return SlowCodec.of(tokenizer)


_ANCHOR = "abcdef"


@functools.lru_cache(maxsize=4)
def token_bytes(tokenizer: TokenizerLike) -> tuple[bytes, ...]:
    """What each token id adds to a text, in bytes; empty for ids without a token.

    A leading space is part of the token (`▁the` and `Ġthe` are both `b" the"`), half a character is its bytes, and a
    special token is the text that it is shown as. Nothing where there is no tokenizer.
    """
    return () if isinstance(tokenizer, NoTokenizer) else bytes_of(codec_of(tokenizer))


def bytes_of(codec: Codec) -> tuple[bytes, ...]:
    """The same from a codec."""
    found: list[bytes | None] = [_written_bytes(raw, codec.style) for raw in codec.raw]
    open_ids = [i for i, known in enumerate(found) if known is None]
    # Alone, a sentencepiece token would lose its space, so every token is read behind the same text.
    anchor = codec.encode([_ANCHOR])[0]
    (start,) = codec.decode([anchor])
    for i, text in zip(open_ids, codec.decode([[*anchor, i] for i in open_ids]), strict=True):
        found[i] = (text.removeprefix(start) if text.startswith(start) else codec.raw[i] or "").encode()
    return tuple(known or b"" for known in found)


def _written_bytes(raw: str | None, style: ByteStyle) -> bytes | None:
    """The bytes that the vocabulary string itself spells out, or None where only decoding can tell."""
    if raw is None:
        return b""
    if style == "raw_bytes" and len(raw) == 1 and raw < "\u0100":
        return bytes([ord(raw)])
    if style == "byte_level":
        return bytes(BYTE_OF_CHAR[c] for c in raw) if all(c in BYTE_OF_CHAR for c in raw) else None
    if style == "byte_fallback" and len(raw) == 6 and raw.startswith("<0x") and raw.endswith(">"):
        return bytes([int(raw[3:5], 16)])
    return None


def codec_in(path: Path) -> Codec:
    """The codec of a model folder or a .gguf file.

    Raises:
        MissingFileError: if the folder holds no tokenizer.
        CorruptFileError: if a GGUF file is damaged.
    """
    if path.is_dir() and (path / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        codec = FastCodec.of(Tokenizer.from_file(str(path / "tokenizer.json")))
        return dataclasses.replace(codec, special=codec.special | _marked(path, codec.raw))
    if path.suffix == ".gguf":
        return codec_of_gguf(read_gguf(path))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise MissingFileError(
            f"The tokenizer of {path} could not be read ({str(error).strip().splitlines()[0]}). "
            "A folder needs a tokenizer.json; save the tokenizer there with save_pretrained."
        ) from error
    return codec_of(tokenizer)


def codec_of_gguf(file: GGUFFile) -> Codec:
    """The codec of a GGUF file whose header is read already."""
    backend, _ = gguf_backend(file)
    return FastCodec.of(backend)


def _marked(path: Path, raw: Sequence[str | None]) -> frozenset[int]:
    """Ids that the files beside tokenizer.json name as special, as loading the tokenizer would mark them."""
    ids = {token: i for i, token in enumerate(raw)}
    found: set[int | None] = set()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).is_file():
            settings = load_json(path / name, dict, foreign=True)
            found |= {ids.get(token) for token in _special_names(settings)}
            added = settings.get("added_tokens_decoder", {})
            found |= {int(i) for i, token in added.items() if token.get("special")}
    return frozenset(i for i in found if i is not None and i < len(raw))


def _special_names(settings: dict[str, Json]) -> Iterator[str]:
    """Texts of the special tokens in a file: eos_token and others, and lists of more."""
    for name, value in settings.items():
        if name.endswith("_token"):
            listed = [value]
        elif name in ("additional_special_tokens", "extra_special_tokens"):
            listed = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        else:
            continue
        for token in listed:
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                yield text


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _by_id(vocab: dict[str, int]) -> tuple[str | None, ...]:
    if not vocab:
        raise InvalidInputError("The tokenizer has an empty vocabulary. Save the tokenizer that belongs to the model.")
    raw: list[str | None] = [None] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        raw[i] = token
    return tuple(raw)


def _style(tokenizer_json: str) -> ByteStyle:
    settings = json.loads(tokenizer_json)
    if settings["model"].get("byte_fallback"):
        return "byte_fallback"
    stages = json.dumps([settings["pre_tokenizer"], settings["decoder"]])
    return "byte_level" if '"ByteLevel"' in stages else "none"
