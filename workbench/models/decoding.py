"""The loop that generates: prompts once, then one token per row and step; rows that have ended leave the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.core.tokens import TokenBatch
from workbench.hooks.attach import attached
from workbench.hooks.sites import Point, Site, SiteMap
from workbench.models.folderrules import FolderRules
from workbench.models.kvcache import holds, is_plain, keeps_columns, new_cache, select_rows, take_columns, takes_cache
from workbench.models.sampling import Noise, Sampling, choose
from workbench.models.stopping import StopStrings

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


_WORTH = 64
"""Tokens that a common prefix must save before it gets a forward pass of its own."""

_NO_CACHE = (
    "{} keeps a recurrent state outside of the cache that it can be given, which this generation does not carry. Use "
    "model.hf.generate, without an intervention."
)

ENDED = ("length", "stop_token", "stop_string")
"""Why a row ended, by code."""


@dataclass(frozen=True, eq=False)
class Prefilled:
    """Where a generation goes on.

    Attributes:
        cache: keys and values of every column.
        logits: of the last column.
        ids: tokens of the columns so far.
        mask: True at real tokens among them.
    """

    cache: Cache
    logits: Float[Tensor, "batch vocab"]
    ids: Int[Tensor, "batch columns"]
    mask: Bool[Tensor, "batch columns"]


@dataclass(eq=False)
class Rows:
    """What the rows have generated; those of the whole job, or those that are still in the batch.

    Attributes:
        ids: new token ids; after the end of a row the first stop token, or 0.
        logprobs: log-probability (nats, temperature 1) of each; 0 after the end of a row.
        sampled: number of tokens that were sampled, a stop token included.
        why: code of why the row ended, an index into `ENDED`.
    """

    ids: Int[Tensor, "batch new"]
    logprobs: Float[Tensor, "batch new"]
    sampled: Int[Tensor, " batch"]
    why: Int[Tensor, " batch"]

    @classmethod
    def empty(cls, batch: int, n: int, fill: int, device: torch.device) -> Rows:
        """Rows of which nothing has been generated."""
        return cls(
            torch.full((batch, n), fill, device=device),
            torch.zeros(batch, n, device=device),
            torch.full((batch,), n, device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
        )

    def __getitem__(self, index: Int[Tensor, " kept"]) -> Rows:
        return Rows(self.ids[index], self.logprobs[index], self.sampled[index], self.why[index])

    def __setitem__(self, index: Int[Tensor, " kept"], part: Rows) -> None:
        if part is self:
            return
        for name in ("ids", "logprobs", "sampled", "why"):
            getattr(self, name)[index] = getattr(part, name)


class Recorder:
    """Keeps the activations of every column of a generation, whatever rows a forward pass holds.

    Attributes:
        found: by site, `(batch, columns, ...)`; columns that were never fed are 0.
    """

    def __init__(self, points: Sequence[Point], batch: int, columns: int) -> None:
        self._points, self._shape = tuple(dict.fromkeys(points)), (batch, columns)
        self.found: dict[Site, Tensor] = {}
        self._rows: Any = slice(None)
        self._start = 0
        self._place: Callable[[Tensor], Tensor] = lambda x: x

    @property
    def wants_logits(self) -> bool:
        """Whether the logits of every column are asked for, not only of the last."""
        return any(point.site.kind == "logits" for point in self._points)

    @classmethod
    def points_of(cls, sites: SiteMap, wanted: Sequence[str | Site]) -> tuple[Point, ...]:
        """The points of these sites.

        Raises:
            InvalidInputError: for a site whose shape depends on the length of the whole sequence.
        """
        for site in (named := sites.named(wanted)):
            if site.kind == "pattern":
                raise InvalidInputError(
                    f"generate(capture=[{str(site)!r}]): its rows get longer with every token, so it is not kept while "
                    "generating. Capture it from the finished text with Model.capture."
                )
        return tuple(sites[site] for site in named)

    def expect(self, rows: Any, start: int, place: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """The next forward pass holds columns from `start` on; `place` turns its activations into those of `rows`."""
        self._rows, self._start, self._place = rows, start, place

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Reads inside the block; enter it after a plan, so that it sees what the edits left."""
        return attached([(point, self._read(point.site)) for point in self._points])

    def _read(self, site: Site) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            x = self._place(x.detach())
            if site not in self.found:
                self.found[site] = x.new_zeros(*self._shape, *x.shape[2:])
            self.found[site][self._rows, self._start : self._start + x.shape[1]] = x

        return read


