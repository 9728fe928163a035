"""Model folders that are incomplete, damaged or not for this machine: one error in words, never a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_hf, tiny_tokenizer
from workbench import cli
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    ModelUnavailableError,
    WorkbenchError,
)
from workbench.models.loading import load_model
from workbench.models.weights import require_every_weight

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny_hf().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "m")


def config(**changed: Any) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})

    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def index(content: Callable[[dict[str, str]], Any]) -> Damage:
    """The weights as one shard with an index."""

    def damage(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / WEIGHTS), "shard.safetensors")
        (folder / WEIGHTS).rename(folder / "shard.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": content(names)}))

    return damage


def module_instead(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(torch.nn.Linear(2, 2), folder / "pytorch_model.bin")


def fill(name: str, value: float) -> Damage:
    return tensors(lambda t: {**t, name: torch.full_like(t[name], value)})


UP, HEAD = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (tensors(lambda t: {k: v for k, v in t.items() if k != UP}), MismatchError, f"1 weights are missing.*{UP}"),
        (config(num_hidden_layers=2), MismatchError, r"are in its files and not in .*layers\.2"),
        (config(num_hidden_layers=4), MismatchError, r"missing.*layers\.3"),
        (config(tie_word_embeddings=False), MismatchError, r"missing.*lm_head"),
        (config(vocab_size=300), MismatchError, r"\(258, 16\) in the file, \(300, 16\)"),
        (tensors(lambda t: {**t, HEAD: t[HEAD][:-1].clone()}), MismatchError, r"\(257, 16\) in the file"),
        (tensors(lambda t: {**t, "extra.weight": t[UP].clone()}), MismatchError, "not in a LlamaForCausalLM.*extra"),
        (tensors(lambda t: {**t, f"{UP}_scale": torch.ones(1)}), MismatchError, "up_proj.weight_scale"),
        (fill(UP, float("nan")), CorruptFileError, f"{UP} holds NaN"),
        (fill(UP, -float("inf")), CorruptFileError, f"{UP} holds NaN or infinite"),
        (tensors(lambda t: {**t, UP: t[UP].to(torch.complex64)}), CorruptFileError, f"{UP} is stored as C64"),
        (tensors(lambda t: {**t, UP: t[UP].to(torch.int8)}), CorruptFileError, f"{UP} is stored as I8"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), ModelUnavailableError, "not fully cov"),
        (lambda f: (f / WEIGHTS).write_bytes(b"garbage" * 99), ModelUnavailableError, "header"),
        (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), ModelUnavailableError, "no file named"),
        (module_instead, ModelUnavailableError, r"a pickled torch\.nn\.modules\.linear\.Linear, and loading it"),
        (index(lambda names: {**names, "x": "gone.safetensors"}), CorruptFileError, "gone.safetensors, which is not"),
        (index(lambda names: {**names, "x": "../m/shard.safetensors"}), CorruptFileError, "outside its folder"),
        (index(lambda names: dict.fromkeys(names, 3)), CorruptFileError, "weight_map"),
        (text(CONFIG, "{nope"), CorruptFileError, "is not JSON"),
        (text(CONFIG, '{"a":' * 5000), WorkbenchError, "config.json|could not be loaded"),
        (text(CONFIG, "[1]"), ModelUnavailableError, "could not be loaded"),
        (config(hidden_size="16"), ModelUnavailableError, "hidden_size.*expected int"),
        (config(intermediate_size=-4), ModelUnavailableError, "negative dimension"),
        (config(num_attention_heads=0), ModelUnavailableError, "ZeroDivisionError"),
        (config(hidden_size=10**9), MismatchError, r"its files hold 44\d{3} bytes"),
        (config(num_hidden_layers=10**12), MismatchError, "describes 1,000,000,000,000 layers"),
        (config(vocab_size=10**30), WorkbenchError, "a number has 31 digits|could not be loaded"),
        (config(hidden_act="nonsense"), ModelUnavailableError, "nonsense"),
        (text("generation_config.json", "["), CorruptFileError, "generation_config.json is not JSON"),
        (text("tokenizer.json", "{}"), ModelUnavailableError, "could not be loaded"),
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), ModelUnavailableError, "needs a package"),
        (config(quantization_config={"quant_method": "hqq"}), ModelUnavailableError, "needs a package"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(
    folder: Path, damage: Damage, error: type[Exception], says: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=says) as raised:
        load_model(folder, dtype="float32", check=False)
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    [
        tensors(lambda t: {**t, "lm_head.weight": t[HEAD].clone()}),
        tensors(lambda t: {name.removeprefix("model."): value for name, value in t.items()}),
        tensors(lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        tensors(lambda t: {**t, "vision_tower.blocks.0.weight": torch.ones(2), "model.visual.x": torch.ones(1),
                           "mtp.layers.0.weight": torch.ones(1), "v_head.summary.weight": torch.ones(1)}),
        lambda f: (config(num_nextn_predict_layers=1)(f),
                   tensors(lambda t: {**t, "model.layers.3.eh_proj.weight": torch.ones(2)})(f)),
        index(lambda names: names),
    ],
)  # fmt: skip
def test_what_stands_beside_the_language_model_is_no_reason_to_refuse_it(
    whole: Path, folder: Path, damage: Damage
) -> None:
    damage(folder)
    ids = torch.arange(6)[None]
    want = load_model(whole, dtype="float32", check=False).logits(ids)
    assert torch.equal(load_model(folder, dtype="float32", check=False).logits(ids), want)


def test_constants_that_old_checkpoints_hold_are_not_weights() -> None:
    hf = tiny_hf("gpt2")
    constants = ["h.1.attn.bias", "h.1.attn.attention.masked_bias", "h.1.attn.rotary_emb.inv_freq"]
    loaded = {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": constants}
    require_every_weight(hf, loaded, "m")
    hf.lm_head.bias = torch.nn.Parameter(torch.tensor([0.0, -float("inf")]))  # rules a token out
    require_every_weight(hf, loaded, "m")
    with pytest.raises(MismatchError, match="c_attn.bias"):
        require_every_weight(hf, {**loaded, "unexpected_keys": ["h.7.attn.c_attn.bias"]}, "m")


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense", ""])
def test_a_device_that_is_not_there_is_refused(whole: Path, device: str) -> None:
    with pytest.raises(InvalidInputError, match="this machine has cpu"):
        load_model(whole, device=device)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_a_type_that_no_model_runs_in_is_refused(whole: Path, dtype: torch.dtype) -> None:
    with pytest.raises(InvalidInputError, match="use 'auto', 'float32'"):
        load_model(whole, dtype=dtype)


def test_a_missing_quantiser_is_one_line_at_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(folder)
    assert cli.main(["sites", "--model", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.strip().splitlines()) == 1
    assert "bitsandbytes" in printed.err


def test_a_name_without_an_owner_is_found_in_the_local_cache(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--tiny"
    shutil.copytree(whole, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = load_model("tiny", dtype="float32")
    assert model.name == "tiny" and model.fingerprint == load_model(whole, dtype="float32").fingerprint
    assert model.tokens("ab").n_tokens == 2
    with pytest.raises(MissingFileError, match=r"'tiney'.*local cache"):
        load_model("tiney")


def test_a_model_that_is_loaded_already_is_wrapped_as_it_is(whole: Path) -> None:
    hf = tiny_hf().requires_grad_(True).train()
    model = load_model(hf, tokenizer=tiny_tokenizer())
    assert model.hf is hf and not hf.training and model.tokens("ab").n_tokens == 2
    assert not any(parameter.requires_grad for parameter in hf.parameters()), "as any loaded model"
    assert load_model(hf).tokenizer.__class__.__name__ == "NoTokenizer"
    half = load_model(tiny_hf(), tokenizer=whole, dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and half.tokens("ab").n_tokens == 2
    assert load_model(whole, tokenizer=tiny_tokenizer(), dtype="float32").tokens("ab").n_tokens == 2
