"""Lenses as a command: what each layer would say, read as it is or through fitted maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from experiments.circuit_tables import PairsStudy, keep
from workbench.cli.base import model_words, typed
from workbench.cli.study import Begin
from workbench.core.errors import InvalidInputError

if TYPE_CHECKING:
    from circuits.pairs import Pairs
    from workbench.features.lenses.linear import LinearLens
    from workbench.models.model import Model
    from workbench.report.base import Report

LENS = "lens"
"""Folder of a fitted lens among the artifacts of a run."""


@dataclass(frozen=True, kw_only=True)
class CircuitLens(PairsStudy["Report"]):
    """Read what each layer would say if the model ended there.

    The logit lens, or one with a map per layer, beside its controls.

    Example: workbench circuit lens "The capital of France is" --target " Paris"
    """

    run_name = "circuit-lens"
    step = "lens"

    text: tyro.conf.Positional[str] = ""
    """Text to read; or give --pairs or --task."""
    kind: Literal["logit", "regression", "tuned", "jacobian"] = "logit"
    """The stream as it is, or maps that are fitted to the output of the last block."""
    fit: tuple[Path, ...] = ()
    """Files of text to fit the maps on: .txt, .jsonl or .parquet; a lens is kept in the run folder."""
    fitted: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder of a lens that was fitted before, also of tuned-lens, or a .pt file of a Jacobian lens."""
    column: str = "text"
    """Of .jsonl and .parquet files."""
    texts: int = 200
    """Texts of the files at most, for a regression or tuned lens."""
    prompts: int = 25
    """Prompts of a Jacobian lens: each costs a backward pass per dimension."""
    steps: int = 250
    """Of a tuned lens."""
    estimate: bool = field(default=False, metadata={"config": False})
    """Say what a Jacobian lens will take, and fit nothing."""
    target: str = ""
    """Token that is looked for behind the text."""
    sites: tuple[str, ...] = ()
    """Where to read, in the residual stream; by default the output of every block."""
    k: int = 5
    """Tokens per site and token."""

    def measure(self, begin: Begin) -> Report | None:
        self._require_options()
        model = self.load_model(check=False)
        if self.estimate:
            return self._show_estimate(model)
        if self.text and (self.task or self.pairs):
            raise InvalidInputError("A text and pairs were given. Give one of them.")
        if not (self.text or self.task or self.pairs):
            raise InvalidInputError("There is nothing to read. Give a text, --pairs FILE.jsonl or --task NAME.")
        what = self.text or self.read_pairs(model)
        return self._logit(begin, model, what) if self.kind == "logit" else self._read(begin, model, what)

    def _require_options(self) -> None:
        if self.kind == "logit" and (self.fit or self.fitted):
            raise InvalidInputError(
                "--kind logit reads the stream as it is. Say what --fit or --from is: --kind regression, tuned or "
                "jacobian."
            )
        if self.kind != "logit" and bool(self.fit) == (self.fitted is not None):
            given = "both" if self.fit else "neither"
            raise InvalidInputError(
                f"--kind {self.kind}: {given} given of --fit and --from. Give --fit FILES of text, or --from FOLDER of "
                "a lens that was fitted before."
            )
        if self.estimate and not (self.kind == "jacobian" and self.fit):
            raise InvalidInputError("--estimate is of a fit by --kind jacobian --fit FILES. Give both.")

    def _logit(self, begin: Begin, model: Model, what: str | Pairs) -> Report:
        from circuits.classics.logit_lens import logit_lens

        sites = self.sites or ("resid_post",)
        report = logit_lens(model, what, sites, k=self.k, target=self.target or None, seed=self.seed)
        keep(begin(model), report)
        return report

    def _read(self, begin: Begin, model: Model, what: str | Pairs) -> Report:
        from circuits.pairs import Pairs
        from workbench.features.lenses.fitting import fit_lens
        from workbench.features.lenses.loading import load_lens
        from workbench.features.lenses.tuned import TunedOptions

        beside: dict[str, LinearLens] = {}
        if self.fitted is not None:
            lens = load_lens(self.fitted, model)
            self._require_kind(lens)
            run = begin(model)
        else:
            texts, sites = self._texts(), self.sites or None
            run = begin(model)
            options = TunedOptions(steps=self.steps, seed=self.seed)
            lens = fit_lens(
                model, self.kind, texts, sites=sites, prompts=self.prompts, options=options, out=run.artifacts / LENS,
            )  # fmt: skip
            if self.kind != "regression":
                beside = {"regression": fit_lens(model, "regression", texts, sites=sites)}
        is_text = not isinstance(what, Pairs)
        report = lens.read(
            model, what if is_text else what.clean, positions=None if is_text else (-1,), sites=self.sites or None,
            k=self.k, target=(self.target or None) if is_text else what.answers[:, 0], beside=beside, seed=self.seed,
        )  # fmt: skip
        keep(run, report)
        return report

    def _require_kind(self, lens: LinearLens) -> None:
        if lens.kind != self.kind:
            raise InvalidInputError(f"--from {self.fitted}: it is a {lens.kind} lens. Give --kind {lens.kind}.")

    def _texts(self) -> list[str]:
        from itertools import chain, islice

        from workbench.activations.files import documents, text_files

        every = chain.from_iterable(documents(path, self.column) for path in text_files(self.fit))
        return list(islice((text for text in every if text.strip()), self.texts))

    def _show_estimate(self, model: Model) -> None:
        from workbench.features.lenses.jacobian import jacobian_lens

        found = jacobian_lens(model, self._texts(), self.prompts, sites=self.sites or None).estimate()
        summary = {"seconds": found.seconds, "memory_bytes": found.memory_bytes, "disk_bytes": found.disk_bytes}
        self.emit(summary, [f"{found}."])

    def following(self, report: Report, folder: Path) -> str | None:
        if not self.fit:
            return super().following(report, folder)
        own = ["--kind", self.kind, "--from", folder / "artifacts" / LENS]
        return typed("circuit", "lens", self.text or "The capital of France is", *own, *model_words(self.model))
