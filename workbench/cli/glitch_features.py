"""`workbench glitch features`: what an SAE's features do on glitch tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.cli.glitch_repair import named_tokens
from workbench.cli.study import Begin, SAEStudy

if TYPE_CHECKING:
    from workbench.glitch.scanning.sae_feature_report import GlitchFeatures


@dataclass(frozen=True, kw_only=True)
class GlitchFeaturesCommand(SAEStudy["GlitchFeatures"]):
    """Find the SAE features that fire on glitch tokens.

    More than on ordinary tokens; also how well the SAE rebuilds both.

    Example: workbench glitch features sae --scan latest
    """

    run_name, step = "glitch-features", "features"

    no_check: bool = False
    """Take an SAE that does not fit the model's activations too."""
    tokens: tuple[int, ...] = ()
    """Ids of glitch tokens."""
    scan: Path | None = None
    """Run of `workbench glitch scan --verify top` (folder, name or latest): takes the tokens that it verified."""
    controls: int = 4
    """Ordinary tokens per glitch token, alike in length and leading space."""
    most: int = 200
    """Glitch tokens to compare; of more, so many are drawn at random."""
    fdr: float = 0.05
    """Expected share of false ones among the features that are named."""

    def measure(self, begin: Begin) -> GlitchFeatures:
        from workbench.glitch.scanning.sae_features import FeatureOptions, glitch_features
        from workbench.saes.formats.load import load_sae

        options = FeatureOptions(controls=self.controls, most=self.most, fdr=self.fdr, seed=self.seed)
        tokens, avoid = named_tokens(self.tokens, self.scan, self.out)
        model = self.load_model()
        sae = load_sae(self.sae_path(), str(model.device), model=model, check=not self.no_check)
        run = begin(model)
        report = glitch_features(model, sae, tokens, avoid=avoid, options=options)
        report.frame().to_csv(run.artifacts / "features.csv", index=False)
        return report

    def title(self, report: GlitchFeatures) -> str:
        return f"SAE features on glitch tokens of {report.model}"

    def summary(self, report: GlitchFeatures, folder: Path) -> Mapping[str, object]:
        return report.to_json() | {"metrics": report.metrics()}
