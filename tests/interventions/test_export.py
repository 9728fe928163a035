from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import D_MODEL, FP32_LOGITS, N_LAYERS, n_hooks, tiny_model, tiny_tokenizer
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    EditError,
    InvalidInputError,
    MissingFileError,
    NotExactlyExportable,
    ShapeError,
)
from workbench.interventions.everywhere import ablate_everywhere
from workbench.interventions.export.lora import merge_lora
from workbench.interventions.gates import CosineGate, When
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op
from workbench.interventions.ops import Add, AddScaled, Affine, LowRank, Map, ProjectOut
from workbench.interventions.replacing import Ablate, Patch, Replace
from workbench.interventions.scopes import All, Generated, Last, Prompt, Scope
from workbench.interventions.shapes import Cap, ClampProjection, NormPreserve, Rotate, Threshold
from workbench.models.model import Model
from workbench.models.tiny import TINY

IDS = torch.arange(10, 22).view(2, 6)
GENERATOR = torch.Generator().manual_seed(3)
V = torch.randn(2, D_MODEL, generator=GENERATOR)
MATRIX = torch.randn(D_MODEL, D_MODEL, generator=GENERATOR)
PLAIN = ("llama", "gpt2", "neox", "neox_sequential", "qwen2", "qwen3", "phi3", "mistral")
POST_NORM = ("gemma2", "gemma3", "olmo2")
at = Intervention.at


@torch.no_grad()
def edited_logits(model: Model, intervention: Intervention) -> torch.Tensor:
    with model.plan(intervention):
        return model.hf(IDS, use_cache=False).logits


@torch.no_grad()
def logits(hf: Any) -> torch.Tensor:
    return hf(IDS, use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=FP32_LOGITS, rtol=0)


