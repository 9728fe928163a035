"""The one-call tables of circuits as commands: patching, paths, direct attribution, attention heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workbench.cli.base import model_words, typed
from workbench.cli.study import Begin, R, Study
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted

if TYPE_CHECKING:
    from circuits.classics.direct import DirectAttribution
    from circuits.classics.head_scores import HeadScores
    from circuits.classics.patch_grid import PatchGrid
    from circuits.classics.path_patch import PathEffects
    from circuits.pairs import Pairs
    from workbench.engine.keeper import Keeper
    from workbench.models.model import Model
    from workbench.report.base import Report
    from workbench.runs.run import RunDir

TABLE, PARTS = "table.csv", "parts"
"""Among the artifacts of a run: file of the whole table, and folder of what a stopped run keeps."""


def keep(run: RunDir, report: Report) -> None:
    """Writes the whole table into the run folder."""
    report.frame().to_csv(run.artifacts / TABLE)


def opened(run: RunDir, pairs: Pairs, of: Path | None = None) -> Keeper:
    """What a stopped run of these pairs, and of a circuit that another run found, keeps."""
    from workbench.engine.keeper import Keeper

    rows = [pairs.clean.ids.tolist(), None if pairs.patch is None else pairs.patch.ids.tolist()]
    key = {"pairs": rows, "answers": pairs.answers.tolist(), "circuit": None if of is None else of.name}
    return Keeper.open(run.artifacts / PARTS, key)


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
class CircuitPatch(PairsStudy["PatchGrid"]):
    """Patch every layer and position from the other prompt.

    Exact: every cell is a run. Beside each, the patch of a third prompt.

    Example: workbench circuit patch --task sva_nounpp --sites resid_pre attn_out mlp_out
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
        with opened(run, pairs) as parts:
            report = patch_grid(
                model, pairs, AnswerMetric(self.metric), self.sites, by=self.by, align=self.align, rows=self.rows,
                seed=self.seed, keep=parts,
            )  # fmt: skip
        keep(run, report)
        return report

    def details(self, report: PatchGrid, folder: Path) -> Iterable[str]:
        return [f"{counted(len(report.totals), 'pairs')}, {counted(len(report.cells), 'cells')}."]

    def following(self, report: PatchGrid, folder: Path) -> str:
        return typed("circuit", "heads", *model_words(self.model))


@dataclass(frozen=True, kw_only=True)
class CircuitPaths(PairsStudy["PathEffects"]):
    """Patch single paths: which component tells which other.

    Exact, two runs per path. Beside each, a third prompt through the same path.

    Example: workbench circuit paths --task ioi --senders "z.*.h*" --receivers logits
    """

    run_name = "circuit-paths"
    step = "paths"

    senders: tuple[str, ...] = ("z.*.h*",)
    """Sites whose output is patched, or patterns."""
    receivers: tuple[str, ...] = ("logits",)
    """What hears of it: logits, q.9.h1, k.9.h0, v.9.h0, z.9.h1, mlp_out.9, resid_pre.9."""
    freeze_mlps: bool = False
    """Hold every MLP in between too, so that paths do not overlap."""
    metric: Literal["logit_difference", "log_probability", "negative_logit", "kl"] = "logit_difference"
    """What the effect is measured by."""
    align: Literal["start", "end"] = "start"
    """Where positions count from; from the start, pairs of the commonest length are taken."""

    def measure(self, begin: Begin) -> PathEffects:
        from circuits.classics.path_patch import path_patch
        from circuits.metrics import AnswerMetric

        model = self.load_model()
        pairs = self.read_pairs(model)
        if self.align == "start":
            pairs = pairs.of_one_length()
        model.site_map.named(self.senders)
        model.site_map.named([name for name in self.receivers if name != "logits"])
        run = begin(model)
        report = path_patch(
            model, pairs, AnswerMetric(self.metric), self.senders, self.receivers, freeze_mlps=self.freeze_mlps,
            align=self.align, seed=self.seed,
        )  # fmt: skip
        keep(run, report)
        return report

    def following(self, report: PathEffects, folder: Path) -> str:
        return typed("circuit", "heads", *model_words(self.model))


@dataclass(frozen=True, kw_only=True)
class CircuitAttribution(PairsStudy["DirectAttribution"]):
    """Say which component writes the answer directly.

    Components add up to the logit difference exactly. Beside each, its ablation.

    Example: workbench circuit attribution --task ioi --by head
    """

    run_name = "circuit-attribution"
    step = "attribution"

    by: Literal["head", "layer", "component"] = "component"
    """What a part is: attn_out and mlp_out, both together, or heads and mlp_out."""
    no_ablation: bool = False
    """Leave out the ablations, which are most of the work."""
    rows: int = 256
    """Prompts per forward pass; less memory, same numbers."""

    def measure(self, begin: Begin) -> DirectAttribution:
        from circuits.classics.direct import direct_logit_attribution

        if self.rows < 1:
            raise InvalidInputError(f"--rows {self.rows}: at least 1.")
        model = self.load_model()
        pairs = self.read_pairs(model)
        run = begin(model)
        report = direct_logit_attribution(model, pairs, self.by, ablate=not self.no_ablation, rows=self.rows)
        keep(run, report)
        return report

    def following(self, report: DirectAttribution, folder: Path) -> str:
        own = ["--pairs", self.pairs] if self.pairs else ["--task", self.task, "--split", self.split]
        return typed("circuit", "paths", *own, *model_words(self.model))


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
        from workbench.engine.keeper import Keeper

        model = self.load_model()
        run = begin(model)
        with Keeper.open(run.artifacts / PARTS, {"model": model.fingerprint, "dtype": str(model.dtype)}) as parts:
            report = head_scores(
                model, repeated=self.repeated, sequences=self.sequences, weights=not self.no_weights,
                tokens=self.tokens, seed=self.seed, keep=parts,
            )  # fmt: skip
        keep(run, report)
        return report
