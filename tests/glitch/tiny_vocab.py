"""Tiny byte-level and SentencePiece-like tokenizers, and model folders with nothing but token matrices."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

SPECIAL = "<|end|>"
N_UNUSED = 6
WORDS = ("alpha", "bravo", "candle", "delta", "ember", "forest", "glacier", "harbor", "island", "zephyr", "keeper")


def _merges(space: str, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every word from its letters, then with the space in front of it."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left = word[0]
        for char in word[1:]:
            merges[left, char] = None
            left += char
            vocab.setdefault(left, len(vocab))
    for word in WORDS:
        merges[space, word] = None
        vocab[space + word] = len(vocab)
    return list(merges)


def byte_level(missing: tuple[str, ...] = (), special_first: bool = True) -> Tokenizer:
    """Byte-level BPE: bytes without `missing` stand-ins, words with and without leading space, reserved names."""
    vocab = {SPECIAL: 0} if special_first else {}
    for char in sorted(pre_tokenizers.ByteLevel.alphabet()):
        if char not in missing:
            vocab[char] = len(vocab)
    merges = _merges("Ġ", vocab)
    for k in range(N_UNUSED):
        vocab[f"<unused{k}>"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    tokenizer.add_tokens([AddedToken(f"<unused{k}>", special=False) for k in range(N_UNUSED)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Byte fallback, a space put in front of every text, spaces written as ▁ (as Llama 2)."""
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    for char in "▁abcdefghijklmnopqrstuvwxyz«»":
        vocab[char] = len(vocab)
    merges = _merges("▁", vocab)
    vocab["zq"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def matrix(n_rows: int, unused: list[int], seed: int = 0, width: int = 24, noise: float = 0.02) -> Tensor:
    """Random rows; the unused ones lie together along one direction."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_rows, width, generator=generator)
    direction = torch.randn(width, generator=generator)
    rows[unused] = direction + noise * torch.randn(len(unused), width, generator=generator)
    return rows


def folder(
    path: Path, tokenizer: Tokenizer, tensors: dict[str, Tensor], *, tied: bool | None = True, shards: int = 1
) -> Path:
    """A model folder as far as a weights-only scan reads it."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"model_type": "llama"} | ({} if tied is None else {"tie_word_embeddings": tied})
    (path / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name].clone() for name in names}, path / "model.safetensors")
        return path
    where = {name: f"model-{k % shards:05d}.safetensors" for k, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name].clone() for name in names if where[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
