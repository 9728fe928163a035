"""Training batches of several sites at once, in an order that depends on the store and the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.activations.ring import RingBuffer
from workbench.activations.store import ActivationStore
from workbench.core.errors import DegenerateInputError
from workbench.saes.config import SAEConfig
from workbench.saes.formats.normalise import Normaliser, SiteScale, site_scale

HELD_OUT_ROWS = 4096
STATISTICS_ROWS = 262_144
CALIBRATION_ROWS = 16_384
CALIBRATION_SHARDS = 8


@dataclass(frozen=True)
class OrderKey:
    """What decides which tokens come in which order; SAEs with the same key can share one pass over the data."""

    seed: int
    batch: int
    buffer: int
    distinct_tokens: int | None

    @classmethod
    def of(cls, config: SAEConfig) -> OrderKey:
        """The key of a configuration."""
        return cls(config.order_seed, config.batch, config.buffer, config.distinct_tokens)


@dataclass(frozen=True)
class Pair:
    """What one batch is for one SAE or transcoder, in the scale of training."""

    x: Tensor
    target: Tensor | None


class Batches:
    """Batches of all sites that the members of a group read or reconstruct.

    Args:
        store: the activations.
        sites: sites of the batches.
        key: which tokens, in which order.
    """

    def __init__(self, store: ActivationStore, sites: Sequence[str], key: OrderKey) -> None:
        self.store, self.sites, self.key = store, tuple(dict.fromkeys(sites)), key
        self._ring: RingBuffer[dict[str, Tensor]] | None = None

    @property
    def ring(self) -> RingBuffer[dict[str, Tensor]]:
        """The shuffle buffer; filled when it is first asked for."""
        if self._ring is None:
            self._ring = RingBuffer(self._epoch, min(self.key.buffer, max(2, self.store.rows)), self.key.seed)
        return self._ring

    def next(self) -> dict[str, Tensor]:
        """The next batch of raw activations, by site."""
        return self.ring.next(self.key.batch)

    def state(self) -> dict[str, int]:
        """Where the stream is."""
        return self.ring.state_dict()

    def restore(self, state: dict[str, int]) -> None:
        """Goes to where another stream of the same key was."""
        self.ring.load_state_dict(state)

    def scales(self) -> dict[str, SiteScale]:
        """Mean and scale of each site, over the first training tokens of the store."""
        return {
            site: site_scale(self._statistics_blocks(site), f"{site} in {self.store.path}", self.key.batch)
            for site in self.sites
        }

    def held_out(self) -> dict[str, Tensor]:
        """The tokens on which the SAEs are measured while they train; at most `HELD_OUT_ROWS`.

        Raises:
            DegenerateInputError: if the store is too small to hold any out.
        """
        blocks: list[dict[str, Tensor]] = []
        for index in range(len(self.store.manifest.shards)):
            blocks.append(self.store.aligned_block(index, self.sites, "heldout"))
            if sum(len(block[self.sites[0]]) for block in blocks) >= HELD_OUT_ROWS:
                break
        joined = {site: torch.cat([block[site] for block in blocks])[:HELD_OUT_ROWS].float() for site in self.sites}
        if len(joined[self.sites[0]]) < 2:
            raise DegenerateInputError(
                f"{self.store.path} has {self.store.manifest.n_tokens // self.store.context} packed rows, too few to "
                "hold one in ten out. Harvest more."
            )
        same = next((site for site, x in joined.items() if bool((x == x[0]).all())), None)
        if same is not None:
            raise DegenerateInputError(
                f"All {len(joined[same])} held-out activations of {same} in {self.store.path} are the same, so that no "
                "FVU can be measured. Harvest more text."
            )
        return joined

    def calibration(self, site: str) -> Tensor:
        """Training tokens of one site from all parts of the store, raw; at most `CALIBRATION_ROWS`."""
        count = len(self.store.manifest.shards)
        chosen = [index for index in range(0, count, max(1, -(-count // CALIBRATION_SHARDS)))]
        parts = [acts[site] for index in chosen for acts in self._training(index, (site,))]
        x = torch.cat(parts)
        return x[:: max(1, -(-len(x) // CALIBRATION_ROWS))]

    def _statistics_blocks(self, site: str) -> Iterator[Tensor]:
        seen = 0
        for index in range(len(self.store.manifest.shards)):
            for acts in self._training(index, (site,)):
                yield acts[site]
                seen += len(acts[site])
            if seen >= STATISTICS_ROWS:
                return

    def _epoch(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        """Training tokens of the shards, in an order of their own per epoch."""
        random = torch.Generator().manual_seed((self.key.seed * 7919 + epoch) % 2**63)
        for index in torch.randperm(len(self.store.manifest.shards), generator=random).tolist():
            yield from self._training(index, self.sites)

    def _training(self, index: int, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """The activations of one shard that may be trained on; none if it lies beyond `distinct_tokens`."""
        tokens, shard = self.key.distinct_tokens, self.store.manifest.shards[index]
        end_row = None if tokens is None else -(-tokens // self.store.context)
        if end_row is not None and shard.first_row >= end_row:
            return
        acts = self.store.aligned_block(index, sites, "train")
        if end_row is not None and shard.first_row + shard.n_rows > end_row:
            inside = self.store.block(index, sites[0], "train").rows < end_row
            acts = {site: x[inside] for site, x in acts.items()}
        if len(acts[sites[0]]):
            yield acts


class Scaled:
    """Batches in the scale of training; SAEs that read the same site share one tensor, which is written again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, bool, str], Tensor] = {}
        self._current: dict[tuple[str, bool, str], Tensor] = {}

    def begin(self, raw: dict[str, Tensor]) -> None:
        """Takes the next batch."""
        self._raw = {site: x.to(self.device, non_blocking=True) for site, x in raw.items()}
        self._current = {}

    def pair(self, site: str, target_site: str | None, normaliser: Normaliser) -> Pair:
        """What one SAE or transcoder is given of this batch; not to be written to, and valid until the next `begin`."""
        x = self._one(site, target_site is not None, "read", normaliser)
        if target_site is None:
            return Pair(x, None)
        return Pair(x, self._one(target_site, False, "reconstructed", normaliser))

    def _one(self, site: str, centred: bool, role: str, normaliser: Normaliser) -> Tensor:
        key = (site, centred, role)
        if key not in self._current:
            raw = self._raw[site]
            buffer = self._buffers.get(key)
            if buffer is None:
                buffer = self._buffers[key] = torch.empty(raw.shape, dtype=torch.float32, device=self.device)
            buffer.copy_(raw)
            self._current[key] = normaliser.read_(buffer) if role == "read" else normaliser.reconstructed_(buffer)
        return self._current[key]