def tied_llama(**changes: Any) -> Model:
    """A Llama without biases, tied like the small models that are used most."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, sizes = TINY["llama"]
    config = AutoConfig.for_model(
        model_type, **{**sizes, "attention_bias": False, **changes}, vocab_size=len(tiny_tokenizer())
    )
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in hf.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return Model(hf, tiny_tokenizer(), name="tied")


# Weights.


@pytest.mark.parametrize("family", PLAIN)
def test_weights_of_ablation_everywhere_equal_the_hooks_and_hold_nothing_of_the_directions(family: str) -> None:
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.hf.named_parameters()}
    intervention = ablate_everywhere(model.site_map, V)
    done = model.export(intervention, "weights")
    close(logits(done.hf), edited_logits(model, intervention))
    assert done.max_difference < 1e-4 < 0.1 < done.effect
    stream = Model(done.hf, model.tokenizer).capture(IDS, [f"resid_post.{i}" for i in range(N_LAYERS)])
    assert all(float((stream[f"resid_post.{i}"] @ V.T).abs().max()) < 1e-4 for i in range(N_LAYERS))
    for name, parameter in model.hf.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} of the original changed"
    assert n_hooks(model.hf) == n_hooks(done.hf) == 0


def test_the_folded_matrices_are_those_of_the_formula() -> None:
    model = tiny_model("llama")
    r = V[0] / V[0].norm()
    copy = model.export(ablate_everywhere(model.site_map, 7 * V[0]), "weights").hf
    old, new = model.hf.model.layers[1].self_attn.o_proj, copy.model.layers[1].self_attn.o_proj
    torch.testing.assert_close(new.weight, old.weight - torch.outer(r, r @ old.weight), atol=1e-6, rtol=0)
    torch.testing.assert_close(new.bias, old.bias - r * (r @ old.bias), atol=1e-6, rtol=0)
    rows, kept = copy.model.embed_tokens.weight, model.hf.model.embed_tokens.weight
    torch.testing.assert_close(rows, kept - torch.outer(kept @ r, r), atol=1e-6, rtol=0)
    assert copy.model.layers[1].mlp.down_proj.bias is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_embeddings_are_untied_and_the_unembedding_stays(family: str) -> None:
    model = tiny_model(family)
    assert model.hf.get_output_embeddings().weight is model.hf.get_input_embeddings().weight
    intervention = ablate_everywhere(model.site_map, V)
    done = model.export(intervention, "weights")
    assert torch.equal(done.hf.get_output_embeddings().weight, model.hf.get_output_embeddings().weight)
    assert model.hf.get_output_embeddings().weight is model.hf.get_input_embeddings().weight
    assert not done.hf.config.tie_word_embeddings
    assert model.hf.config.tie_word_embeddings
    assert "tied" in str(done)
    # Folding in place into tied weights also changes the unembedding.
    done.hf.get_output_embeddings().weight = done.hf.get_input_embeddings().weight
    assert float((logits(done.hf) - edited_logits(model, intervention)).abs().max()) > 0.05


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize(
    "site", ["embed", "resid_pre.0", "resid_pre.2", "resid_post.1", "resid_post.-1", "attn_out.1", "mlp_out.2"]
)
def test_a_constant_becomes_a_bias_or_embedding_rows(family: str, site: str) -> None:
    model = tiny_model(family)
    intervention = at(site, Add(V[0], 2.0))
    copy = model.export(intervention, "weights").hf
    wanted = edited_logits(model, intervention)
    close(logits(copy), wanted)
    neighbour = edited_logits(model, at("resid_post.0", Add(V[0], 2.0)))
    assert float((logits(copy) - neighbour).abs().max()) > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "mistral"])
@pytest.mark.parametrize("site", ["attn_out.1", "mlp_out.0"])
@pytest.mark.parametrize(
    "op",
    [
        Affine(MATRIX, V[0]),
        LowRank(V, MATRIX[:2], torch.tensor([1.0, -2.0])),
        ProjectOut(V),
        Ablate(),
        Ablate("mean", V[1]),
        Ablate("mean", V[1], directions=V[0]),
        Replace(V[0]),
        ClampProjection(V[0], 3.0),
        AddScaled(V[0], 2.0, size=1.5),
    ],
    ids=lambda op: op.name,
)
def test_affine_edits_of_what_a_sublayer_adds_are_folded(family: str, site: str, op: Op) -> None:
    model = tiny_model(family)
    intervention = at(site, op)
    close(logits(model.export(intervention, "weights").hf), edited_logits(model, intervention))


def test_edits_of_one_place_keep_their_order() -> None:
    model = tiny_model("gpt2")
    one = at("mlp_out.1", Add(V[0])) + at("mlp_out.1", ProjectOut(V[0])) + at("mlp_out.1", Affine(MATRIX))
    other = at("mlp_out.1", Affine(MATRIX)) + at("mlp_out.1", ProjectOut(V[0])) + at("mlp_out.1", Add(V[0]))
    folded = logits(model.export(one, "weights").hf)
    close(folded, edited_logits(model, one))
    assert float((folded - edited_logits(model, other)).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["weights", "lora", "hook"])
def test_edits_of_low_rank_read_what_the_one_before_wrote(kind: str, tmp_path: Path) -> None:
    model = tiny_model("neox")
    one, other = LowRank(V, MATRIX[:2], torch.tensor([1.0, -2.0])), LowRank(MATRIX[2:5], MATRIX[5:8])
    intervention = at("attn_out.1", one) + at("attn_out.1", other)
    wanted = edited_logits(model, intervention)
    assert float((wanted - edited_logits(model, at("attn_out.1", other) + at("attn_out.1", one))).abs().max()) > 0.01
    done = model.export(intervention, kind, tmp_path / "out")
    if kind == "weights":
        close(logits(done.hf), wanted)
    elif kind == "lora":
        with merge_lora(model.hf, tmp_path / "out"):
            close(logits(model.hf), wanted)
    assert done.max_difference < FP32_LOGITS


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_additions_to_a_stream_that_is_ablated_everywhere(family: str) -> None:
    model = tiny_model(family)
    everywhere = ablate_everywhere(model.site_map, V[0])
    for extra in (at("resid_post.1", Add(V.sum(0))), at("mlp_out.0", Add(V.sum(0))), at("resid_pre.0", Add(V[0]))):
        for intervention in (everywhere + extra, extra + everywhere):
            close(logits(model.export(intervention, "weights").hf), edited_logits(model, intervention))


def without(intervention: Intervention, *sites: str) -> Intervention:
    return Intervention(tuple(edit for edit in intervention.edits if str(edit.site) not in sites))


def test_a_projection_is_foldable_exactly_when_every_read_of_the_stream_is_free_of_it() -> None:
    model = tiny_model("llama")
    everywhere = ablate_everywhere(model.site_map, V)
    for redundant in (["resid_pre.1"], ["resid_pre.2", "resid_pre.1"], ["mlp_out.0"]):
        kept = without(everywhere, *redundant)
        close(logits(model.export(kept, "weights").hf), edited_logits(model, kept))
    for needed in (["resid_pre.0"], ["attn_out.0"]):
        with pytest.raises(NotExactlyExportable, match="has read unedited"):
            model.export(without(everywhere, *needed), "weights")
    with pytest.raises(NotExactlyExportable, match=r"ProjectOut at resid_post.1 .*embed.*ablate_everywhere"):
        model.export(at("resid_post.1", ProjectOut(V)), "weights")
    # An edit of the last sublayer alone reads nothing afterwards, and still earlier layers have read the rest.
    with pytest.raises(NotExactlyExportable):
        model.export(at("resid_post.-1", ProjectOut(V)), "weights")


def test_an_addition_between_attention_and_mlp_is_a_bias_of_attention() -> None:
    model = tiny_model()
    close(
        logits(model.export(at("resid_mid.1", Add(V[0])), "weights").hf),
        edited_logits(model, at("resid_mid.1", Add(V[0]))),
    )
    with pytest.raises(NotExactlyExportable, match="has read unedited"):
        model.export(at("resid_mid.1", ProjectOut(V[0])), "weights")


REFUSED = [
    ("resid_post.1", Add(V), All(), "2 batch rows"),
    ("resid_post.1", Add(V[0]), Last(), r"Last\(\)"),
    ("mlp_out.1", Add(V[0]), Generated(), r"Generated\(\)"),
    ("mlp_out.1", Add(V[0]), Prompt() | Generated(), "Prompt"),
    ("mlp_out.1", When(CosineGate(V[0]), Add(V[1])), All(), "gate"),
    ("mlp_out.1", Cap(V[0], 1.0), All(), "affine"),
    ("mlp_out.1", ClampProjection(V[0], 1.0, "max"), All(), "affine"),
    ("mlp_out.1", Threshold(V[0], 1.0, 2.0), All(), "affine"),
    ("mlp_out.1", Rotate(V[0], 0.3), All(), "affine"),
    ("mlp_out.1", NormPreserve(Add(V[0])), All(), "affine"),
    ("mlp_out.1", AddScaled(V[0]), All(), "affine"),
    ("mlp_out.1", Map(torch.relu), All(), "affine"),
    ("mlp_out.1", Ablate("resample", V), All(), "affine"),
    ("mlp_out.1", Patch(torch.ones(2, 6, D_MODEL)), All(), "rows"),
    ("z.1", Add(V[0]), All(), "not on the residual stream"),
    ("final_norm", Add(V[0]), All(), "not on the residual stream"),
]


@pytest.mark.parametrize(("site", "op", "scope", "reason"), REFUSED)
@pytest.mark.parametrize("kind", ["weights", "lora"])
def test_what_has_no_weights_is_refused_with_the_edit_and_the_reason(
    site: str, op: Op, scope: Scope, reason: str, kind: str, tmp_path: Path
) -> None:
    model = tiny_model()
    with pytest.raises(NotExactlyExportable, match=reason) as caught:
        model.export(at(site, op, scope), kind, tmp_path / "out")
    assert site in str(caught.value)
    assert op.name in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", POST_NORM)
def test_families_with_a_norm_behind_the_writers_are_refused(family: str) -> None:
    model = tiny_model(family)
    for intervention in (
        at("resid_post.1", Add(V[0])),
        at("attn_out.1", Affine(MATRIX)),
        at("mlp_out.1", ProjectOut(V)),
    ):
        with pytest.raises(NotExactlyExportable, match="norm .* stands between"):
            model.export(intervention, "weights")
    with pytest.raises(NotExactlyExportable):
        model.export(ablate_everywhere(model.site_map, V), "weights")


def test_mixtures_of_experts_are_refused() -> None:
    with pytest.raises(NotExactlyExportable, match="mixture of experts"):
        tiny_model("mixtral").export(at("mlp_out.1", ProjectOut(V)), "weights")


@pytest.mark.parametrize(
    ("family", "site", "op"),
    [
        ("llama", "resid_post.1", Add(V[0])),
        ("llama", "attn_out.0", Affine(MATRIX, V[0])),
        ("gpt2", "resid_post.1", Add(V[0])),
        ("qwen3", "attn_out.1", Add(V[0])),
        ("neox", "mlp_out.1", Affine(MATRIX, V[0])),
        ("mistral", "resid_pre.0", Add(V[0])),
        ("mistral", "mlp_out.1", ProjectOut(V)),
    ],
)
def test_saved_weights_are_loaded_again_by_transformers(family: str, site: str, op: Op, tmp_path: Path) -> None:
    model = tiny_model(family)
    done = model.export(at(site, op), "weights", tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(logits(again), logits(done.hf))
    close(logits(again), edited_logits(model, at(site, op)))
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    with pytest.raises(InvalidInputError, match="not an empty folder"):
        model.export(at(site, op), "weights", tmp_path / "model")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_saved_ablation_everywhere_is_loaded_again_untied(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    intervention = ablate_everywhere(model.site_map, V)
    model.export(intervention, "weights", tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    close(logits(again), edited_logits(model, intervention))


def test_a_bias_that_the_config_cannot_declare_stays_in_memory(tmp_path: Path) -> None:
    model = tiny_model("mistral")
    intervention = at("resid_post.1", Add(V[0]))
    with pytest.raises(NotExactlyExportable, match=r"down_proj needs a bias.*MistralForCausalLM"):
        model.export(intervention, "weights", tmp_path / "model")
    done = model.export(intervention, "weights")
    close(logits(done.hf), edited_logits(model, intervention))
    assert "config can't declare" in str(done)
    assert not list(tmp_path.iterdir())


def test_every_export_is_held_against_the_edited_model() -> None:
    model = tiny_model()
    intervention = ablate_everywhere(model.site_map, V)
    with pytest.raises(NotExactlyExportable, match="logits differ by"):
        model.export(intervention, "weights", tolerance=1e-12)
    # A module that rescales what is written, in a way that no site map can know.
    model.hf.model.embed_tokens.register_forward_hook(lambda module, args, output: output.sign())
    with pytest.raises(NotExactlyExportable, match="logits differ by"):
        model.export(intervention, "weights")


def test_models_that_cannot_be_copied_as_they_are() -> None:
    model = tiny_model()
    intervention = at("resid_post.1", Add(V[0]))
    with model.plan(intervention):
        with pytest.raises(NotExactlyExportable, match="plans are active"):
            model.export(intervention, "weights")
        model.logits(IDS)
    with pytest.raises(DegenerateInputError, match="no edits"):
        model.export(Intervention(), "weights")
    with pytest.raises(InvalidInputError, match="Did you mean weights"):
        model.export(intervention, "weight")
    with pytest.raises(DegenerateInputError, match="no weight"):
        model.export(at("resid_post.1", Add(V[0], 0.0)), "lora", "adapter")
    with pytest.raises(InvalidInputError, match="writes a file"):
        model.export(intervention, "lora")
    model.hf.to(torch.bfloat16)
    with pytest.raises(NotExactlyExportable, match="float32"):
        model.export(intervention, "weights")


# LoRA.


@pytest.mark.parametrize("family", ["tied llama", "qwen2", "mistral", "phi3"])
def test_an_adapter_merged_and_unmerged(family: str, tmp_path: Path) -> None:
    model = tied_llama() if family == "tied llama" else tiny_model(family)
    intervention = ablate_everywhere(model.site_map, V)
    wanted, clean = edited_logits(model, intervention), logits(model.hf)
    parameters = dict(model.hf.named_parameters())
    done = model.export(intervention, "lora", tmp_path / "adapter")
    with merge_lora(model.hf, tmp_path / "adapter") as merged:
        close(logits(model.hf), wanted)
        assert len(merged.modules) == 2 * N_LAYERS + 1
    assert torch.equal(logits(model.hf), clean)
    assert all(parameter is parameters[name] for name, parameter in model.hf.named_parameters())
    assert ("tied" in str(done)) == (family == "tied llama")
    with pytest.raises(EditError, match="unmerged"), merged:
        pass


def test_the_adapter_has_the_names_and_shapes_that_peft_reads(tmp_path: Path) -> None:
    model = tied_llama()
    model.export(ablate_everywhere(model.site_map, V), "lora", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert "model.layers.2.mlp.down_proj" in config["target_modules"]
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    down = "base_model.model.model.layers.2.mlp.down_proj"
    assert shapes[f"{down}.lora_A.weight"] == (2, 24)
    assert shapes[f"{down}.lora_B.weight"] == (D_MODEL, 2)
    embed = "base_model.model.model.embed_tokens"
    assert shapes[f"{embed}.lora_embedding_A"] == (2, len(tiny_tokenizer()))
    assert shapes[f"{embed}.lora_embedding_B"] == (D_MODEL, 2)
    assert len(shapes) == 2 * (2 * N_LAYERS + 1)
    change = tensors[f"{down}.lora_B.weight"] @ tensors[f"{down}.lora_A.weight"]
    w, q = model.hf.model.layers[2].mlp.down_proj.weight, torch.linalg.qr(V.T).Q
    torch.testing.assert_close(w + change, w - q @ (q.T @ w), atol=1e-5, rtol=0)


def test_adapters_for_transposed_weights_and_biases(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    low_rank = LowRank(V, MATRIX[:2], torch.tensor([1.0, -2.0]))
    intervention = at("mlp_out.1", low_rank) + at("attn_out.0", ProjectOut(V[0])) + at("resid_post.2", Add(V[0]))
    model.export(intervention, "lora", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"]
    assert config["lora_bias"]
    with merge_lora(model.hf, tmp_path):
        close(logits(model.hf), edited_logits(tiny_model("gpt2"), intervention))


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotExactlyExportable, match="all of .*o_proj"):
        tiny_model().export(at("attn_out.1", Affine(MATRIX)), "lora", tmp_path / "a")
    with pytest.raises(NotExactlyExportable, match="PEFT adapters change biases only"):
        model = tiny_model("gpt2")
        model.export(ablate_everywhere(model.site_map, V), "lora", tmp_path / "a")
    with pytest.raises(NotExactlyExportable, match="projection without bias"):
        tiny_model("mistral").export(at("resid_post.1", Add(V[0])), "lora", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_adapters_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    model = tied_llama()
    model.export(ablate_everywhere(model.site_map, V), "lora", tmp_path)
    other = tied_llama(intermediate_size=32)
    clean = logits(other.hf)
    with pytest.raises(ShapeError, match="down_proj"):
        merge_lora(other.hf, tmp_path)
    assert torch.equal(logits(other.hf), clean)
    with pytest.raises(CorruptFileError, match="no module"):
        merge_lora(tiny_model("gpt2").hf, tmp_path)
    with pytest.raises(MissingFileError, match="adapter_config.json"):
        merge_lora(model.hf, tmp_path / "nothing")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CorruptFileError, match="use_dora"):
        merge_lora(model.hf, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": "all-linear"}))
    with pytest.raises(CorruptFileError, match="list of modules"):
        merge_lora(model.hf, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(CorruptFileError, match="can't be read"):
        merge_lora(model.hf, tmp_path)


# Control vectors.


def test_a_control_vector_is_read_back(tmp_path: Path) -> None:
    model = tiny_model()
    parts = at("resid_post.1", Add(V[0], 2.0)) + at("resid_pre.2", Add(V[1])) + at("mlp_out.-1", Add(V[1], -1.0))
    done = model.export(parts, "gguf", tmp_path / "vector.gguf")
    reader = gguf.GGUFReader(done.path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert set(tensors) == {"direction.1", "direction.2"}
    assert all(tensor.dtype == torch.float32 and tensor.shape == (D_MODEL,) for tensor in tensors.values())
    torch.testing.assert_close(tensors["direction.1"], 2 * V[0] + V[1])
    torch.testing.assert_close(tensors["direction.2"], -V[1])
    # direction.i is added to the output of block i.
    by_file = Intervention()
    for name, tensor in tensors.items():
        by_file += at(f"resid_post.{name.split('.')[1]}", Add(tensor))
    close(edited_logits(model, by_file), edited_logits(model, parts))


@pytest.mark.parametrize(
    ("site", "op", "scope", "reason"),
    [
        ("resid_post.0", Add(V[0]), All(), "block 0"),
        ("resid_pre.1", Add(V[0]), All(), "block 0"),
        ("resid_pre.0", Add(V[0]), All(), "output of a block"),
        ("attn_out.1", Add(V[0]), All(), "output of a block"),
        ("resid_post.1", ProjectOut(V), All(), "reads the activation"),
        ("resid_post.1", Add(V[0]), Last(), "every token"),
        ("resid_post.1", Add(V), All(), "rows"),
    ],
)
def test_what_a_control_vector_cannot_hold(site: str, op: Op, scope: Scope, reason: str, tmp_path: Path) -> None:
    with pytest.raises(NotExactlyExportable, match=reason):
        tiny_model().export(at(site, op, scope), "gguf", tmp_path / "vector.gguf")
    assert not list(tmp_path.iterdir())


# lm-evaluation-harness.


@torch.no_grad()
def as_lm_eval(hf: Any, file: Path) -> torch.Tensor:
    """Logits under a steering file, by the documented meaning of its entries."""
    entries = torch.load(file, weights_only=True)
    handles = []
    for name, module in hf.base_model.named_modules():
        if name in entries:
            entry = entries[name]

            def hook(module: Any, args: Any, output: Any, entry: Any = entry) -> Any:
                h = output[0] if isinstance(output, tuple) else output
                vector, coefficient = entry["steering_vector"], entry["steering_coefficient"]
                if entry["action"] == "add":
                    new = h + coefficient * vector
                else:
                    unit = vector / vector.norm()
                    x = h if entry["bias"] is None else h - entry["bias"]
                    new = x + (coefficient - x @ unit)[..., None] * unit
                    new = new if entry["bias"] is None else new + entry["bias"]
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handles.append(module.register_forward_hook(hook))
    assert len(handles) == len(entries)
    out = logits(hf)
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2", "mixtral"])
def test_a_steering_file_does_what_the_plan_does(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    cases = [
        at("resid_post.1", Add(V[0], 2.0)) + at("resid_pre.2", Add(V[1])),
        at("resid_post.1", ClampProjection(V[0], -3.0)) + at("attn_out.2", Add(V[1])),
        at("embed", ProjectOut(V[0])) + at("mlp_out.2", Ablate("mean", V[1], directions=V[0])),
    ]
    for i, intervention in enumerate(cases):
        file = tmp_path / f"{i}.pt"
        done = model.export(intervention, "lm_eval", file)
        close(as_lm_eval(model.hf, file), edited_logits(model, intervention))
        assert done.max_difference <= 1e-4
        assert float((as_lm_eval(model.hf, file) - logits(model.hf)).abs().max()) > 0.01
    assert n_hooks(model.hf) == 0
    entries = torch.load(tmp_path / "1.pt", weights_only=True)
    assert [entry["action"] for entry in entries.values()] == ["clamp", "add"]
    assert set(next(iter(entries.values()))) == {
        "action", "steering_vector", "steering_coefficient", "bias", "head_index"
    }  # fmt: skip


def test_a_direction_ablated_everywhere_as_a_steering_file(tmp_path: Path) -> None:
    model = tiny_model("llama")
    intervention = ablate_everywhere(model.site_map, V[0])
    model.export(intervention, "lm_eval", tmp_path / "steer.pt")
    close(as_lm_eval(model.hf, tmp_path / "steer.pt"), edited_logits(model, intervention))


@pytest.mark.parametrize(
    ("intervention", "reason"),
    [
        (at("resid_post.1", ClampProjection(V[0], 1.0)) + at("resid_post.1", Add(V[0])), "one entry for each place"),
        (at("resid_pre.2", ProjectOut(V[0])) + at("resid_post.1", ProjectOut(V[1])), "one entry for each place"),
        (at("resid_post.1", ProjectOut(V)), "one direction"),
        (at("resid_post.1", Affine(MATRIX)), "one direction"),
        (at("resid_post.1", LowRank(V[:1], MATRIX[:1])), "one direction"),
        (at("resid_post.1", Add(V[0]), Last()), "every token"),
        (at("resid_post.1", Cap(V[0], 1.0)), "affine"),
        (at("z.1", Add(V[0])), "output of a module"),
        (at("resid_mid.1", Add(V[0])), "output of a module"),
        (at("logits", Add(torch.ones(len(tiny_tokenizer())))), "outside"),
    ],
)
def test_what_a_steering_file_cannot_hold(intervention: Intervention, reason: str, tmp_path: Path) -> None:
    with pytest.raises(NotExactlyExportable, match=reason):
        tiny_model().export(intervention, "lm_eval", tmp_path / "steer.pt")
    assert not list(tmp_path.iterdir())


def test_the_names_of_files_are_checked(tmp_path: Path) -> None:
    for kind in ("gguf", "lm_eval"):
        with pytest.raises(InvalidInputError, match="has to end with"):
            tiny_model().export(at("resid_post.1", Add(V[0])), kind, tmp_path / "file.bin")


# Hooks.


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gemma2"])
def test_the_text_of_a_hook_does_what_the_plan_does(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    intervention = (
        at("resid_post.1", Add(V[0], 2.0))
        + at("resid_post.1", ProjectOut(V))
        + at("resid_post.1", Add(V[1]))
        + at("resid_pre.1", ProjectOut(V[1]))
        + at("attn_out.2", LowRank(V, MATRIX[:2], torch.tensor([1.0, -2.0])))
    )
    done = model.export(intervention, "hook", tmp_path)
    assert "workbench" not in done.text
    assert (tmp_path / "steer.py").read_text() == done.text
    names = {"__file__": str(tmp_path / "steer.py")}
    exec(compile(done.text, "steer.py", "exec"), names)
    wanted, clean = edited_logits(model, intervention), logits(model.hf)
    handles = names["steer"](model.hf)  # type: ignore[operator]
    close(logits(model.hf), wanted)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(model.hf), clean)


def test_a_hook_on_a_bfloat16_model_is_bit_equal_to_the_plan(tmp_path: Path) -> None:
    model = tiny_model()
    model.hf.to(torch.bfloat16)
    intervention = at("resid_post.1", Add(V[0], 2.0)) + at("resid_post.0", ProjectOut(V[1]))
    assert model.export(intervention, "hook", tmp_path).max_difference == 0


def test_what_a_hook_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(NotExactlyExportable, match="whole activation"):
        tiny_model().export(at("resid_post.1", Affine(MATRIX)), "hook", tmp_path / "h")
    with pytest.raises(NotExactlyExportable, match="output of a module"):
        tiny_model("gpt2").export(at("resid_pre.0", ProjectOut(V)), "hook", tmp_path / "h")


@pytest.mark.slow
@pytest.mark.embedded
def test_r8_r9_r10_on_the_embedded_model(embedded: Model, tmp_path: Path) -> None:
    batch = embedded.tokens(["The capital of France is", "Once upon a time there was"])
    v = torch.randn(embedded.d_model, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def real(hf: Any) -> torch.Tensor:
        return hf(**batch.hf(), use_cache=False).logits[batch.mask]

    clean, everywhere = real(embedded.hf), ablate_everywhere(embedded.site_map, v)
    with embedded.plan(everywhere):
        wanted = real(embedded.hf)
    copy = embedded.export(everywhere, "weights").hf
    assert float((real(copy) - wanted).abs().max()) <= 1e-3 < 1 < float((clean - wanted).abs().max())
    copy.lm_head.weight = copy.model.embed_tokens.weight
    assert float((real(copy) - wanted).abs().max()) > 0.5
    embedded.export(everywhere, "lora", tmp_path / "adapter")
    with merge_lora(embedded.hf, tmp_path / "adapter"):
        assert float((real(embedded.hf) - wanted).abs().max()) <= 1e-3
    assert torch.equal(real(embedded.hf), clean)
    for site in ("resid_pre.0", "resid_pre.10"):
        addition = at(site, AddScaled(v, 20.0, size=1.0))
        with embedded.plan(addition):
            wanted = real(embedded.hf)
        assert float((real(embedded.export(addition, "weights").hf) - wanted).abs().max()) <= 1e-3
