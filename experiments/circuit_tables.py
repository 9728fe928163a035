"""The one-call tables of circuits as commands: logit lens, activation patching, attention heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from workbench.cli.base import model_words, typed
from workbench.cli.study import Begin, R, Study
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted

if TYPE_CHECKING:
    from circuits.classics.head_scores import HeadScores
    from circuits.classics.logit_lens import LogitLens
    from circuits.classics.patch_grid import PatchGrid
    from circuits.classics.tables import TableReport
    from circuits.pairs import Pairs
    from workbench.models.model import Model
    from workbench.runs.run import RunDir

TABLE = "table.csv"
"""File of the whole table among the artifacts of a run."""


def keep(run: RunDir, report: TableReport) -> None:
    """Writes the whole table into the run folder."""
    report.frame().to_csv(run.artifacts / TABLE)


@dataclass(frozen=True, kw_only=True)
class PairsStudy(Study[R]):
    """A study of pairs of prompts, from a file or from a behaviour."""

    pairs: Path | None = None
    """File with one JSON object per line: clean_prefix, patch_prefix, clean_answer, patch_answer."""
    task: str = ""
    """Behaviour whose pairs are made, such as sva_nounpp, instead of a file."""
    split: Literal["train", "test"] = "test"
    """Words that the pairs of a behaviour are made of."""
    limit: int = 40
    """Pairs at most."""

    def read_pairs(self, model: Model) -> Pairs:
        """The pairs.

        Raises:
            InvalidInputError: if both a file and a behaviour were given, or neither.
        """
        from circuits.pairs import Pairs

        if bool(self.task) == (self.pairs is not None):
            given = "both" if self.task else "neither"
            raise InvalidInputError(f"The pairs: {given} given. Give --pairs FILE.jsonl or --task NAME, one of them.")
        if self.pairs is not None:
            return Pairs.from_jsonl(self.pairs, model, limit=self.limit)
        from circuits.behaviours.making import pairs

        return pairs(self.task, model, self.split, self.limit, self.seed)


@dataclass(frozen=True, kw_only=True)
class CircuitLens(PairsStudy["LogitLens"]):
    """Read what each layer would say if the model ended there.

    The logit lens, beside the reading of another token.

    Example: workbench circuit lens "The capital of France is" --target " Paris"
    """

    run_name = "circuit-lens"
    step = "lens"

    text: tyro.conf.Positional[str] = ""
    """Text to read; or give --pairs or --task."""
    target: str = ""
    """Token that is looked for behind the text."""
    sites: tuple[str, ...] = ("resid_post",)
    """Where to read, in the residual stream."""
    k: int = 5
    """Tokens per site and token."""

    def measure(self, begin: Begin) -> LogitLens:
        from circuits.classics.logit_lens import logit_lens

        model = self.load_model(check=False)
        if self.text and (self.task or self.pairs):
            raise InvalidInputError("A text and pairs were given. Give one of them.")
        if not (self.text or self.task or self.pairs):
            raise InvalidInputError("There is nothing to read. Give a text, --pairs FILE.jsonl or --task NAME.")
        what = self.text or self.read_pairs(model)
        report = logit_lens(model, what, self.sites, k=self.k, target=self.target or None, seed=self.seed)
        keep(begin(model), report)
        return report


@dataclass(frozen=True, kw_only=True)
class CircuitPatch(PairsStudy["PatchGrid"]):
    """Patch every layer and position from the other prompt.

    Exact: every cell is a run. Beside each, the patch of a third prompt.

    Example: workbench circuit patch --task sva --sites resid_pre attn_out mlp_out
    """

    run_name = "circuit-patch"
    step = "patch"

    sites: tuple[str, ...] = ("resid_pre", "attn_out", "mlp_out")
    """What is patched: kinds of sites, or single ones; z is every head."""
    by: Literal["position", "all"] = "position"
    """One token at a time, or all tokens that differ at once."""
    metric: Literal["logit_difference", "log_probability", "negative_logit", "kl"] = "logit_difference"
    """What the effect is measured by."""
    align: Literal["start", "end"] = "start"
    """Where positions count from; from the start, pairs of the commonest length are taken."""
    rows: int = 64
    """Prompts per forward pass; less memory, same numbers."""

    def measure(self, begin: Begin) -> PatchGrid:
        from circuits.classics.patch_grid import patch_grid
        from circuits.metrics import AnswerMetric

        model = self.load_model()
        pairs = self.read_pairs(model)
        if self.align == "start":
            pairs = pairs.of_one_length()
        model.site_map.named(self.sites)
        run = begin(model)
        report = patch_grid(
            model, pairs, AnswerMetric(self.metric), self.sites, by=self.by, align=self.align, rows=self.rows,
            seed=self.seed,
        )  # fmt: skip
        keep(run, report)
        return report

    def details(self, report: PatchGrid, folder: Path) -> Iterable[str]:
        return [f"{counted(len(report.totals), 'pairs')}, {counted(len(report.cells), 'cells')}."]

    def following(self, report: PatchGrid, folder: Path) -> str:
        return typed("circuit", "heads", *model_words(self.model))


@dataclass(frozen=True, kw_only=True)
class CircuitHeads(Study["HeadScores"]):
    """Score attention heads: induction, copying and others.

    Also previous, duplicate, first and own token, entropy and successor, each beside its null.

    Example: workbench circuit heads
    """

    run_name = "circuit-heads"
    step = "heads"

    repeated: int = 50
    """Tokens of the random text that is repeated."""
    sequences: int = 8
    """Random texts."""
    tokens: int = 2_000
    """Tokens that are sampled to see what weights copy."""
    no_weights: bool = False
    """Read attention patterns only."""

    def measure(self, begin: Begin) -> HeadScores:
        from circuits.classics.head_scores import head_scores

        model = self.load_model()
        run = begin(model)
        report = head_scores(
            model, repeated=self.repeated, sequences=self.sequences, weights=not self.no_weights, tokens=self.tokens,
            seed=self.seed,
        )  # fmt: skip
        keep(run, report)
        return report
