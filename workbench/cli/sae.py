"""Commands on the way from text to an SAE: harvest, sae train, sae eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from workbench.activations.sources import HubDataset, SelfText, Source, TextFiles
from workbench.cli.base import BaseCommand, Command, read_passages
from workbench.errors import InvalidInputError
from workbench.saes.config import SAEConfig


@dataclass(frozen=True, kw_only=True)
class Harvest(Command):
    """Store activations: from the model's own text, from text files or from a data set."""

    sites: tuple[str, ...] = ()
    """Where to read; by default the residual stream after the middle layer."""
    tokens: int = 81_920
    """How many tokens."""
    context: int = 64
    """Tokens per row."""
    files: tuple[Path, ...] = ()
    """Text files (.txt, .jsonl) instead of the model's own text."""
    dataset: str | None = None
    """Hugging Face data set (id or folder) instead of the model's own text."""
    split: str = "train"
    """Split of the data set."""
    column: str = "text"
    """Name of the text in the data set or in .jsonl lines."""

    def source(self) -> Source:
        """Where the tokens come from."""
        if self.files and self.dataset:
            raise InvalidInputError("harvest: --files and --dataset were both given. Choose one.")
        if self.files:
            return TextFiles(self.files, tokens=self.tokens, context=self.context, column=self.column)
        if self.dataset:
            return HubDataset(self.dataset, self.split, self.column, self.tokens, self.context)
        return SelfText(tokens=self.tokens, context=self.context, seed=self.seed)

    def run(self) -> None:
        """Harvests into the store, going on where an interrupted harvest stopped."""
        from workbench.activations.harvest import harvest
        from workbench.models.loading import load_model

        source, out = self.source(), self.out or Path("acts")
        model = load_model(self.model)
        store = harvest(model, source, self.sites or (f"resid_post.{model.n_layers // 2}",), out)
        m = store.manifest
        dropped = ", ".join(f"{n} {reason}" for reason, n in m.dropped.items())
        summary = {
            "store": store.path, "sites": store.sites, "tokens": m.n_tokens, "kept": m.kept, "dropped": m.dropped,
        }  # fmt: skip
        self.emit(
            summary,
            [f"Kept {m.kept} of {m.n_tokens} tokens ({m.kept_share:.1%}); dropped: {dropped}.", f"Store: {store.path}"],
        )


@dataclass(frozen=True, kw_only=True)
class SaeTrain(BaseCommand):
    """Train a TopK SAE on stored activations; an interrupted run goes on where it stopped."""

    store: tyro.conf.Positional[Path]
    """Folder of stored activations, from `workbench harvest`."""
    out: Path = Path("sae")
    """Folder of the SAE."""
    d_sae: int | None = None
    """Number of features; by default eight times the width of the site."""
    k: int = 32
    """Features that may be active on one token."""
    tokens: int = 600_000
    """Token-steps: tokens that are trained on, counted again in each epoch."""
    batch: int = 2048
    """Tokens per step."""
    lr: float | None = None
    """Peak learning rate; by default 1e-3 / sqrt(d_sae / 16384)."""
    site: str | None = None
    """Site to train on; by default the only one in the store."""
    architecture: str = "topk"
    """Kind of SAE. Only "topk" so far."""
    seed: int = 0
    """Seed of the initial weights and of the order of tokens."""

    def run(self) -> None:
        """Trains, saves, and prints the held-out numbers."""
        from workbench.activations.store import open_store
        from workbench.saes.train import train_sae

        store = open_store(self.store)
        site = store.site(self.site)
        config = SAEConfig(
            architecture=self.architecture, d_sae=self.d_sae or 8 * store.manifest.sites[site].d, k=self.k,
            tokens=self.tokens, batch=self.batch, lr=self.lr, seed=self.seed, site=site,
        )  # fmt: skip
        run = train_sae(store, config, self.out)
        m = run.metrics
        line = (
            f"Held-out FVU {m['fvu']:.3f}, L0 {m['l0']:.1f}, {m['dead']:.1%} of the features silent for "
            f"{config.dead_after} tokens; {m['steps']:.0f} steps in {m['seconds']:.0f} s."
        )
        self.emit({"sae": run.path, "metrics": m}, [line, f"SAE: {run.path}"])


@dataclass(frozen=True, kw_only=True)
class SaeEval(Command):
    """Evaluate an SAE: FVU, L0, loss recovered when it is spliced in, beside controls."""

    sae: tyro.conf.Positional[Path]
    """Folder of the SAE."""
    store: Path | None = None
    """Store whose held-out rows are used."""
    texts: Path | None = None
    """Text file, one passage per line, instead of a store."""
    rows: int = 64
    """Rows that are run through the model, at most."""

    def run(self) -> None:
        """Evaluates, writes the run folder, and says what was found."""
        from workbench.models.loading import load_model
        from workbench.saes.evaluate import EvalOptions, evaluate_sae
        from workbench.saes.io import load_sae

        rows, sae = self._rows(), load_sae(self.sae)
        model = load_model(self.model)
        with self.start("sae-eval") as run:
            run.note_model(model)
            report = evaluate_sae(model, sae, rows, options=EvalOptions(max_rows=self.rows, seed=self.seed))
            run.save_step("sae", report.section())
            html = run.finish(f"Evaluation of {self.sae}")
        lines = [*(f"- {finding}" for finding in report.findings()), f"Report: {html}"]
        self.emit({"run": run.path, "report": html, "metrics": report.section().metrics}, lines)

    def _rows(self) -> Any:
        from workbench.activations.store import open_store

        if (self.store is None) == (self.texts is None):
            raise InvalidInputError("sae eval: give --store FOLDER or --texts FILE, one of them.")
        if self.store is not None:
            return open_store(self.store)
        return read_passages(self.texts)
