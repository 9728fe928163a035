"""The same planted rows in the layouts of real architectures, as a loaded model, a folder, shards and GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from tests.glitch.tiny_vocab import EMBED, HEAD, SPECIAL, byte_level, folder, matrix
from workbench.core.codec import FastCodec
from workbench.core.errors import InvalidInputError, MissingFileError
from workbench.glitch.ranking import weights
from workbench.glitch.scanning.glitch_report import GlitchReport
from workbench.glitch.scanning.scanner import ScanOptions, _weights_only, scan
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.model import Model
from workbench.models.tiny import tiny_hf

TOKENIZER = byte_level()
VOCABULARY = analyse(FastCodec.of(TOKENIZER))
N = len(VOCABULARY)
AT = TOKENIZER.token_to_id
PLANTED = [AT("Ġember"), AT("glacier"), AT("Ġzephyr")]
UNUSED = [*np.flatnonzero(VOCABULARY.reserved).tolist(), *range(N, N + 5), *PLANTED]
TOP = ScanOptions(percentile=3.0)


def _plant(hf: Any, width: int) -> Any:
    with torch.no_grad():
        hf.get_output_embeddings().weight.copy_(matrix(N + 5, UNUSED, width=width))
    return hf


def _check(report: GlitchReport) -> None:
    assert report.indicator in ("I_cos", "I_centred"), report.findings()
    assert set(report.candidates()[:3]) == set(PLANTED)
    assert {*range(N, N + 5)} <= {i for i in range(len(report.table)) if "padding rows" in report.table.group[i]}


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "gemma3", "qwen3", "phi3", "olmo2"])
def test_a_folder_and_the_loaded_model_give_the_same(family: str, tmp_path: Path) -> None:
    hf = _plant(tiny_hf(family, N + 5), 16)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token=SPECIAL)
    hf.save_pretrained(tmp_path, max_shard_size="20KB" if family in ("llama", "neox") else "1GB")
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (family in ("llama", "neox"))
    stored, loaded = scan(tmp_path, options=TOP), scan(Model(hf, tokenizer, name="m"), options=TOP)
    assert stored.tied == loaded.tied == (hf.get_output_embeddings().weight is hf.get_input_embeddings().weight)
    for report in (stored, loaded):
        _check(report)
    assert np.array_equal(stored.table.indicator, loaded.table.indicator, equal_nan=True)


def test_an_output_bias_is_read_from_folder_and_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "phi", vocab_size=N + 5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = _plant(AutoModelForCausalLM.from_config(config), 16)
    with torch.no_grad():
        hf.lm_head.bias.copy_(torch.arange(N + 5.0))
    hf.save_pretrained(tmp_path)
    stored, loaded = weights.in_folder(tmp_path), weights.in_memory(hf)
    assert stored.bias is not None and loaded.bias is not None and torch.equal(stored.bias, loaded.bias)
    _check(_weights_only("phi", stored, VOCABULARY, TOP))


def test_an_encoder_and_decoder_share_one_table(tmp_path: Path) -> None:
    rows = matrix(N + 5, UNUSED, width=16)
    hf = T5ForConditionalGeneration(T5Config(vocab_size=N + 5, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    with torch.no_grad():
        hf.shared.weight.copy_(rows)
    hf.save_pretrained(tmp_path / "saved")
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    apart = {f"{name}.weight": matrix(N + 5, [], seed=1, width=16) for name in names} | {HEAD: rows}
    for made, tied in ((tmp_path / "saved", True), (folder(tmp_path / "apart", TOKENIZER, apart, tied=False), False)):
        found = weights.in_folder(made)
        assert found.tied == tied and found.E_in.name == "shared.weight"
        _check(_weights_only("t5", found, VOCABULARY, TOP))


def test_a_classifiers_head_is_no_output_embedding(tmp_path: Path) -> None:
    rows = matrix(N + 5, UNUSED)
    tensors = {EMBED: rows, "head.weight": torch.ones(1, 24), "patch.embedding.weight": torch.ones(2, 3, 4, 4)}
    found = weights.in_folder(folder(tmp_path, TOKENIZER, tensors, tied=None))
    assert found.tied and found.E_out.n_rows == N + 5


def test_packed_integers_are_refused(tmp_path: Path) -> None:
    tensors = {EMBED: torch.ones(N, 3, dtype=torch.int32), "model.embed_tokens.scales": torch.ones(N, 1)}
    with pytest.raises(InvalidInputError, match="packed integers"):
        weights.in_folder(folder(tmp_path, TOKENIZER, tensors))


@pytest.mark.parametrize("nested", [True, False, None])
def test_what_a_nested_text_config_says_about_tying_counts(nested: bool | None, tmp_path: Path) -> None:
    rows, head = matrix(N, []), matrix(N, [], seed=1)
    made = folder(tmp_path, TOKENIZER, {EMBED: rows, HEAD: head}, tied=None)
    config = {} if nested is None else {"text_config": {"tie_word_embeddings": nested}}
    (made / "config.json").write_text(str(config).replace("'", '"').replace("True", "true").replace("False", "false"))
    assert weights.in_folder(made).tied is (nested is True)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e4])
def test_the_scale_of_the_rows_does_not_matter(scale: float, tmp_path: Path) -> None:
    rows = matrix(N + 5, UNUSED)
    report = scan(folder(tmp_path, TOKENIZER, {EMBED: rows * scale}), options=TOP)
    _check(report)
    base = scan(folder(tmp_path / "base", TOKENIZER, {EMBED: rows}), options=TOP)
    assert np.allclose(report.table.indicators["I_cos"], base.table.indicators["I_cos"], atol=1e-5)


def test_normalised_rows_switch_off_the_input_norm(tmp_path: Path) -> None:
    rows, head = (torch.nn.functional.normalize(matrix(N + 5, UNUSED, seed=k), dim=1) for k in (0, 1))
    report = scan(folder(tmp_path, TOKENIZER, {EMBED: rows, HEAD: head}, tied=False), options=TOP)
    _check(report)
    assert {s.indicator: s.auc for s in report.separations}["I_in"] < 0.9


def test_a_bad_input_row_is_reported_for_an_untied_model(tmp_path: Path) -> None:
    rows, head = matrix(N + 5, [], seed=1), matrix(N + 5, UNUSED)
    rows[7, 0], head[9, 3] = float("nan"), float("inf")
    report = scan(folder(tmp_path, TOKENIZER, {EMBED: rows, HEAD: head}, tied=False), options=TOP)
    assert report.bad_rows == (7, 9)
    _check(report)


def test_thousands_of_reserved_names_do_not_fill_the_list(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(f"<unused{k}>", special=False) for k in range(100, 3100)])
    n = tokenizer.get_vocab_size(with_added_tokens=True)
    rows = matrix(n, [*range(N, n), *PLANTED])
    report = scan(folder(tmp_path, tokenizer, {EMBED: rows}))
    assert set(report.candidates()[:3]) == set(PLANTED) and len(report.candidates()) <= 5
    assert int(report.table.reserved.sum()) == 3006 and not report.table.ordinary[N:].any()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_quantised_rows_keep_the_order(kind: str, tmp_path: Path) -> None:
    import gguf

    rows = matrix(N + 5, UNUSED, width=64, noise=0.0).numpy()
    made = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", gguf.quantize(rows, made), raw_dtype=made)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = weights.in_gguf(tmp_path / "m.gguf")
    report = _weights_only("gguf", found, VOCABULARY, TOP)
    _check(report)
    assert report.identical == (tuple(sorted(UNUSED)),)


def _gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for name, rows in tensors.items():
        writer.add_tensor(name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_head_in_another_part_of_a_split_gguf_is_found(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-{k:05d}-of-00002.gguf" for k in (1, 2))
    _gguf(first, {"token_embd.weight": matrix(40, []).numpy()})
    with pytest.raises(MissingFileError, match="all its parts"):
        weights.in_gguf(first)
    _gguf(second, {"output.weight": matrix(40, [], seed=1).numpy()})
    for part in (first, second):
        assert not weights.in_gguf(part).tied
