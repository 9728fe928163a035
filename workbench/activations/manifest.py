"""What a store says about itself: model, source, sites, rules, and the checksum of each shard."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from workbench.activations.quant import Int8Code
from workbench.controls.tokens import SINK_FACTOR
from workbench.core.display import OneLine
from workbench.core.errors import CorruptFileError, InvalidInputError
from workbench.core.jsontext import Json, parse_json
from workbench.core.records import from_jsonable, to_jsonable
from workbench.engine.local import Folder

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
HELD_OUT_EVERY = 10
DROP_REASONS = ("kept", "first of its row", "special token", "norm beyond the sink limit")

Dtype = Literal["bfloat16", "int8"]


@dataclass(frozen=True, kw_only=True)
class SiteStats:
    """Width of a site, norms of its kept tokens, and how int8 values turn into activations.

    Attributes:
        max_norm: sink limit; tokens beyond it are dropped.
        median_norm: over the kept tokens of the first shard.
        channel_mean: of each channel over the first 100,000 kept tokens of the first shard; for int8 only.
        int8_fvu: variance lost by int8 on those tokens, as a share.
    """

    d: int
    max_norm: float
    mean_norm: float | None = None
    median_norm: float | None = None
    std_norm: float | None = None
    mean_square_norm: float | None = None
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()
    int8_fvu: float | None = None

    def code(self) -> Int8Code:
        """How int8 values of this site turn into activations."""
        return Int8Code(torch.tensor(self.channel_mean), torch.tensor(self.channel_std))


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One file: packed rows `first_row` to `first_row + n_rows`, of which `kept` tokens are stored.

    Attributes:
        sha256: of the file; what a resumed or repaired harvest and `verify` go by.
        xxh3: of the file, 128 bits; ten times as fast, for reading. Stores of version 1 have none.
        norm_sums: for each site, the sum of the norms of the kept tokens and of their squares.
    """

    file: str
    sha256: str
    first_row: int
    n_rows: int
    kept: int
    dropped: dict[str, int]
    norm_sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    xxh3: str = ""


@dataclass(frozen=True)
class Packing(OneLine):
    """How text became rows of tokens.

    Attributes:
        crosses_documents: whether attention reaches from one document of a row into another.
        starts_with_bos: whether every row opens with BOS, or what stands for it; None where that is not known.
    """

    row_start: str
    separator: str
    crosses_documents: bool
    padding: str = "none"
    starts_with_bos: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds.

    Attributes:
        model_dtype: precision that the model ran in; None in older stores.
        model_source: what `load_model` takes to load the model; None in older stores and for one made in memory.
        sink_factor: the sink limit of a site is this many times the median norm of the first forward pass.
        n_tokens: tokens that were run through the model, kept or not.
        unique_rows: packed rows without their exact repetitions, by a 64-bit hash.
        held_out_every: packed row r is held out from training if `r % held_out_every == held_out_every - 1`.
    """

    model_name: str
    model_fingerprint: str
    source: dict[str, Json]
    sites: dict[str, SiteStats]
    context: int
    special_ids: tuple[int, ...]
    shard_rows: int
    batch_rows: int
    dtype: Dtype = "bfloat16"
    tokenizer_sha256: str | None = None
    packing: Packing | None = None
    model_dtype: str | None = None
    model_source: str | None = None
    sink_factor: float = SINK_FACTOR
    held_out_every: int = HELD_OUT_EVERY
    n_tokens: int = 0
    kept: int = 0
    kept_share: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)
    unique_rows: int | None = None
    shards: tuple[ShardFile, ...] = ()
    done: bool = False
    version: int = FORMAT_VERSION

    @property
    def unique_share(self) -> float | None:
        """Share of the packed rows that are left when exact repetitions are taken out."""
        return None if self.unique_rows is None else self.unique_rows * self.context / self.n_tokens

    @property
    def shortfall(self) -> str | None:
        """A sentence if the source ended before it gave the tokens that were asked for."""
        asked = self.source.get("tokens")
        if not isinstance(asked, int) or not self.done or self.n_tokens + self.context > asked:
            return None
        return f"The source ended after {self.n_tokens} of the {asked} tokens that were asked for."

    def save(self, folder: Folder, name: str = MANIFEST) -> None:
        """Writes the manifest of a store."""
        text = json.dumps(to_jsonable(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        folder.write(name, [text.encode(errors="backslashreplace")])


def load_manifest(folder: Folder, name: str = MANIFEST) -> Manifest:
    """Reads and checks a manifest; shard names can't point outside the folder.

    Raises:
        CorruptFileError: if it is not one, or of a version that is not known here.
    """
    where = f"{folder.where}/{name}"
    raw = parse_json(folder.read(name), where, dict, remedy="Delete it and run the same harvest again.")
    version = raw.get("version")
    if version not in READABLE_VERSIONS:
        raise CorruptFileError(
            f"{where} has format version {version!r}; this version reads {READABLE_VERSIONS}. Update the workbench, or "
            "harvest again."
        )
    try:
        manifest = from_jsonable(Manifest, raw)
    except InvalidInputError as error:
        raise CorruptFileError(f"{where} is not a manifest: {error} Delete it and harvest again.") from None
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file or shard.file in ("", ".."):
            raise CorruptFileError(f"{where} names {shard.file!r}, which is not a plain file name. Don't use it.")
    wrong = _contradiction(manifest)
    if wrong:
        raise CorruptFileError(f"{where} contradicts itself: {wrong}. Restore it, or delete it and harvest again.")
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """What can't be so in a manifest that a harvest has written; None if nothing is found."""
    shards, last = manifest.shards, 0
    if manifest.context < 2 or manifest.held_out_every < 2 or manifest.shard_rows < 1 or manifest.batch_rows < 1:
        return "context, held_out_every, shard_rows or batch_rows is too small"
    if len({shard.file for shard in shards}) < len(shards):
        return "a shard is named twice"
    for shard in shards:
        if shard.first_row < last or not 0 <= shard.kept <= shard.n_rows * manifest.context:
            return f"{shard.file} starts at row {shard.first_row} and keeps {shard.kept} tokens of {shard.n_rows} rows"
        last = shard.first_row + shard.n_rows
    if not manifest.done or not manifest.kept:  # one of several processes has no totals
        return None
    kept, n_tokens = sum(shard.kept for shard in shards), last * manifest.context
    if (manifest.kept, manifest.n_tokens) != (kept, n_tokens):
        return f"kept={manifest.kept} of n_tokens={manifest.n_tokens}, but the shards hold {kept} of {n_tokens}"
    return None
