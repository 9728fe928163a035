"""`workbench glitch features`: what an SAE's features do on glitch tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from workbench.cli.base import Command
from workbench.cli.glitch_repair import named_tokens


@dataclass(frozen=True, kw_only=True)
class GlitchFeaturesCommand(Command):
    """Find the SAE features that fire on glitch tokens more than on ordinary ones, and how well both are rebuilt."""

    model: Annotated[str, tyro.conf.Positional] = "embedded"
    """Model: "embedded", a folder, a .gguf file, or a Hugging Face id in the local cache."""
    sae: tyro.conf.Positional[str]
    """Folder of the SAE, or release/sae_id of sae_lens."""
    check: bool = True
    """Refuse an SAE that does not fit the model's activations; --no-check takes it nevertheless."""
    tokens: tuple[int, ...] = ()
    """Ids of glitch tokens."""
    scan: Path | None = None
    """Run folder of `workbench glitch scan --verify top`: takes the tokens that it verified."""
    controls: int = 4
    """Ordinary tokens per glitch token, alike in length and leading space."""
    most: int = 200
    """Glitch tokens to compare; of more, so many are drawn at random."""
    fdr: float = 0.05
    """Expected share of false ones among the features that are named."""

    def run(self) -> None:
        """Compare, save, and say what was found."""
        from workbench.glitch.scanning.sae_features import FeatureOptions, glitch_features
        from workbench.models.loading import load_model
        from workbench.saes.formats.load import load_sae

        options = FeatureOptions(controls=self.controls, most=self.most, fdr=self.fdr, seed=self.seed)
        tokens, avoid = named_tokens(self.tokens, self.scan)
        model = load_model(self.model)
        sae = load_sae(self.sae, str(model.device), model=model, check=self.check)
        with self.start("glitch-features") as run:
            run.note_model(model)
            report = glitch_features(model, sae, tokens, avoid=avoid, options=options)
            run.artifacts.mkdir(parents=True, exist_ok=True)
            report.df.to_csv(run.artifacts / "features.csv", index=False)
            run.save_step("features", report.section())
            html = run.finish(f"SAE features on glitch tokens of {report.model}")
            summary = report.to_json() | {"run": run.path, "report": html, "metrics": report.metrics()}
            lines = [*(f"- {finding}" for finding in report.findings()), f"Report: {html}"]
            self.emit(summary, lines)
