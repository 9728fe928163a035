"""One SAE per site of a model, for circuits of features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from circuits.saes.report import TrainedSAEs
from circuits.saes.training import (
    MAX_FVU,
    STORE,
    TOKENS,
    SAEsEstimate,
    SAETrainingOptions,
    estimate_saes,
    spread_layers,
    train_saes,
)
from workbench.activations.plan import harvested_dtype
from workbench.activations.sources import SelfText, Source, TextFiles
from workbench.cli.study import Begin, Study
from workbench.cli.training import TrainingOptions
from workbench.core.errors import InvalidInputError
from workbench.models.model import Model
from workbench.saes.config import DEFAULT_K

KINDS = ("attn_out", "mlp_out", "resid_post")
"""What a block writes, and the stream behind it."""
LAYERS = 4
"""Layers where none are named."""


@dataclass(frozen=True, kw_only=True)
class CircuitSAEs(TrainingOptions, Study[TrainedSAEs]):
    """Train one SAE per site, for circuits of features.

    All share one store of activations. Names the sites whose SAE leaves out too much.

    Example: workbench circuit saes --layers 3 11 18 26 --estimate
    """

    run_name, step = "circuit-saes", "saes"

    layers: tuple[int, ...] = ()
    """Layers of the SAEs, the last one is -1; by default four, spread evenly."""
    kinds: tuple[str, ...] = KINDS
    """Sites of each layer."""
    sites: tuple[str, ...] = ()
    """Sites by name, such as embed or resid_post.3, instead of kinds and layers."""
    files: tuple[Path, ...] = ()
    """Text files (.txt, .jsonl, .parquet), folders or patterns of them, instead of the model's own text."""
    tokens: int = TOKENS
    """Tokens of text."""
    context: int = SelfText.context
    """Tokens per row."""
    max_fvu: float = MAX_FVU
    """Share of unexplained variance above which an SAE is named as bad."""
    saes: Path | None = None
    """Folder of the SAEs, used again if it holds them; by default one in the run folder."""
    estimate: bool = field(default=False, metadata={"config": False})
    """Say what it would take in time, memory and disk, and write nothing."""

    def named_sites(self, model: Model) -> list[str]:
        """The sites that were asked for.

        Raises:
            InvalidInputError: for a layer that the model does not have, or sites together with layers.
        """
        if self.sites:
            if self.layers or self.kinds != KINDS:
                raise InvalidInputError("circuit saes: --sites names all sites. Leave out --layers and --kinds.")
            return list(self.sites)
        n = model.n_layers
        wrong = [layer for layer in self.layers if not -n <= layer < n]
        if wrong:
            raise InvalidInputError(
                f"circuit saes: --layers {wrong[0]}; {model.name} has layers 0 to {n - 1}. Choose among these."
            )
        layers = [layer % n for layer in self.layers] or spread_layers(n, LAYERS)
        return [f"{kind}.{layer}" for layer in layers for kind in self.kinds]

    def options(self) -> SAETrainingOptions:
        """What the library is called with."""
        defaults = SAETrainingOptions()
        # written as the library writes it, so that both continue the same folder
        k = None if self.k == DEFAULT_K else self.k
        sae = dataclasses.replace(defaults.sae, k=k, tokens=self.training_tokens, seed=self.seed)
        return SAETrainingOptions(
            tokens=self.tokens, context=self.context, expansion=self.expansion, sae=sae, max_fvu=self.max_fvu,
            seed=self.seed,
        )  # fmt: skip

    def source(self) -> Source | None:
        """The text; None for the model's own."""
        return TextFiles(self.files, tokens=self.tokens, context=self.context) if self.files else None

    def measure(self, begin: Begin) -> TrainedSAEs | None:
        source, options = self.source(), self.options()
        model = self.load_model()
        sites = self.named_sites(model)
        if self.estimate:
            self._show_estimate(estimate_saes(model, sites, self.saes or self.out, source=source, options=options))
            return None
        run = begin(model)
        return train_saes(model, sites, self.saes or run.artifacts / "saes", source=source, options=options)

    def load_model(self, *, check: bool = True) -> Model:
        """The model; in the precision of the activations that `--saes` holds, if there are some."""
        if self.saes is not None and self.dtype == "auto":
            return self.load(dtype=harvested_dtype(self.saes / STORE), check=check)
        return super().load_model(check=check)

    def _show_estimate(self, found: SAEsEstimate) -> None:
        before = found.harvest
        summary: dict[str, object] = {
            "saes": found.sites, "passes": found.passes, "seconds": found.seconds, "memory_bytes": found.memory_bytes,
            "disk_bytes": found.disk_bytes, "harvest_seconds": None if before is None else before.seconds,
            "harvest_memory_bytes": None if before is None else before.memory_bytes,
            "harvest_disk_bytes": None if before is None else before.disk_bytes,
        }  # fmt: skip
        self.emit(summary, [f"{found}."])

    def title(self, report: TrainedSAEs) -> str:
        return "SAEs for circuits"

    def summary(self, report: TrainedSAEs, folder: Path) -> Mapping[str, object]:
        return {
            "saes": report.folder, "findings": report.findings(), "above_limit": report.above,
            "sites": report.frame().to_dict("records"),
        }  # fmt: skip

    def places(self, report: TrainedSAEs, folder: Path) -> str:
        return f"SAEs: {report.folder}; report: {folder / 'report.html'}"


if __name__ == "__main__":
    import tyro

    tyro.cli(CircuitSAEs).run()
