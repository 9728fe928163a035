from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tests.glitch.planted import planted, truth
from tests.glitch.tiny_vocab import SPECIAL, byte_level
from tests.tiny import FP32_LOGITS, n_hooks
from workbench.cli import main
from workbench.core.errors import (
    DegenerateInputError,
    EditError,
    InvalidInputError,
    MismatchError,
    NotExactlyExportable,
)
from workbench.glitch.repairing.repair import Repair, RepairOptions, control_of, mixture, repair
from workbench.glitch.repairing.repair_check import RepairCheckOptions, check_repair
from workbench.glitch.repairing.repaired_copy import compare_copy, save_repaired, source_folder
from workbench.glitch.vocabulary.segments import Speller
from workbench.interventions.intervention import Intervention
from workbench.models.loading import load_model
from workbench.models.model import Model
from workbench.models.tiny import tiny_hf

BACKEND = byte_level()
AT = BACKEND.token_to_id
TOKENS = [AT("ember"), AT("Ġharbor"), AT("delta")]
OTHERS = [AT("alpha"), AT("z")]


def _tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=SPECIAL, pad_token=SPECIAL)


def _model(family: str = "llama", bias: bool = False) -> Model:
    hf = tiny_hf(family, BACKEND.get_vocab_size())
    if bias:
        head = hf.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.randn(head.weight.shape[0], generator=torch.Generator().manual_seed(1)))
    return Model(hf, _tokenizer(), name=f"tiny-{family}")


def _rows() -> torch.Tensor:
    rows = torch.randint(20, 200, (3, 9), generator=torch.Generator().manual_seed(2))
    rows[0, 3], rows[1, 8], rows[2, 0], rows[2, 4] = TOKENS[0], TOKENS[1], TOKENS[2], TOKENS[0]
    return rows


def _saved(path: Path, family: str = "llama", shard: str | None = None) -> Path:
    model = _model(family)
    model.hf.config.architectures = [type(model.hf).__name__]
    model.hf.save_pretrained(path, **({} if shard is None else {"max_shard_size": shard}))
    model.tokenizer.save_pretrained(path)
    return path


def _set_rows(hf: Any, made: Repair) -> None:
    """The same change of the weights, by hand."""
    inner, head = hf.get_input_embeddings(), hf.get_output_embeddings()
    untied = inner.weight.detach().clone()
    E_out = head.weight.detach().clone()
    for k, i in enumerate(made.ids):
        if made.E_in is not None:
            untied[i] = made.E_in[k]
        if made.E_out is not None:
            E_out[i] = made.E_out[k]
    head.weight = torch.nn.Parameter(E_out)
    inner.weight = torch.nn.Parameter(untied)
    if made.bias is not None:
        with torch.no_grad():
            head.bias[list(made.ids)] = made.bias


def test_tokens_are_spelled_by_the_fewest_others() -> None:
    texts = [b"a", b"b", b"c", b"ab", b"bc", b"abc", b"abcab"]
    spell = Speller(texts, torch.ones(7, dtype=torch.bool).numpy())
    assert spell(b"abcab", without=6) == (5, 3)
    assert spell(b"abc", without=5) == (0, 4)  # a+bc and ab+c are as short; 0 + 4 < 3 + 2 is false, so ids decide
    assert spell(b"") == () and spell(b"xa") is None


def test_rows_are_the_mean_of_the_sources_with_their_length_about_the_mean_row() -> None:
    model = _model("neox")
    made = repair(model, TOKENS)
    E = model.hf.get_input_embeddings().weight
    assert made.ids == tuple(TOKENS) and made.E_in is not None and made.E_out is not None
    for k, pieces in enumerate(made.sources):
        assert "".join(BACKEND.id_to_token(j) for j in pieces) == BACKEND.id_to_token(TOKENS[k])
        assert TOKENS[k] not in pieces and not set(pieces) & set(TOKENS)
        centred = E[list(pieces)] - E.mean(0)
        want = centred.mean(0) * centred.norm(dim=1).mean() / centred.mean(0).norm() + E.mean(0)
        assert torch.allclose(made.E_in[k], want, atol=1e-5)
    plain = repair(model, TOKENS, RepairOptions(match_norm=False))
    assert plain.E_in is not None
    assert torch.allclose(plain.E_in[0], E[list(made.sources[0])].mean(0), atol=1e-6)
    assert mixture(torch.ones(2, 3), torch.ones(3))[0].tolist() == [1, 1, 1]


