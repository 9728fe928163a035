"""Stored activations: a folder of checksummed safetensors shards with a manifest that says what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from workbench.activations.keep import KeepRule
from workbench.errors import (
    CorruptFileError,
    DegenerateInputError,
    MismatchError,
    MissingFileError,
    UnknownSiteError,
    did_you_mean,
)
from workbench.records import from_jsonable, load_json, save_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
HELD_OUT_EVERY = 10
DROP_REASONS = ("kept", "first of its row", "special token", "norm beyond the sink limit")

Split = Literal["all", "train", "heldout"]


@dataclass(frozen=True)
class SiteStats:
    """Width of a site and norms of its kept tokens."""

    d: int
    max_norm: float
    mean_norm: float | None = None
    median_norm: float | None = None
    std_norm: float | None = None


@dataclass(frozen=True)
class Shard:
    """One file: packed rows `first_row` to `first_row + n_rows`, of which `kept` tokens are stored."""

    file: str
    sha256: str
    first_row: int
    n_rows: int
    kept: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        source: what the tokens depend on.
        n_tokens: tokens that were run through the model, kept or not.
        held_out_every: packed row r is held out from training if `r % held_out_every == held_out_every - 1`.
    """

    model_name: str
    model_fingerprint: str
    source: dict[str, Any]
    sites: dict[str, SiteStats]
    context: int
    special_ids: tuple[int, ...]
    shard_rows: int
    batch_rows: int
    dtype: str = "bfloat16"
    held_out_every: int = HELD_OUT_EVERY
    n_tokens: int = 0
    kept: int = 0
    kept_share: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    done: bool = False
    version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Writes the manifest of a store."""
        save_json(folder / MANIFEST, self)


@dataclass(frozen=True, eq=False)
class Block:
    """Kept tokens of one shard at one site: activations, and where each comes from.

    Attributes:
        acts: activations in the stored dtype.
        tokens: token ids.
        positions: position in the packed row.
        rows: packed row in the whole store.
        documents: document in the source.
    """

    acts: Float[Tensor, "n d"]
    tokens: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]
    documents: Int[Tensor, " n"]

    def __getitem__(self, chosen: Tensor) -> Block:
        return Block(*(t[chosen] for t in (self.acts, self.tokens, self.positions, self.rows, self.documents)))


class ActivationStore:
    """Activations on disk, read as a stream; open one with `open_store`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._verified: set[str] = set()

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are stored."""
        return tuple(self.manifest.sites)

    @property
    def rows(self) -> int:
        """Number of kept tokens."""
        return self.manifest.kept

    def __len__(self) -> int:
        return self.rows

    @property
    def context(self) -> int:
        """Tokens per packed row."""
        return self.manifest.context

    def site(self, site: str | None = None) -> str:
        """The stored site of this name, or the only one.

        Raises:
            UnknownSiteError: if it is not stored, or if there are several and none is named.
        """
        if site is None and len(self.sites) == 1:
            return self.sites[0]
        if site is None or str(site) not in self.sites:
            asked = "No site was named" if site is None else f"Site {site} is not stored"
            raise UnknownSiteError(f"{asked} in {self.path}. {did_you_mean(str(site), self.sites)}")
        return str(site)

    def keep_rule(self, site: str | None = None) -> KeepRule:
        """The rule by which tokens were kept at this site."""
        return KeepRule(self.manifest.sites[self.site(site)].max_norm, self.manifest.special_ids)

    def check_model(self, model: Any) -> None:
        """Refuses a model that did not make this store.

        Raises:
            MismatchError: on another fingerprint.
        """
        if model.fingerprint != self.manifest.model_fingerprint:
            raise MismatchError(
                f"{self.path} was harvested from {self.manifest.model_name} ({self.manifest.model_fingerprint}), "
                "not from "
                f"{model.name} ({model.fingerprint}). Load that model, or harvest again."
            )

    def blocks(self, site: str | None = None, split: Split = "all") -> Iterator[Block]:
        """The kept tokens, shard by shard, in the order of the source."""
        name = self.site(site)
        for index in range(len(self.manifest.shards)):
            yield self.block(index, name, split)

    def read(self, site: str | None = None, split: Split = "all") -> Iterator[Float[Tensor, "n d"]]:
        """The activations alone, shard by shard."""
        for block in self.blocks(site, split):
            yield block.acts

    def block(self, index: int, site: str | None = None, split: Split = "all") -> Block:
        """The kept tokens of one shard.

        Raises:
            CorruptFileError: if the shard is not what was written, or holds values that are not finite.
        """
        name, shard = self.site(site), self.manifest.shards[index]
        data = self._load(shard)
        where = (data[key].long() for key in ("token", "position", "row", "document"))
        block = Block(data[name], *where)
        if not torch.isfinite(block.acts).all():
            raise CorruptFileError(
                f"{self.path / shard.file}: {name} holds values that are not finite. Harvest it again."
            )
        return block if split == "all" else block[self._in_split(block.rows, split)]

    def token_rows(self, split: Split = "heldout") -> Int[Tensor, "rows context"]:
        """The packed rows of tokens, dropped tokens included, for runs of the model."""
        rows = torch.cat([self._load(shard)["token_rows"].long() for shard in self.manifest.shards])
        return rows if split == "all" else rows[self._in_split(torch.arange(len(rows)), split)]

    def verify(self) -> None:
        """Compares every shard with its checksum.

        Raises:
            CorruptFileError: naming the first shard that differs.
        """
        self._verified.clear()
        for shard in self.manifest.shards:
            self._load(shard)

    def _in_split(self, rows: Tensor, split: Split) -> Tensor:
        every = self.manifest.held_out_every
        held_out = rows % every == every - 1
        return held_out if split == "heldout" else ~held_out

    def _load(self, shard: Shard) -> dict[str, Tensor]:
        path = self.path / shard.file
        if not path.is_file():
            raise MissingFileError(f"Shard {path} is in the manifest but not on disk. Restore it, or harvest again.")
        if shard.file not in self._verified:
            found = file_sha256(path)
            if found != shard.sha256:
                raise CorruptFileError(
                    f"Shard {path} ({path.stat().st_size} bytes) has sha256 {found[:12]}…, the manifest says "
                    f"{shard.sha256[:12]}…: it is damaged or truncated. Restore it, or delete the folder and "
                    "harvest again."
                )
            self._verified.add(shard.file)
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise CorruptFileError(f"Shard {path} is not a safetensors file ({error}). Harvest again.") from None

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"ActivationStore({self.path}: {m.kept} kept of {m.n_tokens} tokens ({m.kept_share:.1%}), "
            f"sites {', '.join(self.sites)}, {m.model_name})"
        )


def open_store(path: str | Path | ActivationStore) -> ActivationStore:
    """The store in a folder. Shards are checked against their checksums when they are first read.

    Raises:
        MissingFileError: if there is no store.
        CorruptFileError: if the manifest can't be used.
        DegenerateInputError: if its harvest has not finished.
    """
    if isinstance(path, ActivationStore):
        return path
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        raise MissingFileError(
            f"No activation store in {folder}: it has no {MANIFEST}. Make one with `workbench harvest`."
        )
    manifest = load_manifest(folder)
    if not manifest.done:
        raise DegenerateInputError(
            f"The harvest in {folder} has not finished ({len(manifest.shards)} shards). Run the same harvest "
            "again to go on."
        )
    return ActivationStore(folder, manifest)


def load_manifest(folder: Path) -> Manifest:
    """Reads and checks a manifest; shard names can't point outside the folder."""
    raw = load_json(folder / MANIFEST)
    if not isinstance(raw, dict) or raw.get("version") != FORMAT_VERSION:
        found = raw.get("version") if isinstance(raw, dict) else type(raw).__name__
        raise CorruptFileError(
            f"{folder / MANIFEST} has format version {found!r}; this version reads {FORMAT_VERSION}."
        )
    manifest = from_jsonable(Manifest, raw)
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file:
            raise CorruptFileError(
                f"{folder / MANIFEST} names {shard.file!r}, which is not a plain file name. Don't use it."
            )
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
