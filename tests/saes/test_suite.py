from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.sae_suite import SaeSuite
from tests.saes.handmade import relu_sae
from tests.tiny import D_MODEL, n_hooks, tiny_model
from workbench.core.errors import InvalidInputError
from workbench.saes.evaluation.evaluate import EvalOptions
from workbench.saes.evaluation.labelled import LabelledTexts
from workbench.saes.evaluation.sparse_probing import ProbingOptions
from workbench.saes.evaluation.suite import SuiteOptions, labelled_examples, run_suite
from workbench.saes.evaluation.synthetic import SyntheticOptions
from workbench.saes.evaluation.synthetic_training import SyntheticTraining
from workbench.saes.formats.load import sae_lens_module

TEXTS = [f"{i} Some words, and more; then {i * 7} of them.\nEnd of Passage {i}" for i in range(24)]


def _sae(model: object) -> object:
    torch.manual_seed(0)
    lens = sae_lens_module()
    sae = lens.TopKSAE(lens.TopKSAEConfig(d_in=D_MODEL, d_sae=40, k=6))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    return sae


def test_the_suite_measures_what_was_asked_and_says_what_it_could_not() -> None:
    model = tiny_model()
    texts = tuple(("UPPER" if i % 2 else "lower") + f" text {i}" for i in range(160))
    labelled = LabelledTexts(
        "upper or lower", texts, tuple(i % 2 for i in range(160)), tuple(str(i // 2) for i in range(160))
    )
    options = SuiteOptions(
        evaluation=EvalOptions(max_rows=24, batch_rows=7), probing=ProbingOptions(ks=(1,), reseeds=2, per_class=60),
        absorption=None, synthetic=SyntheticTraining(world=SyntheticOptions(n_features=12, d_in=16), steps=4, batch=64),
    )  # fmt: skip
    report = run_suite(model, _sae(model), TEXTS, texts=(labelled,), options=options)
    assert report.absorption is None
    assert report.probing is not None
    scores = {(s.task, s.reads): s.accuracy.value for s in report.probing.scores}
    assert scores["upper or lower", "full residual"] > 0.9
    assert scores["second half of the row", "full residual"] > 0.6
    assert "begins a word" in report.skipped, "tokens of the tiny tokenizer are single bytes"
    assert set(report.parts) == {"core", "probing", "synthetic"}
    assert report.synthetic is not None and report.synthetic.trained == "topk", "as the SAE under study"
    section = report.section()
    assert {"core.fvu", "probing.SAE_k1", "probing.random_SAE_k1", "synthetic.mmcs"} <= section.metrics.keys()
    assert section.findings[-1].startswith("Not measured: ") and "too few examples" in section.findings[-1]
    json.dumps(report.to_json())
    assert n_hooks(model.hf) == 0


def _transcoder() -> object:
    torch.manual_seed(0)
    lens = sae_lens_module()
    sae = lens.Transcoder(lens.TranscoderConfig(d_in=D_MODEL, d_out=D_MODEL, d_sae=40, apply_b_dec_to_input=False))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    return sae


@pytest.mark.parametrize(("kind", "why"), [("words", "whole lower-case words"), ("transcoder", "transcoder")])
def test_what_can_not_be_measured_takes_nothing_else_with_it(kind: str, why: str) -> None:
    model = tiny_model()
    sae = _sae(model) if kind == "words" else _transcoder()
    options = SuiteOptions(evaluation=EvalOptions(max_rows=4), probing=None, synthetic=None)
    report = run_suite(model, sae, TEXTS, options=options)
    assert report.absorption is None and set(report.parts) == {"core"}
    assert why in report.skipped["absorption"]
    assert report.findings()[-1] == f"Not measured: absorption. {report.skipped['absorption']}"


def test_the_random_control_does_not_depend_on_the_batches() -> None:
    """The very first row has no token that counts."""
    model, rows = tiny_model(), torch.randint(2, 200, (12, 10), generator=torch.Generator().manual_seed(0))
    rows[0] = 1
    wide = relu_sae(
        model, torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(1)), -torch.full((40,), 2.0)
    )
    active = {}
    for batch_rows in (1, 5, 12):
        first, *_ = labelled_examples(model, wide, rows, (), EvalOptions(max_rows=12, batch_rows=batch_rows))
        active[batch_rows] = {name: acts.getnnz() / len(first.x) for name, acts in first.acts.items()}
    assert active[1] == active[5] == active[12]
    assert active[1]["random SAE"] == pytest.approx(active[1]["SAE"], abs=0.5)


def test_the_command_writes_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    _sae(model).save_model(tmp_path / "sae")  # type: ignore[attr-defined]
    (tmp_path / "text.txt").write_text("\n".join(t.replace("\n", " ") for t in TEXTS), encoding="utf-8")
    SaeSuite(
        sae=tmp_path / "sae", texts=tmp_path / "text.txt", model=str(tmp_path / "model"), out=tmp_path / "runs",
        rows=12, no_text_sets=True, words=0, synthetic_steps=0, json=True,
    ).run()  # fmt: skip
    out = json.loads(capsys.readouterr().out)
    assert Path(out["report"]).is_file()
    assert out["metrics"]["core.n_tokens"] > 0
    with pytest.raises(InvalidInputError, match="one of them"):
        SaeSuite(sae=tmp_path / "sae").run()
