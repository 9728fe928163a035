"""From the activations at a site to later sites and the logits: only the blocks behind the site run, with gradient."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from workbench.core.display import OneLine
from workbench.core.errors import EditError, InvalidInputError, ShapeError
from workbench.core.numbers import counted
from workbench.core.tokens import TokenBatch
from workbench.hooks.attach import Fn, attach
from workbench.hooks.capture import EAGER_NOTE, Activations
from workbench.hooks.handles import Hooks, refuse_compiled
from workbench.hooks.sites import Point, Site
from workbench.interventions.plan import Plan
from workbench.models.blockcalls import BlockCalls, prefill
from workbench.models.head import agree, edits_logits, forward
from workbench.models.numbers import has_nan
from workbench.models.reached import NO_LOGITS, Reached
from workbench.models.wrapped import Wrapped

if TYPE_CHECKING:
    from transformers import Cache


STREAM = ("resid_pre", "resid_post")
Stretch = tuple[str | Site, Sequence[str | Site], Sequence[str | Site]]
"""Where a segment starts, where it leads, and what it holds."""


class _Finished(Exception):
    """Raised behind the last site that is wanted; the rest of the forward pass is not computed."""


class Segment(OneLine):
    """A batch that ran once, to be continued from one site as often as wanted, with other activations or under edits.

    Everything that the site does not reach stays as in the recorded run. The blocks behind the site are called with the
    arguments that the model gave them; at a site inside a block, that block runs too, on its recorded input. With
    `last` only so many last tokens of each row run (True: one), over the cached keys and values of the others: exact,
    by causality, for changes of no other token. That this reproduces the recorded run is checked; where it does not (an
    architecture that does more between its blocks), the whole model runs and the results are the same.

    What is in `hold` stays as recorded in every run, and no gradient passes there: only paths around it are left.

    Attributes:
        x: activations of the recorded run at the site, heads side by side: `(batch, pos, width)`; the last positions
            alone with `last`, unless the model can't keep the others.
        skips_blocks: whether the blocks before the site are skipped.
        first_block: the first block that runs again.
    """

    def __init__(
        self,
        model: Wrapped,
        batch: TokenBatch,
        site: str | Site,
        to: str | Site | Sequence[str | Site] = "logits",
        *,
        last: bool | int = False,
        hold: Sequence[str | Site] = (),
    ) -> None:
        if last and not bool(batch.mask[:, -1].all()):
            raise InvalidInputError("segment(last=...): pad the batch on the left, so that each row ends in a token.")
        if edits_logits(model.hf):
            raise InvalidInputError("A plan that edits the logits is active; make a segment outside of its block.")
        self._model, self._hf, self._sites, self._batch = model, model.hf, model.site_map, batch
        self._norm = self._sites["final_norm"]
        self._held: dict[Point, Tensor] = {}
        layers = self._lead(site, to, hold)
        points = [self._point, *self._points, *self._holding]
        refuse_compiled(self._hf, [*points, self._norm])
        self.first_block = layers.start
        self._blocks = [self._sites[Site("resid_post", i)].module for i in layers]
        self._is_eager = any(point.side == "inside" for point in points)
        with torch.no_grad():
            self._calls = BlockCalls(batch, prefill(self._hf, batch, int(last)) if last else None, int(last))
            self._last = int(last) if self._calls.prefix is not None else 0
            self._mask = batch.mask[:, -self._last :]  # all of it where none is cached
            column = (self._mask.long() * torch.arange(self._mask.shape[1], device=self._mask.device)).argmax(1)
            self._at_end = nn.functional.one_hot(column, self._mask.shape[1]).bool()
            self.skips_blocks = self._reproduces(*self._record())

    def _lead(self, site: str | Site, to: str | Site | Sequence[str | Site], hold: Sequence[str | Site]) -> range:
        """Sets where it leads from and to, and what is held between; the blocks of that."""
        self._point = self._sites[site]
        ends = [self._sites[end] for end in ([to] if isinstance(to, str | Site) else to)]
        self._points = [point for point in dict.fromkeys(ends) if point.site.kind != "logits"]
        self._to_logits = len(self._points) < len(set(ends))
        self._holding = [self._sites[held] for held in hold]
        self._require_reached(ends)
        n_layers, layer = self._sites.n_layers, self._point.site.layer
        start = (0 if self._point.site.kind == "embed" else n_layers) if layer is None else layer
        last = max(n_layers - 1 if end.site.layer is None else end.site.layer for end in ends)
        return range(start + (self._point.site.kind == "resid_post"), last + 1)

    def _require_reached(self, ends: Sequence[Point]) -> None:
        here = self._point.site
        if not ends or here.kind == "logits":
            raise InvalidInputError(
                f"segment({here}, to={[str(end.site) for end in ends]}): nothing is to be computed."
            )
        for point in self._points:
            if not self._sites.reaches(here, point.site):
                raise InvalidInputError(
                    f"segment({here}, to={point.site}): a change at {here} does not reach {point.site}. Start at an "
                    "earlier site, or end at a later one."
                )

        for held in (point.site for point in self._holding):
            if not here.precedes(held) or not any(held.precedes(end.site) for end in ends):
                raise InvalidInputError(
                    f"segment({here}, hold={held}): what is held must lie between {here} and the end of the segment."
                )

    # The recorded run.

    def _record(self) -> tuple[dict[Site, Tensor], Tensor | None]:
        """One run of the model: notes what reaches the blocks, the site, and what the segment leads to."""
        at_site: list[Tensor] = []
        found: dict[Site, Tensor] = {}
        with Hooks() as on:
            for block in self._blocks:
                on.add(block, self._calls.note, before=True)
            on.add(self._norm.module, self._calls.note_start, before=True)
            notes: list[tuple[Point, Fn]] = [(p, functools.partial(self._held.__setitem__, p)) for p in self._holding]
            hooks = [(self._point, at_site.append), *notes, *self._readers(found)]
            rows = torch.arange(len(self._batch), device=self._batch.ids.device)
            hidden, self._logits = self._forward(rows, self._calls.prefix, hooks, self._at_end)
        if hidden is not None and self._logits is not None:
            if has_nan(self._logits):
                row = int(self._logits.amax(-1).isnan().nonzero()[0])
                raise InvalidInputError(
                    f"{self._point.site}: the logits after the last token of row {row} are NaN without any edit. Load "
                    "the model with dtype='float32', or look for where it begins with Model.capture(..., "
                    "allow_nan=True)."
                )
            self._model.head.require(hidden, self._logits)
        self.x: Float[Tensor, "batch pos width"] = self._point.flat(at_site[0]).to(self._batch.ids.device)
        start = self._calls.start
        self._start = self.x if start is None or self._point.site.kind in STREAM else start
        return found, hidden

    def _forward(
        self, index: Tensor, cache: Cache | None, hooks: Sequence[tuple[Point, Fn]], at: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """A run of the whole model: the unembedding's input at `at` (None: everywhere), and with `at` the logits."""
        inputs = {name: value[index] for name, value in self._model._inputs(self._batch).items()}
        if self._last:
            inputs |= {name: inputs[name][:, -self._last :] for name in ("input_ids", "position_ids")}
        cached = {"past_key_values": cache, "use_cache": True} if self._last else {"use_cache": False}
        with Hooks() as on, contextlib.suppress(_Finished):
            attach(on, hooks)
            try:
                if self._to_logits:
                    return forward(self._hf, {**inputs, **cached}, at, unembed=at is not None)
                self._hf(**inputs, **cached)
            finally:
                self._calls.crop(cache)
        return None, None

    def _reproduces(self, found: dict[Site, Tensor], hidden: Tensor | None) -> bool:
        """Whether the blocks alone give the recorded run, for a few rows in another order and number than it had."""
        if len(self._calls) != len(self._blocks) or self._point.site.kind == "embed":
            return False
        n = len(self._batch)
        index = torch.tensor([n - 1, 0] if n in (1, 3) else [n - 1, 0, n - 1], device=self._batch.ids.device)
        try:
            again = self._skipping(index, None, None, self._holders(index, {}))
        except torch.OutOfMemoryError:  # a RuntimeError that says nothing about the blocks
            raise
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # arguments of its blocks that can't be repeated like a batch
        mask = self._mask[index]
        pairs = [(again.acts.flat(p.site)[mask], p.flat(found[p.site])[index][mask]) for p in self._points]
        if hidden is not None:
            pairs.append((again.hidden[self._at_end[index]], hidden[index]))
        return all(agree(a, b, self.x.dtype) for a, b in pairs)

    # Running behind the site.

    def run(
        self,
        x: Float[Tensor, "*tokens width"] | None = None,
        *,
        rows: int | Int[Tensor, " rows"] = 1,
        keep: Bool[Tensor, "rows pos"] | None = None,
        plan: Plan | None = None,
        held: Mapping[str, Float[Tensor, "rows pos width"]] | None = None,
    ) -> Reached:
        """What the segment leads to when the site holds `x`; gradients reach `x` where autograd is on.

        Args:
            x: activations at the site, heads side by side: `(rows, pos, width)`, or `(tokens, width)` for the tokens of
                `keep` in row order. None leaves the site as it was.
            rows: number of copies of the batch, copy by copy; or for each row the batch row that it continues.
            keep: True at the tokens that `x` replaces; the others stay as recorded.
            plan: an active plan that edits sites of the segment; with `x`, sites behind its start.
            held: what some of the held sites hold in this run instead, heads side by side.

        Raises:
            ShapeError: if `x`, `rows` and `keep` do not fit each other.
            InvalidInputError: if the plan edits or reads something that is computed before the site.
            EditError: if an edit did not happen, or `x` is not finite.
            UnknownSiteError: if `x` needs a gradient that this model does not have at the site.
        """
        n, device = len(self._batch), self._batch.ids.device
        index = torch.arange(n * rows, device=device) % n if isinstance(rows, int) else rows.to(device)
        if plan is not None:
            self._require_behind(plan, replaced=x is not None)
        values = None if x is None else self._values(x, index, keep)
        holders = self._holders(index, held or {})
        # Recorded masks of another implementation do not fit eager attention, which an edit of a pattern needs.
        as_recorded = plan is None or self._is_eager or all(point.side != "inside" for point in plan.points)
        if self.skips_blocks and as_recorded:
            return self._skipping(index, values, plan, holders)
        found: dict[Site, Tensor] = {}
        hooks = [*self._writer(values), *holders, *self._readers(found)]
        return self._reached(index, found, self._forward(index, self._calls.of_rows(index)[0], hooks)[0])

    def _values(self, x: Tensor, index: Tensor, keep: Tensor | None) -> Tensor:
        """The activations at the site for each row, replaced and recorded ones together."""
        if x.requires_grad and torch.is_grad_enabled():
            self._sites.require_gradient([self._point.site, *(point.site for point in self._points)])
        shape = (len(index), *self.x.shape[1:])
        if keep is not None and tuple(keep.shape) != shape[:2]:
            raise ShapeError(f"segment: keep has shape {tuple(keep.shape)}; rows and positions are {shape[:2]}.")
        wanted = shape if keep is None else (int(keep.sum()), shape[2])
        if tuple(x.shape) != wanted:
            raise ShapeError(
                f"segment({self._point.site}): x has shape {tuple(x.shape)}; {len(index)} rows of this batch need "
                f"{wanted}{'' if keep is None else ', one vector per kept token'}."
            )
        x = x.to(self.x.device, self.x.dtype)
        if not bool(x.isfinite().all()) and bool(self.x.isfinite().all()):
            raise EditError(f"segment({self._point.site}): x holds non-finite values. Check how it was made.")
        if keep is None:
            return x
        out = self.x[index]
        out[keep.to(out.device)] = x
        return out

    def _skipping(
        self, index: Tensor, values: Tensor | None, plan: Plan | None, holders: Sequence[tuple[Point, Fn]]
    ) -> Reached:
        """A run of the blocks behind the site alone."""
        cache, calls = self._calls.of_rows(index)
        found: dict[Site, Tensor] = {}
        readers, hidden = [*holders, *self._readers(found)], None
        at_stream = self._point.site.kind in STREAM
        h = values if values is not None and at_stream else self._start[index.to(self._start.device)]
        with Hooks() as on, contextlib.ExitStack() as stack:
            if plan is not None:
                ids, width = self._batch.ids[index], self._mask.shape[1]
                stack.enter_context(plan.stepping(ids, self._batch.mask[index], ids.shape[1] - width))
            stack.enter_context(contextlib.suppress(_Finished))
            stack.callback(self._calls.crop, cache)
            attach(on, readers if at_stream else [*self._writer(values), *readers])
            if self._point.site.kind == "resid_post":
                # The block that ends here does not run, so neither do its hooks.
                edits = [] if plan is None else [plan.at(self._point)]
                for fn in (*edits, *(fn for point, fn in readers if point == self._point)):
                    written = fn(h)
                    h = h if written is None else written
            for block, call in zip(self._blocks, calls, strict=True):
                h = call.over(block, h)
            hidden = self._norm.module(h).to(self._batch.ids.device)
        return self._reached(index, found, hidden if self._to_logits else None)

    def later(self, sites: Sequence[str | Site]) -> dict[Site, Segment]:
        """Segments of the same recorded run from later sites to the same end; one run reads what all of them hold.

        Raises:
            UnknownSiteError: for a site that this model does not have, or outside its blocks.
            InvalidInputError: if a site is not behind this one, or does not reach the end.
        """
        to = [*(point.site for point in self._points), *(["logits"] if self._to_logits else [])]
        hold = [point.site for point in self._holding]
        points = [self._sites[site].site for site in sites]
        return dict(zip(points, self.stretches([(site, to, hold) for site in points]), strict=True))

    @torch.no_grad()
    def stretches(self, wanted: Sequence[Stretch]) -> list[Segment]:
        """Segments of the same recorded run, each with where it starts, where it leads and what it holds.

        Raises:
            UnknownSiteError: for a site that this model does not have, or outside its blocks.
            InvalidInputError: if a site is not behind this one, or does not reach its end.
        """
        points = [self._sites[site] for site, _, _ in wanted]
        starts = [self._sites[Site("resid_pre", p.site.layer)] for p in points if p.site.kind not in STREAM]
        reader = copy.copy(self)
        parts: list[Segment] = [copy.copy(self) for _ in wanted]
        blocks = [part._lead(*stretch) for part, stretch in zip(parts, wanted, strict=True)]
        read = dict.fromkeys([*points, *starts, *(point for part in parts for point in part._holding)])
        reader._lead(self._point.site, [point.site for point in read], ())
        acts = reader.run().acts
        for part, layers in zip(parts, blocks, strict=True):
            site, first, n = part._point.site, layers.start - self.first_block, len(layers)
            part.x, part.first_block = acts.flat(site), layers.start
            part._blocks, part._calls = self._blocks[first : first + n], self._calls.part(first, n)
            part._start = part.x if site.kind in STREAM else acts[Site("resid_pre", site.layer)]
            part._held = {point: acts[point.site] for point in part._holding}
        return parts

    def _writer(self, values: Tensor | None) -> list[tuple[Point, Fn]]:
        """What puts the values in at the site."""
        return [] if values is None else [(self._point, lambda x: self._point.unflat(values.to(x.device), x))]

    def _holders(self, index: Tensor, instead: Mapping[str, Tensor]) -> list[tuple[Point, Fn]]:
        """What keeps the held sites as they were recorded, without gradient, or as they are given."""
        given = {self._sites[site]: value for site, value in instead.items()}
        if unknown := [str(point.site) for point in given if point not in self._held]:
            raise InvalidInputError(
                f"segment.run(held={{{unknown[0]!r}: ...}}): this segment holds "
                f"{', '.join(str(p.site) for p in self._held) or 'nothing'}. Name the site in segment(hold=)."
            )

        def write(point: Point, kept: Tensor, x: Tensor) -> Tensor:
            value = given.get(point)
            return kept[index.to(kept.device)].to(x) if value is None else point.unflat(value.to(x), x)

        return [(point, functools.partial(write, point, kept)) for point, kept in self._held.items()]

    def _readers(self, found: dict[Site, Tensor]) -> list[tuple[Point, Fn]]:
        """What notes the activations at the sites that the segment leads to, and stops the model behind the last."""

        def read(point: Point, x: Tensor) -> None:
            found[point.site] = x.to(self._batch.ids.device)
            if len(found) == len(self._points) and not self._to_logits:
                raise _Finished

        return [(point, functools.partial(read, point)) for point in self._points]

    def _reached(self, index: Tensor, found: dict[Site, Tensor], hidden: Tensor | None) -> Reached:
        silent = [str(point.site) for point in self._points if point.site not in found]
        if silent:
            raise EditError(f"segment: the model never ran the module of {', '.join(silent)}; nothing was read there.")
        tensors = {point.site: found[point.site] for point in self._points}
        acts = Activations(tensors, n_layers=self._sites.n_layers, note=EAGER_NOTE if self._is_eager else "")
        return Reached(acts, hidden, self._at_end[index], self._model.head)

    # What it is.

    @property
    def logits(self) -> Float[Tensor, "batch d_vocab"]:
        """The model's own logits at the last token of each row in the recorded run, fp32."""
        if self._logits is None:
            raise InvalidInputError(NO_LOGITS)
        return self._logits

    @property
    def last(self) -> bool:
        """Whether the last tokens run alone; not where a cache can't take a token back."""
        return self._last > 0 or self._batch.ids.shape[1] == 1

    @property
    def how(self) -> str:
        """What a run computes, in words."""
        if not self.skips_blocks:
            return f"the whole model{' on the last tokens, over the cached prompts' if self._last else ''}"
        some = "the last token" if self._last == 1 else f"the last {self._last} tokens"
        tokens = f"{some} of each prompt, over cached keys and values" if self._last else "all tokens"
        end = self.first_block + len(self._blocks)
        blocks = f"blocks {self.first_block} to {end - 1}" if self._blocks else "no block"
        return f"{blocks} of {self._sites.n_layers}, on {tokens}"

    def _shown_line(self) -> str:
        return f"{counted(len(self._batch), 'rows')} from {self._point.site}: {self.how}"

    def _require_behind(self, plan: Plan, *, replaced: bool) -> None:
        edits, start = plan.intervention.edits, self._point.site
        if self._last and not all(edit.scope.only_last and not edit.op.gated for edit in edits):
            raise InvalidInputError(
                "segment(last=...) runs the last tokens of each row alone: every scope must be Last() or Pos(-1), "
                f"without gates; the plan has {'; '.join(map(str, edits))}."
            )
        if any(point.site.kind == "logits" for point in plan.points):
            raise InvalidInputError("A segment computes chosen logits only; edit final_norm, or the logits yourself.")
        before = [point for point in plan.points if point.site.precedes(start)]
        if before:
            raise InvalidInputError(
                f"segment({start}): the plan also uses {', '.join(str(p.site) for p in before)}, which is computed "
                "before it. Start at the earliest site that is edited or read."
            )
        if replaced and any(not start.precedes(point.site) for point in plan.points):
            raise InvalidInputError(f"segment({start}): both x and the plan write there. Leave out one of them.")
