"""Stored activations: checksummed safetensors shards with a manifest that says what they are."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workbench.activations.manifest import DROP_REASONS as DROP_REASONS
from workbench.activations.manifest import MANIFEST, Manifest, ShardFile, load_manifest
from workbench.activations.manifest import SiteStats as SiteStats
from workbench.activations.shardfile import read_tensor
from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    MismatchError,
    MissingFileError,
    UnknownSiteError,
    did_you_mean,
    told_apart,
)
from workbench.core.html import Shown
from workbench.core.numbers import percent
from workbench.engine.folder import open_folder
from workbench.engine.local import Folder
from workbench.hooks.sites import Site
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd

Split = Literal["all", "train", "heldout"]

REPEATS_SHOWN = 0.99
"""A store says that rows repeat if fewer than this share are different."""
SCALE = "/scale"
"""Follows the name of a site in the name of its int8 scales."""


@dataclass(frozen=True, eq=False)
class Block(OneLine):
    """Kept tokens of one shard at one site: activations, and where each comes from.

    Attributes:
        acts: activations in bfloat16, whatever the stored dtype.
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


@checked
class ActivationStore(Shown):
    """Stored activations, read as a stream; open one with `open_store`."""

    how_to_make = "open_store(folder) opens a store; harvest(...) makes one."

    def __init__(self, path: str | Path | Folder, manifest: Manifest) -> None:
        self.folder, self.manifest = open_folder(path), manifest
        self._verified: set[str] = set()
        self._finite: set[tuple[str, str]] = set()

    @property
    def path(self) -> Path | str:
        """Folder of the store, or its address if it is not on this machine."""
        return self.folder.where

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
        if site is None:
            raise UnknownSiteError(f"No site was named in {self.path}. Known: {', '.join(self.sites)}.")
        name = str(site) if str(site) in self.sites else str(Site.parse(site))
        if name not in self.sites:
            raise UnknownSiteError(f"Site {site} is not stored in {self.path}. {did_you_mean(str(site), self.sites)}")
        return name

    def keep_rule(self, site: str | None = None) -> TokenPolicy:
        """The rule by which tokens were kept at this site."""
        return TokenPolicy(self.manifest.sites[self.site(site)].max_norm, self.manifest.special_ids)

    def check_model(self, model: Model) -> None:
        """Refuses a model that did not make this store.

        Raises:
            MismatchError: on another fingerprint.
        """
        if model.fingerprint != self.manifest.model_fingerprint:
            made = self.manifest.model_name, self.manifest.model_fingerprint
            theirs, ours = told_apart(made, (model.name, model.fingerprint))
            raise MismatchError(
                f"The store {self.path} was harvested from {theirs}, not from {ours}. Load {theirs}, or harvest {ours}."
            )

    def blocks(self, site: str | None = None, split: Split = "all") -> Iterator[Block]:
        """The kept tokens, shard by shard, in the order of the source."""
        name = self.site(site)
        for index in self._in_turn():
            yield self.block(index, name, split)

    def read(self, site: str | None = None, split: Split = "all") -> Iterator[Float[Tensor, "n d"]]:
        """The activations alone, shard by shard."""
        name = self.site(site)
        for index in self._in_turn():
            yield self.aligned_block(index, [name], split)[name]

    def _in_turn(self) -> Iterator[int]:
        """Indices of the shards; while one is in use, the next is fetched and compared with its checksum."""
        shards = self.manifest.shards
        with ThreadPoolExecutor(1, "workbench-shards") as pool:
            for index in range(len(shards)):
                coming = next((s for s in shards[index + 1 : index + 2] if s.file not in self._verified), None)
                ready = None if coming is None else pool.submit(self._file, coming)
                yield index
                if ready is not None:
                    ready.exception()  # waits; a damaged shard raises again where it is used

    def block(self, index: int, site: str | None = None, split: Split = "all") -> Block:
        """The kept tokens of one shard.

        Raises:
            CorruptFileError: if the shard is not what was written, or holds values that are not finite.
        """
        acts, *where = self._read(index, (self.site(site), "token", "position", "row", "document"), split)
        return Block(acts, *(t.long() for t in where))

    def aligned_block(self, index: int, sites: Sequence[str], split: Split = "all") -> dict[str, Float[Tensor, "n _"]]:
        """The activations of one shard at several sites; row i is the same token at each."""
        names = [self.site(site) for site in sites]
        return dict(zip(names, self._read(index, names, split), strict=True))

    def packed_rows(self, index: int) -> Int[Tensor, "rows context"]:
        """The packed rows of tokens of one shard, dropped tokens included."""
        return self._tensor(self.manifest.shards[index], "token_rows").long()

    def token_rows(self, split: Split = "heldout") -> Int[Tensor, "rows context"]:
        """The packed rows of tokens, dropped tokens included, for runs of the model."""
        rows = torch.cat([self.packed_rows(index) for index in range(len(self.manifest.shards))])
        return rows if split == "all" else rows[self._in_split(torch.arange(len(rows)), split)]

    def verify(self) -> None:
        """Compares every shard with its checksum.

        Raises:
            CorruptFileError: naming the first shard that differs.
        """
        self._verified.clear()
        for shard in self.manifest.shards:
            self._file(shard, thorough=True)

    def damaged(self) -> tuple[int, ...]:
        """Which shards are missing or are not what was written; each is compared with its checksum."""
        wrong = []
        self._verified.clear()
        for index, shard in enumerate(self.manifest.shards):
            # a copy in the cache says nothing about what is in the folder
            self.folder.discard(shard.sha256)
            try:
                self._file(shard, thorough=True)
            except (CorruptFileError, MissingFileError):
                wrong.append(index)
        return tuple(wrong)

    def unique_rows(self) -> int:
        """Number of packed rows without exact repetitions, by a 64-bit hash of each."""
        seen: set[bytes] = set()
        for shard in self.manifest.shards:
            rows = read_tensor(self.folder, shard.file, "token_rows").numpy()
            seen.update(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
        return len(seen)

    def _in_split(self, rows: Int[Tensor, " n"], split: Split) -> Bool[Tensor, " n"]:
        every = self.manifest.held_out_every
        held_out = rows % every == every - 1
        return held_out if split == "heldout" else ~held_out

    def _read(self, index: int, keys: Sequence[str], split: Split) -> list[Tensor]:
        """Activations at sites, and tensors by their other keys, of the kept tokens of one shard."""
        shard = self.manifest.shards[index]
        is_whole = split == "all"
        chosen = None if is_whole else self._in_split(self._tensor(shard, "row"), split).nonzero().squeeze(1)
        every = (self._acts(shard, key) if key in self.manifest.sites else self._tensor(shard, key) for key in keys)
        return [x if chosen is None else x.index_select(0, chosen) for x in every]

    def _acts(self, shard: ShardFile, site: str) -> Tensor:
        x = self._tensor(shard, site)
        if self.manifest.dtype == "int8":
            x = self.manifest.sites[site].code().decode(x, self._tensor(shard, site + SCALE))
        if (shard.file, site) not in self._finite:
            bad = first_not_finite(x)
            if bad is not None:
                row, position = (int(self._tensor(shard, key)[bad]) for key in ("row", "position"))
                raise CorruptFileError(
                    f"{self._name(shard)}: {site} holds values that are not finite, first in row {row} at position "
                    f"{position}. Harvest it again."
                )
            self._finite.add((shard.file, site))
        return x

    def _tensor(self, shard: ShardFile, key: str) -> Tensor:
        path = self._file(shard)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"Shard {self._name(shard)}: {key} can't be read ({error}). {_REMAKE}") from None

    def _file(self, shard: ShardFile, thorough: bool = False) -> Path:
        """The shard on this machine, once its content is what the manifest says."""
        path = self.folder.local(shard.file, shard.sha256)
        if not path.is_file():
            raise MissingFileError(f"Shard {self._name(shard)} is in the manifest but not on disk. {_REMAKE}")
        if shard.file not in self._verified:
            quick = bool(shard.xxh3) and not thorough
            kind, wanted = ("xxh3", shard.xxh3) if quick else ("sha256", shard.sha256)
            actual, size = file_xxh3(path) if quick else file_sha256(path), path.stat().st_size
            if actual != wanted:
                self.folder.discard(shard.sha256)
                raise CorruptFileError(
                    f"Shard {self._name(shard)} ({size} bytes) has {kind} {actual[:12]}…, the manifest says "
                    f"{wanted[:12]}…: it is damaged or truncated. {_REMAKE}"
                )
            self._verified.add(shard.file)
        return path

    def _name(self, shard: ShardFile) -> str:
        return f"{self.path}/{shard.file}"

    def frame(self) -> pd.DataFrame:
        """One row per stored site: the limit on norms by which tokens were kept, and what their norms are."""
        import pandas as pd

        names = ("max_norm", "mean_norm", "median_norm", "std_norm", "int8_fvu")
        sites = self.manifest.sites.items()
        return pd.DataFrame([{"site": s, **{name: getattr(stats, name) for name in names}} for s, stats in sites])

    def _shown_facts(self) -> dict[str, object]:
        m = self.manifest
        tokens = f"{m.kept} kept of {m.n_tokens} ({percent(m.kept_share)}), rows of {m.context}"
        return {"folder": str(self.path), "model": m.model_name, "tokens": tokens, "stored as": m.dtype}

    def _shown_note(self) -> str:
        return self.manifest.shortfall or ""

    def _shown_line(self) -> str:
        m, share = self.manifest, self.manifest.unique_share
        repeats = ""
        if share is not None and share <= REPEATS_SHOWN:
            repeats = f", {percent(1 - share)} of rows repeat an earlier one"
        return (
            f"{self.path}: {m.kept} kept of {m.n_tokens} tokens ({percent(m.kept_share)}), "
            f"sites {', '.join(self.sites)}, {m.dtype}, {m.model_name}{repeats}"
            + (f"; {m.shortfall}" if m.shortfall else "")
        )


