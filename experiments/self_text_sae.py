"""How good is an SAE that was trained on nothing but the model's own text?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from workbench.activations.harvest import harvest
from workbench.activations.sources import OWN_TEXT_TOKENS, SelfText
from workbench.activations.store import ActivationStore
from workbench.cli.study import Begin, Study
from workbench.cli.training import TrainingOptions
from workbench.core.numbers import counted, number
from workbench.core.records import json_lines
from workbench.models.model import Model
from workbench.report.base import Headline, Lines, Report, Section, Series, Table
from workbench.saes.config import SAEConfig
from workbench.saes.evaluation.evaluate import EvalOptions, SAEReport, evaluate_sae
from workbench.saes.formats.load import load_sae
from workbench.saes.training.train import SAERun, train_sae


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes of the study.

    Attributes:
        tokens: tokens that the model writes.
        context: tokens per row of its text.
        seed: of the text and of the evaluation's controls.
        sae: the SAE and its training.
        evaluation: rows and batches of the evaluation.
        shares: further SAEs are trained on these shares of the text, to show what more text would bring.
    """

    tokens: int = OWN_TEXT_TOKENS
    context: int = SelfText.context
    seed: int = 0
    sae: SAEConfig = field(default_factory=SAEConfig)
    evaluation: EvalOptions = field(default_factory=EvalOptions)
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class SelfTextReport(Report):
    """An SAE on own text: its evaluation, its training and, if asked for, the curve over the amount of text.

    Attributes:
        quality: evaluation on held-out rows.
        steps: (token-steps, held-out FVU) during training.
        curve: (tokens of text, held-out FVU) for SAEs on less text, and this one.
        kept: kept tokens of the store.
        dropped: tokens that were left out, by reason.
        seconds: training time.
    """

    quality: SAEReport
    steps: tuple[tuple[int, float], ...]
    curve: tuple[tuple[int, float], ...]
    kept: int
    dropped: dict[str, int]
    seconds: float

    def findings(self) -> tuple[str, ...]:
        """Those of the evaluation, and what more text brings."""
        if len(self.curve) < 2:
            return self.quality.findings()
        (few, worse), (many, better) = self.curve[0], self.curve[-1]
        return (
            *self.quality.findings(),
            f"Held-out FVU goes from {number(worse)} with {counted(few, 'tokens')} of text to {number(better)} with "
            f"{number(many)}.",
        )

    def headline(self) -> Headline:
        """That of the evaluation."""
        return self.quality.headline()

    def section(self) -> Section:
        """The evaluation with training curve and dropped tokens."""
        section = self.quality.section()
        tokens = Table(
            ("tokens", "count"),
            (("kept", self.kept), *self.dropped.items()),
            "The model's own text, and what was left out.",
        )
        training = Lines(
            "Held-out FVU during training",
            (_series("this SAE", self.steps),),
            "token-steps",
            "FVU",
            caption=f"{number(self.seconds)} s of training; packed rows that were not trained on.",
        )
        blocks = [*section.blocks, tokens, training]
        if len(self.curve) > 1:
            blocks.append(
                Lines(
                    "FVU by amount of text",
                    (_series("FVU", self.curve),),
                    "tokens of own text",
                    "held-out FVU",
                    log_x=True,
                )
            )
        metrics = {**section.metrics, "train_seconds": self.seconds, "train_fvu_heldout": self.steps[-1][1]}
        return replace(section, blocks=tuple(blocks), findings=self.findings(), metrics=metrics)


def study(model: Model, site: str, store: Path, sae: Path, options: Options | None = None) -> SelfTextReport:
    """Own text to store to SAE to evaluation; each part is resumed or re-used if its folder holds it.

    Args:
        model: the model.
        site: where to read.
        store: folder of the activations.
        sae: folder of the SAE; the SAEs on less text go beside it.
        options: sizes.
    """
    options = options or Options()
    source = SelfText(tokens=options.tokens, context=options.context, seed=options.seed)
    stored = harvest(model, source, [site], store)
    curve = []
    for share in sorted(options.shares):
        n = int(share * stored.manifest.n_tokens)
        part = train_sae(stored, replace(options.sae, distinct_tokens=n), sae.with_name(f"{sae.name}-{n}-tokens"))
        curve.append((n, part.metrics["fvu"]))
    run = train_sae(stored, options.sae, sae)
    curve.append((stored.manifest.n_tokens, run.metrics["fvu"]))
    evaluation = replace(options.evaluation, seed=options.seed)
    quality = evaluate_sae(model, load_sae(sae), stored, options=evaluation)
    return _report(quality, run, stored, tuple(curve))


def _report(
    quality: SAEReport, run: SAERun, store: ActivationStore, curve: tuple[tuple[int, float], ...]
) -> SelfTextReport:
    steps = tuple((line["tokens"], line["fvu"]) for line in json_lines(run.path / "metrics.jsonl"))
    return SelfTextReport(quality, steps, curve, store.manifest.kept, store.manifest.dropped, run.metrics["seconds"])


def _series(name: str, points: tuple[tuple[int, float], ...]) -> Series:
    return Series(name, tuple(x for x, _ in points), tuple(y for _, y in points))


@dataclass(frozen=True, kw_only=True)
class SelfTextSAE(TrainingOptions, Study[SelfTextReport]):
    """Train and evaluate an SAE on text that the model writes itself."""

    run_name, step = "self-text-sae", "sae"

    site: str | None = None
    """Where to read; by default the residual stream after the middle layer."""
    tokens: int = OWN_TEXT_TOKENS
    """Tokens of its own text that the model writes."""
    context: int = SelfText.context
    """Tokens per row of its text."""
    rows: int = 64
    """Held-out rows that the evaluation runs through the model."""
    shares: tuple[float, ...] = ()
    """Train further SAEs on these shares of the text, such as 0.25 0.5, to show what more text brings."""

    def measure(self, begin: Begin) -> SelfTextReport:
        model = self.load_model()
        site = str(model.resolve(self.site or f"resid_post.{model.n_layers // 2}"))
        options = Options(
            tokens=self.tokens, context=self.context, seed=self.seed, shares=self.shares,
            sae=self.sae_config(model.width(site), self.seed), evaluation=EvalOptions(max_rows=self.rows),
        )  # fmt: skip
        run = begin(model)
        return study(model, site, run.artifacts / "store", run.artifacts / "sae", options)

    def title(self, report: SelfTextReport) -> str:
        return f"SAE on own text, {report.quality.site}"

    def summary(self, report: SelfTextReport, folder: Path) -> Mapping[str, object]:
        return {"sae": folder / "artifacts" / "sae", "findings": report.findings()}

    def places(self, report: SelfTextReport, folder: Path) -> str:
        return f"SAE: {folder / 'artifacts' / 'sae'}; report: {folder / 'report.html'}"


if __name__ == "__main__":
    import tyro

    tyro.cli(SelfTextSAE).run()