READ_ALONE, WRITE_ALONE = RepairOptions(writing="keep", sources="neighbours"), RepairOptions(reading="keep")


@pytest.mark.parametrize(("family", "options"), [
    ("llama", RepairOptions()), ("gpt2", READ_ALONE), ("neox", RepairOptions()), ("gemma2", RepairOptions()),
    ("qwen2", RepairOptions()), ("llama", READ_ALONE), ("qwen2", WRITE_ALONE),
])  # fmt: skip
def test_the_edit_equals_changed_rows_and_leaves_nothing_behind(family: str, options: RepairOptions) -> None:
    model, rows = _model(family, bias=family == "qwen2"), _rows()
    made, plain = repair(model, TOKENS, options), model.logits(rows, "all")
    with model.plan(made.intervention()) as plan:
        edited = model.logits(rows, "all")
    assert torch.equal(model.logits(rows, "all"), plain) and n_hooks(model.hf) == 0
    assert all(report.tokens for report in plan.report) and not torch.allclose(edited, plain, atol=1e-2)
    _set_rows(model.hf, made)
    assert torch.allclose(edited, model.logits(rows, "all"), atol=FP32_LOGITS)


def test_blocked_tokens_are_never_written() -> None:
    model = _model("llama")
    made = repair(model, TOKENS, RepairOptions(writing="block", reading="keep"))
    with model.plan(made.intervention(required=False)):
        p = model.logits(_rows()).softmax(-1)
    assert float(p[:, TOKENS].max()) == 0.0 and float(p[:, OTHERS].min()) > 0


def test_reading_alone_needs_the_token_in_the_text_unless_that_is_left_open() -> None:
    model, without = _model("llama"), torch.tensor([[30, 31, 32]])
    made = repair(model, TOKENS, RepairOptions(writing="keep"))
    with pytest.raises(EditError, match="no token was in scope"), model.plan(made.intervention()):
        model.logits(without)
    with model.plan(made.intervention(required=False)):
        assert torch.equal(model.logits(without), model.logits(without))
    done = model.generate(["ember"], 4, temperature=0.0, intervention=made.intervention(required=False))
    assert len(done.texts) == 1 and done.report[0].tokens > 0


def test_what_can_not_be_repaired_is_skipped_with_the_reason() -> None:
    model = _model("llama")
    byte, reserved, special = AT("q"), AT("<unused1>"), AT(SPECIAL)
    made = repair(model, [TOKENS[0], byte, reserved, special])
    assert made.ids == (TOKENS[0],) and [i for i, _ in made.skipped] == [byte, reserved, special]
    assert "spell" in made.skipped[0][1] and "name" in made.skipped[1][1]
    near = repair(model, [byte], RepairOptions(sources="neighbours", neighbours=3))
    E = torch.nn.functional.normalize(model.hf.get_input_embeddings().weight, dim=1)
    assert len(near.sources[0]) == 3 and byte not in near.sources[0]
    assert float(E[byte] @ E[near.sources[0][0]]) >= float(E[byte] @ E[near.sources[0][2]])
    with pytest.raises(DegenerateInputError, match="none of these"):
        repair(model, [byte])
    with pytest.raises(InvalidInputError, match="no row"):
        repair(model, [10**6])
    with pytest.raises(InvalidInputError, match="change reading or writing"):
        RepairOptions(reading="keep", writing="keep")


