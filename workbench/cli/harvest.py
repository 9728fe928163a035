"""The command that stores activations: harvest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from workbench.activations.plan import HarvestEstimate, HarvestOptions, estimate_harvest, harvested_dtype
from workbench.activations.sources import OWN_TEXT_TOKENS, HubDataset, SelfText, Source, TextFiles
from workbench.activations.store import ActivationStore
from workbench.cli.base import Command, typed
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import byte_size, percent


@dataclass(frozen=True, kw_only=True)
class Harvest(Command):
    """Store activations of the model's own text or of other text.

    An interrupted harvest continues when the same command is given again.

    Example: workbench harvest --tokens 100000 --out acts
    """

    takes_addresses: ClassVar[bool] = True

    sites: tuple[str, ...] = ()
    """Where to read; by default the residual stream after the middle layer."""
    tokens: int = OWN_TEXT_TOKENS
    """How many tokens."""
    context: int = SelfText.context
    """Tokens per row."""
    files: tuple[Path, ...] = ()
    """Text files (.txt, .jsonl, .parquet), folders or patterns of them, instead of the model's own text."""
    dataset: str | None = None
    """Hugging Face data set (id or folder) instead of the model's own text."""
    split: str = "train"
    """Split of the data set."""
    column: str = "text"
    """Name of the text in the data set, in .jsonl lines or in .parquet files."""
    stored: Literal["bfloat16", "int8"] = "bfloat16"
    """Data type of what is stored; int8 takes half the space."""
    out: Path = Path("acts")
    """Folder of the store, or an address such as s3://bucket/acts."""
    repair: bool = False
    """Make damaged and missing shards of the store again."""
    estimate: bool = False
    """Say what the harvest would take in disk, memory and time, and write nothing."""

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

        source, out = self.source(), self.out
        # a store that was begun is continued in its precision
        model = self.load(dtype=self.dtype if self.dtype != "auto" else harvested_dtype(out), check=True)
        sites = self.sites or (f"resid_post.{model.n_layers // 2}",)
        options = HarvestOptions(dtype=self.stored)
        if self.estimate:
            self._show_estimate(estimate_harvest(model, source, sites, out, options=options))
            return
        self._show_store(harvest(model, source, sites, out, options=options, repair=self.repair))

    def _show_estimate(self, found: HarvestEstimate) -> None:
        free = [f"{byte_size(found.free_memory_bytes)} of memory"]
        if found.free_disk_bytes is not None:
            free.insert(0, f"{byte_size(found.free_disk_bytes)} of disk")
        self.emit(
            {
                "tokens": found.tokens,
                "disk_bytes": found.disk_bytes,
                "free_disk_bytes": found.free_disk_bytes,
                "memory_bytes": found.memory_bytes,
                "free_memory_bytes": found.free_memory_bytes,
                "tokens_per_second": found.tokens_per_second,
                "seconds": found.seconds,
            },
            [f"{found}.", f"Free: {' and '.join(free)}."],
        )

    def _show_store(self, store: ActivationStore) -> None:
        m = store.manifest
        summary: dict[str, object] = {
            "store": str(store.path), "sites": store.sites, "tokens": m.n_tokens, "kept": m.kept, "dropped": m.dropped,
            "dtype": m.dtype, "unique_share": m.unique_share,
        }  # fmt: skip
        if not m.done:
            lines = [f"This process is done: {m.kept} tokens kept of {m.n_tokens}. Others still write to {store.path}."]
            self.emit(summary, lines)
            return
        dropped = ", ".join(f"{n} {reason}" for reason, n in m.dropped.items())
        lines = [f"Kept {m.kept} of {m.n_tokens} tokens ({percent(m.kept_share)}); dropped: {dropped}."]
        if m.shortfall:
            lines.insert(0, m.shortfall)
        if m.unique_share is not None:
            lines.append(f"Rows that are no exact repetition: {percent(m.unique_share)}.")
        several = ["--site", store.sites[0]] if len(store.sites) > 1 else []
        self.emit(summary, [*lines, f"Store: {store.path}"], typed("sae", "train", store.path, *several))
