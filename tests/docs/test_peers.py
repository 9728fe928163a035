"""The cells of the README's table about TransformerLens and sae_lens; nnsight and steering-vectors were run elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import workbench as wb
from tests.tiny import tiny_model

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
WRONG, RIGHT = "blocks.1.hook_resid_pst", "blocks.1.hook_resid_post"


def _cells(row: str) -> list[str]:
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_transformer_lens_replaces_modules_and_ignores_a_misspelt_hook() -> None:
    assert _cells("the model")[2] == "replaces its modules in place"
    assert _cells("a place that is misspelt")[2] == "`run_with_hooks` runs unedited, says nothing"
    model = tiny_model("llama")
    before, bridge = {type(m) for m in model.hf.modules()}, model.to_transformer_lens()
    assert {type(m) for m in bridge.original_model.modules()} != before
    ids, fired = model.tokens("The cat").ids, []

    def double(resid: torch.Tensor, hook: object) -> torch.Tensor:
        fired.append(hook)
        return 2 * resid

    plain = bridge(ids)
    assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(WRONG, double)]), plain) and not fired
    assert not torch.equal(bridge.run_with_hooks(ids, fwd_hooks=[(RIGHT, double)]), plain) and fired
    with pytest.raises(wb.errors.UnknownSiteError, match="resid_post"):
        model.capture("The cat", [WRONG])


# sae_lens 6.54 imports a module that TransformerLens has renamed
@pytest.mark.filterwarnings("ignore:The 'utils' module has been deprecated:DeprecationWarning")
def test_sae_lens_skips_a_misspelt_hook_with_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    assert _cells("a place that is misspelt")[4] == "the SAE is skipped with a log line"
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    from tests.features.toys import random_sae

    sae = random_sae()
    sae.cfg.metadata.hook_name = WRONG
    bridge = tiny_model("llama").to_transformer_lens()
    bridge.__class__, bridge._acts_to_saes, bridge._transcoder_output_hooks = SAETransformerBridge, {}, {}
    with caplog.at_level(logging.WARNING):
        bridge.add_sae(sae)
    assert "Skipping" in caplog.text and not bridge._acts_to_saes