class Decoder:
    """Generates continuations of one batch.

    Args:
        hf: the Hugging Face model.
        options: how to choose tokens and when to stop.
        stops: finder of `options.stop`.
        recorder: keeps activations; its block has to be active around `prefill` and `run`.
    """

    def __init__(
        self, hf: PreTrainedModel, options: Sampling, stops: StopStrings | None = None, recorder: Recorder | None = None
    ) -> None:
        if not takes_cache(hf):
            raise InvalidInputError(_NO_CACHE.format(type(hf).__name__))
        self.hf, self._options, self._stops = hf, options, stops
        self._recorder = recorder or Recorder((), 0, 0)
        self._keep = 0 if self._recorder.wants_logits else 1

    def prefill(self, batch: TokenBatch, *, share: bool = False) -> Prefilled:
        """The prompts through the model.

        Args:
            batch: left-padded prompts.
            share: identical rows, and what all rows begin with, go through the model once. Only right where nothing
                that acts on the prompt differs between rows.
        """
        ids, mask, position = batch.ids, batch.mask, batch.positions
        cache = new_cache(self.hf.config, ids.shape[1] + self._options.max_new_tokens)
        if not share or len(batch) == 1 or not keeps_columns(cache):
            self._recorder.expect(slice(None), 0)
            return self._prefilled(cache, self._last_logits(cache, ids, mask, position), ids, mask)
        first, owner = _distinct(ids, mask)
        start = _shared_columns(ids[first], mask[first]) if is_plain(cache) else 0
        if start:
            padding = (~mask).sum(1)
            longest = int(padding.argmin())
            columns = (torch.arange(start, device=ids.device) - padding[:, None]).clamp_min(0)
            self._recorder.expect(slice(None), 0, lambda x: x[0][columns])
            one = slice(longest, longest + 1)
            self._last_logits(cache, ids[one, :start], mask[one, :start], position[one, :start])
            take_columns(cache, columns[first])
        self._recorder.expect(slice(None), start, lambda x: x[owner])
        logits = self._last_logits(cache, ids[first, start:], mask[first], position[first, start:])
        if len(first) < len(batch):
            select_rows(cache, owner)
            logits = logits[owner]
        return self._prefilled(cache, logits, ids, mask)

    def extend(self, cache: Cache, ids: Int[Tensor, "1 columns"], start: int) -> Prefilled:
        """The columns of one row from `start` on through the model; `cache` holds those before, and is extended."""
        mask = torch.ones_like(ids, dtype=torch.bool)
        position = torch.arange(start, ids.shape[1], device=ids.device)[None]
        logits = self._last_logits(cache, ids[:, start:], mask, position, padded=False)
        return self._prefilled(cache, logits, ids, mask)

    def _prefilled(self, cache: Cache, logits: Tensor, ids: Tensor, mask: Tensor) -> Prefilled:
        if not holds(cache, ids.shape[1]):
            raise InvalidInputError(_NO_CACHE.format(type(self.hf).__name__))
        return Prefilled(cache, logits, ids, mask)

    @torch.no_grad()
    def _last_logits(
        self, cache: Cache, ids: Tensor, mask: Tensor, position: Tensor, padded: bool | None = None
    ) -> Tensor:
        # Without padding the model needs no mask, and attention takes its fast path.
        padded = not bool(mask.all()) if padded is None else padded
        extra = {"attention_mask": mask.long()} if padded else {}
        out = self.hf(
            input_ids=ids,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self._keep,
            **extra,
        )
        return out.logits[:, -1].float()

    @torch.no_grad()
    def run(
        self,
        start: Prefilled,
        rows: Int[Tensor, " batch"],
        *,
        on_select: Callable[[Tensor], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        on_ended: Callable[[Tensor], None] | None = None,
    ) -> Rows:
        """New tokens of every row.

        Args:
            start: the prompts; its cache is used up.
            rows: number of each row in the whole job, which seeds its draws.
            on_select: allows rows that have ended to leave the batch as soon as they are the greater part of it; told
                which rows stay.
            on_step: called with the number of rows in the batch after each new token.
            on_ended: told before each forward pass which rows of the batch have ended and only keep their place.
        """
        options, cache, mask, logits = self._options, start.cache, start.mask, start.logits
        history, rules = start.ids, FolderRules.of(self.hf, options, mask.device)
        n, device = options.max_new_tokens, mask.device
        noise = None if options.is_greedy else Noise(rows, options.seed)
        whole = Rows.empty(len(rows), n, options.stop_at[0] if options.stop_at else 0, device)
        part, live = whole, torch.arange(len(rows), device=device)
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        position, padded = mask.sum(1, keepdim=True), not bool(mask.all())
        drops = on_select if keeps_columns(cache) else None
        stop_at = torch.tensor(options.stop_at, device=device, dtype=torch.long)
        for step in range(n):
            drawn = None if noise is None else noise.next(logits.shape[1]).to(device)
            allowed = None if rules is None else rules(history, mask, step, logits)
            chosen, logprob = choose(logits, drawn, options, allowed)
            _require_numbers(logprob, rows, live, done, step)
            part.ids[:, step] = torch.where(done, part.ids[:, step], chosen)
            part.logprobs[:, step] = torch.where(done, part.logprobs[:, step], logprob)
            if on_step is not None:
                on_step(len(live))
            n_done = self._mark_ended(part, done, chosen, step, stop_at)
            if step == n - 1 or n_done == len(live):
                break
            # Not after the first token: a plan that was entered after the prompts has to see every row once.
            if drops and step and 2 * n_done > len(live):
                keep = (~done).nonzero().squeeze(1)
                select_rows(cache, keep)
                drops(keep)
                whole[live] = part
                part, live = part[keep], live[keep]
                chosen, position, mask, done = (x[keep] for x in (chosen, position, mask, done))
                history = history[keep]
                if noise is not None:
                    noise.keep(keep)
            if rules is not None:
                history = torch.cat([history, chosen[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            self._recorder.expect(live, mask.shape[1] - 1)
            if on_ended is not None:
                on_ended(done)
            logits = self._last_logits(cache, chosen[:, None], mask, position, padded)
            position = position + 1
        whole[live] = part
        return whole

    def _mark_ended(self, part: Rows, done: Tensor, chosen: Tensor, step: int, stop_at: Tensor) -> int:
        """Notes the rows that end with this token in `part` and `done`; the number of rows that have ended."""
        if not len(stop_at) and self._stops is None:
            return 0
        why = torch.isin(chosen, stop_at).long()
        if self._stops is not None:
            for row in (self._stops.may_end(chosen) & (why == 0) & ~done).nonzero().squeeze(1).tolist():
                if self._stops.ends(part.ids[row, : step + 1]):
                    why[row] = 2
        fresh = (why > 0) & ~done
        part.why.add_(why * fresh)
        part.sampled.masked_fill_(fresh, step + 1)
        done |= fresh
        return int(done.sum())


def _require_numbers(logprob: Tensor, rows: Tensor, live: Tensor, done: Tensor, step: int) -> None:
    """Raises where a row that has not ended got no probability: its logits hold NaN or inf, or rule out every token."""
    bad = (logprob.isnan() & ~done).nonzero()
    if len(bad):
        raise InvalidInputError(
            f"Row {int(rows[int(live[bad[0]])])}, token {step}: its logits hold NaN or inf, or rule out all tokens, "
            "so none can be chosen. Load the model with dtype='float32', or make the intervention weaker; "
            "Model.capture(..., allow_nan=True) shows where it begins."
        )


def _distinct(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each group of identical rows, and the group of each row."""
    _, owner = ids.where(mask, -1).unique(dim=0, return_inverse=True)
    order = torch.arange(len(ids), device=ids.device)
    n_groups = int(owner.max()) + 1
    if n_groups == len(ids):
        return order, order
    return torch.full((n_groups,), len(ids), device=ids.device).scatter_reduce(0, owner, order, "amin"), owner


def _shared_columns(ids: Tensor, mask: Tensor) -> int:
    """How many leading columns hold only padding and a prefix that all rows have in common; 0 if too few to matter."""
    width = ids.shape[1]
    padding = (~mask).sum(1, keepdim=True)
    if bool(padding.min() > 0):
        # The row without padding holds every shared column; where there is none, nothing is shared.
        return 0
    place = torch.arange(width, device=ids.device) + padding
    aligned = ids.gather(1, place.clamp_max(width - 1))
    agree = (aligned == aligned[padding.argmin()]) & (place < width)
    common = agree.long().cumprod(1).sum(1, keepdim=True)
    # The last column stays out, because its logits are needed.
    columns = min(int((common + padding).min()), width - 1)
    return columns if (len(ids) - 1) * columns >= _WORTH else 0
