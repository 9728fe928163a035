from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.geometry import Geometry, GeometryReport, Options, study
from tests.tiny import tiny_model, tiny_tokenizer
from workbench.activations.geometry import GeometryOptions
from workbench.core.errors import InvalidInputError

SITES = ("resid_post.0", "resid_post.1", "resid_post.2")


def _planted() -> GeometryReport:
    """A model whose second block writes a constant 60 to one dimension."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.hf.transformer.h[1].mlp.c_proj.bias[6] += 60
    ids = torch.randint(2, 200, (60, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = tiny_tokenizer().bos_token_id
    return study(model, ids, SITES, Options(geometry=GeometryOptions(extremal_share=0.9), clipped_rows=8))


def test_a_dimension_that_a_block_writes_is_found_behind_it_and_clipping_it_costs_more_than_chance() -> None:
    report = _planted()
    before, at, after = report.sites
    assert 6 not in before.outlier_dims and at.outlier_dims[0] == 6 == after.outlier_dims[0]
    assert at.anisotropy["clipped"].high < at.anisotropy["raw"].low
    assert report.clipping is not None and report.clipping.site in SITES[1:] and 6 in report.clipping.dims
    assert report.clipping.outliers.value != 0 != report.clipping.random.value
    said = "\n".join(report.findings())
    assert "2 of 3 sites have outlier dimensions" in said and "6 (at 2)" in said
    section = report.section()
    json.dumps(report.to_json())
    assert {f"{site}.anisotropy.raw" for site in SITES} <= section.metrics.keys()
    assert "clipping.outliers" in section.metrics and len(section.blocks) == 6
    caption = "\n".join(getattr(block, "caption", "") for block in section.blocks)
    assert "100 and above 1000 times" in caption and "a share of 0.9 of the tokens" in caption, "constants are shown"


def test_one_ordinary_site_gives_a_report_without_clipping() -> None:
    ids = torch.randint(2, 200, (60, 12), generator=torch.Generator().manual_seed(0))
    options = Options(geometry=GeometryOptions(rms_factor=50.0, extremal_share=0.99))
    report = study(tiny_model(), ids, SITES[:1], options)
    assert report.clipping is None and report.sites[0].outliers == ()
    assert "No outlier dimension" in report.findings()[0] and "not tried" in report.findings()[-1]
    assert len(report.section().blocks) == 4
    with pytest.raises(InvalidInputError, match="at least 2"):
        replace(options, clipped_rows=1)


def test_the_command_writes_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("Some words, and more of them; not many. " * 60, encoding="utf-8")
    command = Geometry(
        model=str(tmp_path / "model"), tokens=600, context=12, json=True, files=(text,), out=tmp_path / "runs"
    )
    command.run()
    summary = json.loads(capsys.readouterr().out)
    assert Path(summary["report"]).is_file() and len(summary["findings"]) >= 4
    assert sum(name.endswith("anisotropy.raw") for name in summary["metrics"]) == 3, "every block"
    own = replace(command, files=(), tokens=60).rows(model)
    assert own.shape == (5, 12) and bool((own[:, 0] == model.tokenizer.bos_token_id).all())