_REMAKE = "Restore it, or run the same harvest with repair=True (--repair), which makes only what is damaged again."


@checked
def open_store(path: str | Path | Folder | ActivationStore) -> ActivationStore:
    """The store in a folder, or at an address such as s3://bucket/acts.

    Shards are checked against their checksums when they are first read; those of another machine are read through
    copies in the cache of this one.

    Raises:
        MissingFileError: if there is no store.
        CorruptFileError: if the manifest can't be used.
        DegenerateInputError: if its harvest has not finished.
        InvalidInputError: for an address that can't be opened.
    """
    if isinstance(path, ActivationStore):
        return path
    folder = open_folder(path)
    if not folder.has(MANIFEST):
        raise MissingFileError(
            f"No activation store in {folder.where}: it has no {MANIFEST}. Make one with `workbench harvest`."
        )
    manifest = load_manifest(folder)
    if not manifest.done:
        raise DegenerateInputError(
            f"The harvest in {folder.where} has not finished ({len(manifest.shards)} shards). Run the same harvest "
            "again to go on."
        )
    return ActivationStore(folder, manifest)


def first_not_finite(x: Float[Tensor, "n d"]) -> int | None:
    """The first row that holds NaN or infinity."""
    # the sum of a row is finite only if all its values are, save for overflow, which the exact look settles
    rows = (~torch.isfinite(x.sum(dim=1))).nonzero().squeeze(1)
    for row in rows.tolist():
        if not torch.isfinite(x[row]).all():
            return row
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_xxh3(path: Path) -> str:
    """XXH3 of a file, 128 bits in hex."""
    import xxhash

    if not path.stat().st_size:
        return xxhash.xxh3_128_hexdigest(b"")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxhash.xxh3_128_hexdigest(content)
