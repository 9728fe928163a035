from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.glitch.tiny_vocab import EMBED, HEAD, byte_level, folder, matrix
from tests.tiny import tiny_hf
from workbench.core.errors import CorruptFileError, MissingFileError, UnknownNameError
from workbench.glitch.ranking import weights

E, H = matrix(50, []), matrix(50, [], seed=1)


def _write(path: Path, tensors: dict[str, torch.Tensor], **options: object) -> Path:
    return folder(path, byte_level(), tensors, **options)  # type: ignore[arg-type]


def test_blocks_and_rows_give_the_matrix_back(tmp_path: Path) -> None:
    found = weights.in_folder(_write(tmp_path, {EMBED: E})).E_out
    assert torch.equal(torch.cat([block for _, block in found.blocks(7)]), E)
    assert torch.equal(found.rows([3, 49, 3]), E[[3, 49, 3]])


def test_half_precision_is_read_as_fp32(tmp_path: Path) -> None:
    found = weights.in_folder(_write(tmp_path, {EMBED: E.bfloat16()})).E_out
    assert found.stored == "BF16" and torch.equal(found.rows(range(50)), E.bfloat16().float())


@pytest.mark.parametrize(
    ("tensors", "says", "tied"),
    [
        ({EMBED: E}, True, True),
        ({EMBED: E}, None, True),
        ({EMBED: E, HEAD: H}, False, False),
        ({EMBED: E, HEAD: H}, None, False),
        ({EMBED: E, HEAD: H}, True, True),  # transformers ties them on loading, whatever the file holds
        ({EMBED: E, HEAD: E.clone()}, False, True),
        ({"transformer.wte.weight": E, "transformer.wpe.weight": H}, None, True),
        ({"gpt_neox.embed_in.weight": E, "embed_out.weight": H}, False, False),
    ],
)
def test_tied_or_not(tmp_path: Path, tensors: dict[str, torch.Tensor], says: bool | None, tied: bool) -> None:
    found = weights.in_folder(_write(tmp_path, tensors, tied=says))
    assert found.tied is tied
    assert torch.equal(found.E_in.rows(range(50)), E)
    assert torch.equal(found.E_out.rows(range(50)), E if tied else H)


def test_other_tables_of_a_multimodal_model_are_not_taken(tmp_path: Path) -> None:
    names = {
        "model.language_model.embed_tokens.weight": E, "model.vision_tower.embeddings.weight": H,
        "model.language_model.embed_tokens_per_layer.weight": H, "model.language_model.layers.0.mlp.output.weight": H,
    }  # fmt: skip
    found = weights.in_folder(_write(tmp_path, names, tied=True))
    assert found.E_in.name == "model.language_model.embed_tokens.weight"


def test_a_bias_is_found_and_shards_are_followed(tmp_path: Path) -> None:
    bias = torch.arange(50.0)
    found = weights.in_folder(_write(tmp_path, {EMBED: E, HEAD: H, "lm_head.bias": bias}, tied=False, shards=3))
    assert found.bias is not None and torch.equal(found.bias, bias)
    assert torch.equal(found.E_out.rows([1]), H[[1]]) and torch.equal(found.E_in.rows([1]), E[[1]])


def test_a_promised_head_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="tie_word_embeddings=false"):
        weights.in_folder(_write(tmp_path, {EMBED: E}, tied=False))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="found 0"):
        weights.in_folder(_write(tmp_path / "none", {"some.other.weight": E}))
    with pytest.raises(UnknownNameError, match="found 2"):
        weights.in_folder(_write(tmp_path / "two", {EMBED: E, "other.embed_tokens.weight": E}))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(MissingFileError, match=r"pytorch_model\.bin"):
        weights.in_folder(tmp_path / "pickled")
    broken = _write(tmp_path / "broken", {EMBED: E})
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CorruptFileError, match="safetensors"):
        weights.in_folder(broken)
    with pytest.raises(MissingFileError, match="GGUF"):
        weights.in_gguf(tmp_path / "absent.gguf")


def test_an_index_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    save_file({EMBED: E}, tmp_path / "secret.safetensors")
    inside = _write(tmp_path / "m", {EMBED: E})
    index = {"weight_map": {EMBED: "../secret.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="secret"):
        weights.in_folder(inside)


def test_gguf_blocks_are_dequantised(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    rows = matrix(40, [], width=64).numpy()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", gguf.quantize(rows, gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = weights.in_gguf(tmp_path / "m.gguf")
    assert found.tied and (found.E_in.n_rows, found.E_in.width, found.E_in.stored) == (40, 64, "Q8_0")
    read = torch.cat([block for _, block in found.E_in.blocks(9)]).numpy()
    assert np.abs(read - rows).max() <= np.abs(rows).max() / 127
    assert torch.equal(found.E_in.rows([39]), torch.from_numpy(read[[39]]))


def test_a_loaded_model_is_read_in_place() -> None:
    tied, untied = tiny_hf("llama"), tiny_hf("neox")
    assert weights.in_memory(tied).tied and not weights.in_memory(untied).tied
    assert torch.equal(weights.in_memory(untied).E_out.rows([5]), untied.lm_head.weight.detach()[[5]])
