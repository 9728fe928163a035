"""An SAE spliced into a real language model: the ends of the scale are where they must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.activations.harvest import harvest
from workbench.activations.sources import SelfText
from workbench.models.model import Model
from workbench.saes.config import SAEConfig
from workbench.saes.evaluation.evaluate import EvalOptions, evaluate_sae
from workbench.saes.evaluation.quality import SAEReport
from workbench.saes.formats.load import load_sae, sae_lens_module
from workbench.saes.formats.placement import TEXTS
from workbench.saes.training.train import train_sae

SITE = "resid_post.15"
HOOK = "blocks.15.hook_resid_post"


def _standard(d: int) -> Any:
    """A ReLU SAE of +v and -v for every dimension v, which reconstructs everything."""
    lens = sae_lens_module()
    sae = lens.StandardSAE(lens.StandardSAEConfig(d_in=d, d_sae=2 * d))
    sae.cfg.metadata.hook_name = HOOK
    W = torch.cat([torch.eye(d), -torch.eye(d)])
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_enc.copy_(W.T)
        sae.W_dec.copy_(W)
    return sae


def _initial(d: int, mean: torch.Tensor) -> Any:
    """A TopK SAE as training begins: short random decoder rows, the encoder their transpose, `b_dec` at the mean."""
    lens = sae_lens_module()
    sae = lens.TopKSAE(lens.TopKSAEConfig(d_in=d, d_sae=8 * d, k=32))
    sae.cfg.metadata.hook_name = HOOK
    rows = torch.randn(8 * d, d, generator=torch.Generator().manual_seed(0))
    rows = 0.1 * rows / rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.zero_()
        sae.b_dec.copy_(mean)
    return sae


def _recovered_zero_all(report: SAEReport, splice: str = "sae") -> float:
    zero = report.ce["zero_all"].value
    return (zero - report.ce[splice].value) / (zero - report.ce_clean.value)


@pytest.mark.slow
@pytest.mark.embedded
def test_identity_recovers_all_zero_nothing_and_an_untrained_sae_what_the_mean_does(embedded: Model) -> None:
    options, texts = EvalOptions(max_rows=5, batch_rows=5), list(TEXTS[:5])
    sae = _standard(embedded.width(SITE))
    identity = evaluate_sae(embedded, sae, texts, options=options)
    assert abs(identity.ce_difference["sae"].value) < 1e-3
    assert [identity.recovered[name].value for name in ("zero", "zero_all", "mean")] == pytest.approx([1] * 3, abs=1e-3)
    assert identity.fvu.value < 1e-6

    with torch.no_grad():
        sae.W_dec.zero_()
    nothing = evaluate_sae(embedded, sae, texts, options=options)
    assert nothing.recovered["zero"].value == pytest.approx(0, abs=1e-6)
    assert nothing.fvu.value > 1, "the mean predictor is better"

    tokens = embedded.tokens(texts)
    x = embedded.capture(tokens, [SITE]).flat(SITE).float()
    kept = tokens.mask & (tokens.positions > 0) & (x.norm(dim=-1) < 2000)
    untrained = evaluate_sae(embedded, _initial(x.shape[-1], x[kept].mean(0)), texts, options=options)
    assert 0.25 < _recovered_zero_all(untrained) < 0.45
    assert _recovered_zero_all(untrained) == pytest.approx(_recovered_zero_all(untrained, "mean"), abs=0.05)
    assert untrained.ahead_of_random.value < 0


@pytest.mark.slow
@pytest.mark.embedded
def test_an_sae_of_the_middle_layer_reaches_the_usual_quality(embedded: Model, tmp_path: Path) -> None:
    store = harvest(embedded, SelfText(tokens=65_536, context=64), [SITE], tmp_path / "acts")
    run = train_sae(store, SAEConfig(d_sae=4608, k=32, tokens=600_000), tmp_path / "sae")
    report = evaluate_sae(embedded, load_sae(run.path), store)
    assert 0.72 < report.explained_variance < 0.86
    # Zero ablation of kept tokens. With sinks ablated as well it was 0.936 here, on text of the model's own, and 0.993
    # on documentation, which is easier; the two need not lie in one range.
    assert 0.95 < report.recovered["zero"].value < 0.99
    assert 0.9 < _recovered_zero_all(report) < report.recovered["zero"].value
    assert report.recovered_controls["sae_sinks"].value < report.recovered["zero"].value, "reported apart"
    assert report.ahead_of_random.low > 0
