"""Can the model be steered to refuse, and does that spare harmless prompts and ordinary text?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench.bases.sae import SAELike
from workbench.cli.base import read_passages
from workbench.cli.places import sae_folder
from workbench.cli.study import Begin, SAEOptionStudy
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model
from workbench.steering.refusal.refusal_report import RefusalReport
from workbench.steering.refusal.study import RefusalOptions, refusal_study


def study(
    model: Model,
    sae: SAELike | None,
    texts: Sequence[str] | TokenBatch | None = None,
    *,
    site: str | None = None,
    options: RefusalOptions | None = None,
) -> RefusalReport:
    """Steers refusal with a direction and with SAE features, beside their controls.

    Args:
        model: the model.
        sae: its SAE, or None to study the direction alone.
        texts: plain text for the loss that steering costs; by default short passages that come with the package.
        site: where to steer; by default where the SAE reads.
        options: sizes and strengths.
    """
    return refusal_study(model, sae, texts, site=site, options=options)


@dataclass(frozen=True, kw_only=True)
class Refusal(SAEOptionStudy[RefusalReport]):
    """Steer refusal with a direction and with SAE features.

    Random directions and features are the controls.

    Example: workbench refusal --sae sae
    """

    run_name = step = "refusal"
    keeps_json = True

    sae: Path | None = None
    """SAE: its folder, or a run that holds one (folder, name or latest); without one only the direction is studied."""
    site: str | None = None
    """Where to steer, such as resid_post.15; by default where the SAE reads, or the middle layer."""
    texts: Path | None = None
    """Text file, one passage per line, for the loss on plain text; by default short passages of our own."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Multiples of the refusal direction (the difference of means) to add."""
    clamps: tuple[float, ...] = (0.5, 1.0)
    """Multiples of their largest activation to which the features are set."""
    features: int = 3
    """Number of features that are clamped together."""
    test_pairs: int = 12
    """Pairs of a harmful and a harmless prompt on which everything is reported."""
    new_tokens: int = 20
    """Longest reply, in tokens."""

    def options(self) -> RefusalOptions:
        """What the library is called with."""
        return RefusalOptions(
            n_test=self.test_pairs,
            strengths=self.strengths,
            clamps=self.clamps,
            n_features=self.features,
            n_candidates=max(8, self.features),
            new_tokens=self.new_tokens,
            seed=self.seed,
        )

    def measure(self, begin: Begin) -> RefusalReport:
        from workbench.saes.formats.load import load_sae

        options, texts = self.options(), read_passages(self.texts)
        path = self.sae_path()
        sae = None if path is None else load_sae(path)
        model = self.load_model()
        site = self.site or (f"resid_post.{model.n_layers // 2}" if sae is None else None)
        begin(model)
        return study(model, sae, texts, site=site, options=options)

    def sae_path(self) -> Path | None:
        return None if self.sae is None else sae_folder(self.sae, self.runs_folder())

    def title(self, report: RefusalReport) -> str:
        return f"Refusal steering of {report.model}"


if __name__ == "__main__":
    import tyro

    tyro.cli(Refusal).run()