def test_controls_have_the_wrong_sources() -> None:
    model = _model("llama")
    made = repair(model, TOKENS)
    shuffled, random = control_of(model, made, "shuffled"), control_of(model, made, "random")
    assert sorted(shuffled.sources) == sorted(made.sources)
    assert all(a != b for a, b in zip(shuffled.sources, made.sources, strict=True))
    assert [len(s) for s in random.sources] == [len(s) for s in made.sources] and random.sources != made.sources
    assert shuffled.E_in is not None and made.E_in is not None and not torch.allclose(shuffled.E_in, made.E_in)


def test_padding_rows_and_broken_rows_elsewhere_do_no_harm() -> None:
    hf = tiny_hf("neox", BACKEND.get_vocab_size() + 6)
    hf.get_input_embeddings().weight[0] = float("nan")
    model = Model(hf, _tokenizer(), name="padded")
    with pytest.raises(DegenerateInputError, match="no mean row"):
        repair(model, TOKENS)
    hf.get_input_embeddings().weight[0] = 0.0
    made = repair(model, TOKENS, RepairOptions(sources="neighbours"))
    wrong = control_of(model, made, "random")
    n = BACKEND.get_vocab_size()
    assert max(i for pieces in (*made.sources, *wrong.sources) for i in pieces) < n and made.embed_scale == 1.0
    with model.plan(made.intervention()):
        assert bool(torch.isfinite(model.logits(_rows())).all())


def test_other_models_refuse_the_repair() -> None:
    made, other = repair(_model("llama"), TOKENS), _model("qwen2")
    with pytest.raises(MismatchError, match="made for"):
        other.plan(made.intervention())


@pytest.mark.parametrize(("family", "shard"), [
    ("gpt2", None), ("gemma2", None), ("neox", None), ("llama", "20KB"), ("qwen2", "20KB"),
])  # fmt: skip
def test_a_saved_copy_does_what_the_edit_does_and_touches_nothing_else(
    tmp_path: Path, family: str, shard: str | None
) -> None:
    source = _saved(tmp_path / "model", family, shard)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    assert (shard is None) == (len(list(source.glob("*.safetensors"))) == 1)
    model = load_model(source, dtype="float32", check=False)
    made = repair(model, TOKENS)
    out = save_repaired(made, source_folder(model), tmp_path / "repaired")
    copy, rows = load_model(out, dtype="float32", check=False), _rows()
    with model.plan(made.intervention()):
        assert torch.allclose(copy.logits(rows, "all"), model.logits(rows, "all"), atol=FP32_LOGITS)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    old, new = (
        {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()} for folder in (source, out)
    )
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and len(changed) == (1 if made.tied else 2)
    for name in changed:
        assert (old[name] != new[name]).any(1).nonzero().flatten().tolist() == sorted(TOKENS)
    assert json.loads((out / "repair.json").read_text())["tokens"][0]["sources"] == list(made.sources[0])
    assert compare_copy(model, made, out).agrees


def test_reading_without_writing_unties_the_copy_only_if_asked(tmp_path: Path) -> None:
    source = _saved(tmp_path / "model", "llama", "20KB")
    model = load_model(source, dtype="float32", check=False)
    made = repair(model, TOKENS, RepairOptions(writing="keep"))
    with pytest.raises(NotExactlyExportable, match="one matrix"):
        save_repaired(made, source, tmp_path / "repaired")
    assert not (tmp_path / "repaired").exists() and [p.name for p in tmp_path.iterdir()] == ["model"]
    out = save_repaired(made, source, tmp_path / "repaired", untie=True)
    copy, rows = load_model(out, dtype="float32", check=False), _rows()
    assert copy.hf.get_input_embeddings().weight is not copy.hf.get_output_embeddings().weight
    with model.plan(made.intervention()):
        assert torch.allclose(copy.logits(rows, "all"), model.logits(rows, "all"), atol=FP32_LOGITS)
    blocked = repair(model, TOKENS, RepairOptions(reading="keep", writing="block"))
    with pytest.raises(NotExactlyExportable, match="output bias"):
        save_repaired(blocked, source, tmp_path / "blocked", untie=True)


