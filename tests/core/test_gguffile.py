"""GGUF files: header, tokenizer, conversion and its cache; damaged ones are refused in one line."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from workbench.core.codec import codec_in
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MismatchError,
    ModelUnavailableError,
    WorkbenchError,
)
from workbench.core.gguffile import gguf_tokenizer, read_gguf
from workbench.glitch.ranking.weights import in_gguf
from workbench.models.embedded import made_once
from workbench.models.loading import load_model, load_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<bos>", "<eos>", *ALPHABET, ALPHABET[0] * 2]
D = 64


def write(
    path: Path,
    seed: int = 0,
    kind: str = "gpt2",
    pre: str = "gpt-2",
    drop: str = "",
    block: int = 0,
    **fields: int | bool,
) -> Path:
    """A llama of one block with every tensor random; `fields` are added to the tokenizer's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer, rng = gguf.GGUFWriter(str(path), "llama"), np.random.default_rng(seed)
    for set_to, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, D),
        (writer.add_feed_forward_length, 96), (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
        (writer.add_rope_dimension_count, 16), (writer.add_vocab_size, len(TOKENS)),
    ):  # fmt: skip
        set_to(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges([f"{ALPHABET[0]} {ALPHABET[0]}"])
    for name, value in {"bos_token_id": 0, "eos_token_id": 1, **fields}.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{name}", value)
    shapes = {"token_embd": (len(TOKENS), D), "output": (len(TOKENS), D), "output_norm": (D,)} | {
        f"blk.{block}.{name}": shape
        for name, shape in {
            "attn_q": (D, D), "attn_k": (D, D), "attn_v": (D, D), "attn_output": (D, D), "attn_norm": (D,),
            "ffn_gate": (96, D), "ffn_up": (96, D), "ffn_down": (D, 96), "ffn_norm": (D,),
        }.items()
    }  # fmt: skip
    for name, shape in shapes.items():
        if name != drop:
            writer.add_tensor(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def test_the_header_is_that_of_the_gguf_package(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert ours.fields == {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tensor.data.shape and found.kind == tensor.tensor_type.name
        assert np.array_equal(found.rows(0, found.n_rows).reshape(found.shape), tensor.data)


def test_files_of_one_name_size_and_time_keep_their_own_weights(tmp_path: Path, cache: Path) -> None:
    a, b = write(tmp_path / "a" / "m.gguf", 1), write(tmp_path / "b" / "m.gguf", 2)
    for path in (a, b):
        os.utime(path, (1000, 1000))
    ids = torch.tensor([[5, 9, 70, 33]])
    first = load_model(a, dtype="float32", check=False).logits(ids)
    other = load_model(b, dtype="float32", check=False)
    assert not torch.allclose(first, other.logits(ids), atol=1.0)
    assert torch.equal(other.hf.get_input_embeddings().weight, in_gguf(b).E_in.rows(range(len(TOKENS))))
    before = b.stat()
    with b.open("r+b") as file:  # the same file with the same times, one float changed in place
        file.seek(read_gguf(b).tensors["token_embd.weight"].start)
        file.write(struct.pack("<f", 7.0))
    os.utime(b, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_model(b, dtype="float32", check=False).hf.get_input_embeddings().weight[0, 0] == 7.0
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 3


def test_a_folder_is_made_once_and_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    (tmp_path / ".converting-dead").mkdir()
    made: list[Path] = []

    def fill(built: Path) -> None:
        built.mkdir()
        time.sleep(0.05)
        made.append(built)

    threads = [threading.Thread(target=made_once, args=(tmp_path / "m", fill)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".converting.lock", "m"]
    with pytest.raises(ZeroDivisionError):
        made_once(tmp_path / "n", lambda built: built.mkdir() or 1 / 0)  # type: ignore[func-returns-value]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".converting.lock", "m"]


@pytest.mark.parametrize(
    ("fields", "adds"),
    [
        ({"pre": "llama-bpe"}, True),
        ({"pre": "tekken"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "gpt-2"}, False),
        ({"pre": "gpt-2", "add_bos_token": True}, True),
    ],
)
def test_bos_is_added_where_llama_cpp_adds_it(tmp_path: Path, fields: dict[str, Any], adds: bool) -> None:
    tokenizer = gguf_tokenizer(read_gguf(write(tmp_path / "m.gguf", **fields)))
    assert tokenizer("ab").input_ids == [0] * adds + [TOKENS.index("a"), TOKENS.index("b")]


def test_the_tokenizer_has_the_tokens_of_the_file_and_no_others(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "m.gguf", unknown_token_id=5)
    loaded = load_tokenizer(path)
    assert len(loaded) == len(codec_in(path).raw) == len(TOKENS)
    assert max(loaded("<|endoftext|><bos>").input_ids) < len(TOKENS)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id, loaded.pad_token_id) == (0, 1, 5, None)
    assert codec_in(path).special == {0, 1, 5}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw[:0], "empty"),
        (lambda raw: b"GGML" + raw[4:], "begins with"),
        (lambda raw: raw[:4] + b"\0\0\0\3" + raw[8:], "version"),
        (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], "tensors"),
        (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], "metadata"),
        (lambda raw: raw[:24] + b"\xff" * 8 + raw[32:], "claims a text"),
        (lambda raw: raw.replace(b"general.architecture", b"general.\xff\xffchitecture"), "utf-8"),
        (lambda raw: raw.replace(b"token_embd.weight", b"output.weight\0\0\0\0", 1)[:-1], "behind the end"),
        (lambda raw: raw[:1000], "byte|bytes"),
    ],
)
def test_a_damaged_header_is_one_line(tmp_path: Path, change: Any, says: str) -> None:
    path = write(tmp_path / "m.gguf")
    path.write_bytes(change(path.read_bytes()))
    for read in (read_gguf, in_gguf, codec_in):
        with pytest.raises(CorruptFileError, match=says) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_any_damaged_byte_of_the_header_is_read_or_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    start = min(tensor.start for tensor in read_gguf(tmp_path / "m.gguf").tensors.values())
    rng, path = random.Random(0), tmp_path / "damaged.gguf"
    for _ in range(60):
        raw = bytearray(whole)
        raw[rng.randrange(start)] = rng.randrange(256)
        path.write_bytes(raw[: rng.choice((len(raw), rng.randrange(len(raw))))])
        for read in (in_gguf, codec_in):
            try:
                read(path)
            except WorkbenchError as error:
                assert "\n" not in str(error)


def test_a_model_that_the_file_does_not_hold_whole_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(MismatchError, match=r"up_proj"):
        load_model(write(tmp_path / "m.gguf", drop="blk.0.ffn_up"))
    with pytest.raises(MismatchError, match="1 blocks.*block 1"):
        load_model(write(tmp_path / "m.gguf", block=1))
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama.", b"zzama.").replace(b"llama", b"zzama"))
    with pytest.raises(ModelUnavailableError, match="zzama"):
        load_model(path)
    with pytest.raises(InvalidInputError, match="'rwkv'"):
        codec_in(write(tmp_path / "m.gguf", kind="rwkv"))
    assert [entry.name for entry in cache.iterdir()] == [".converting.lock"]