def test_an_output_matrix_that_is_a_copy_of_the_embedding_is_changed_with_it(tmp_path: Path) -> None:
    model = _model("qwen2")
    model.hf.get_output_embeddings().weight.copy_(model.hf.get_input_embeddings().weight)
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    for options in (RepairOptions(), RepairOptions(writing="keep")):
        made = repair(model, TOKENS, options)
        out = save_repaired(made, tmp_path / "model", tmp_path / f"repaired-{options.writing}")
        copy, rows = load_model(out, dtype="float32", check=False), _rows()
        with model.plan(made.intervention()):
            assert torch.allclose(copy.logits(rows, "all"), model.logits(rows, "all"), atol=FP32_LOGITS)


def test_nothing_is_written_over_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    source = _saved(tmp_path / "model")
    model = load_model(source, dtype="float32", check=False)
    made = repair(model, TOKENS)
    for out in (source, source / "inside"):
        with pytest.raises(InvalidInputError):
            save_repaired(made, source, out)
    other = Model(tiny_hf("llama", BACKEND.get_vocab_size(), seed=5), _tokenizer(), name="other")
    with pytest.raises(MismatchError, match="not the model"):
        save_repaired(repair(other, TOKENS), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_on_trained_models_the_repair_is_judged_by_its_intervals(tied: bool) -> None:
    """What training left out can be copied after the repair; random ordinary tokens and plain text stay as they were."""
    model = (planted(True, 0.1) if tied else planted(False, 0.3, std=0.2)).model  # trained for other tests too
    never = truth().never[:12]
    made = repair(model, never, avoid=truth().never)
    report = check_repair(model, made, RepairCheckOptions(controls=12, texts=_texts(model), tolerance=0.05))
    assert report.copying().n == len(made.ids) >= 8
    assert set(report.copied) == {"before", "repaired", "shuffled", "random"}
    assert max(report.copied["before"]) < 0.05
    assert report.helps_copying, report.findings()
    assert abs(report.controls.value) < 0.1 and report.guard and report.success
    assert report.section().findings[0].startswith("The repair helps")


def _texts(model: Model) -> tuple[str, ...]:
    trained = torch.tensor(truth().trained)[::7]
    return tuple(model.tokenizer.decode(part.tolist()) for part in trained.split(12) if len(part) == 12)


def test_a_repair_that_costs_plain_text_is_no_success() -> None:
    model = planted(False, 0.3, std=0.2).model
    made = repair(model, truth().never[:8], avoid=truth().never)
    options = RepairCheckOptions(controls=4, texts=_texts(model))
    assert made.E_out is not None
    loud = dataclasses.replace(made, scale=torch.full_like(made.scale, 8.0))
    report = check_repair(model, loud, options)
    assert not report.guard and not report.success and "NO SUCCESS" in report.findings()[0]
    with pytest.raises(DegenerateInputError, match="no success"):
        report.require()
    few = check_repair(model, repair(model, truth().never[:1], avoid=truth().never), options)
    assert not few.success and "too few" in few.findings()[0] and "shuffled" not in few.copied


def test_the_command_saves_the_edit_and_a_tested_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    source = _saved(tmp_path / "model")
    words = ["glitch", "repair", str(source), "--tokens", *map(str, TOKENS), "--controls", "2", "--json",
             "--out", str(tmp_path / "runs"), "--save-model", str(tmp_path / "copy")]  # fmt: skip
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    run = Path(shown["run"])
    assert (run / "DONE").is_file() and shown["metrics"]["success"] == 0 and not (tmp_path / "copy").exists()
    edit = Intervention.load(run / "artifacts" / "intervention")
    model = load_model(source, dtype="float32", check=False)
    with model.plan(edit):
        model.logits(_rows())
    assert main([*words, "--force"]) == 0
    assert "does what the edit does" in (Path(json.loads(capsys.readouterr().out)["run"]) / "report.html").read_text()
    assert (tmp_path / "copy" / "config.json").is_file()
    assert main(["glitch", "repair", str(source), "--out", str(tmp_path / "runs")]) == 2
    assert "--scan" in capsys.readouterr().err
