"""Exact activation patching: what the metric becomes when one site of one token holds what it holds in another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.classics.shared import (
    Align,
    comparable,
    estimate,
    mean_and_error,
    position_names,
    require_rows,
    segments_at,
    third_prompts,
    whole_difference,
    whole_run,
    without_third,
)
from circuits.classics.tables import AttributionTable, plain
from circuits.doctor.report import attrs_of, marked
from circuits.metrics import AnyMetric, Metric, bound, logit_difference, named, value
from circuits.pairs import Pairs
from workbench.core.arguments import checked
from workbench.core.display import clipped, visible
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.progress import track
from workbench.core.stats import Estimate
from workbench.engine.job import Made
from workbench.engine.keeper import Keeper
from workbench.hooks.capture import Activations
from workbench.hooks.sites import HEAD_KINDS, Site
from workbench.models.model import Model
from workbench.models.segment import Segment
from workbench.report.base import Grid, Headline, Heat, Says, Section, Table, beside
from workbench.report.base import Metric as Kept

if TYPE_CHECKING:
    import pandas as pd

By = Literal["position", "all"]
_RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "embed")
_ROWS_IN_REPORT, _HEADS_DRAWN, _NAME = 50, 24, 16
_FEWEST_ROWS = 16
"""With fewer rows a forward pass spends its time on reading the weights."""


@dataclass(frozen=True)
class Cell:
    """What one row of the table patches.

    Attributes:
        site: the site; with a head, its part of it.
        column: of the batch; None patches all tokens from the first difference on.
    """

    site: Site
    column: int | None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PatchGrid(AttributionTable):
    """Effects of patching, `metric(patched) - metric(clean)`, one per cell and pair; 0 where nothing can differ.

    Attributes:
        metric: what was measured.
        cells: what was patched.
        effects: nan where a pair has no token at the position.
        control: the same with a third prompt in place of the patch prompt; nan where there is none.
        totals: `metric(patch prompt) - metric(clean prompt)` of each pair: everything patched.
        positions: what a column of the batch is called in the table.
        tokens: what stands in each column.
        note: what was left out, in words.
    """

    metric: str
    cells: tuple[Cell, ...]
    effects: Float[Tensor, "cells pairs"]
    control: Float[Tensor, "cells pairs"]
    totals: Float[Tensor, " pairs"]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    note: str = ""

    def frame(self) -> pd.DataFrame:
        """One row per cell: effect, standard error, share of the whole run's difference, and the control's effect."""
        import pandas as pd

        effect, se, n = mean_and_error(self.effects)
        control, control_se, _ = mean_and_error(self.control)
        whole = whole_difference(self.totals)
        columns = [cell.column for cell in self.cells]
        frame = pd.DataFrame(
            {
                "site": [str(replace(cell.site, head=None)) for cell in self.cells],
                "layer": [cell.site.layer for cell in self.cells],
                "head": pd.array([cell.site.head for cell in self.cells], dtype="Int64"),
                "pos": pd.array([None if c is None else self.positions[c] for c in columns], dtype="Int64"),
                "token": ["all" if c is None else self.tokens[c] for c in columns],
                "effect": effect, "se": se, "normalised": effect / whole if whole is not None else np.nan,
                "n": n, "control": control, "control_se": control_se,
            }
        )  # fmt: skip
        frame.attrs.update(attrs_of(self.doctor))
        return frame

    def total(self) -> Estimate | None:
        """The whole run's difference."""
        return estimate(self.totals)

    def headline(self) -> Headline:
        """The strongest cell beside its control."""
        says = Says(
            "Patching the strongest cell moves the metric more than a third prompt does there.",
            "Patching the strongest cell moves the metric no more than a third prompt does there.",
            "Patching the strongest cell moves the metric less than a third prompt does there.",
            "There is no third prompt for a control.",
        )
        return Headline.of(says, self._beside())

    def _strongest(self) -> int:
        """Among what single sublayers write, if any was patched: patching the stream where tokens differ is no news."""
        effect, _, _ = mean_and_error(self.effects)
        inner = [i for i, cell in enumerate(self.cells) if cell.site.kind not in _RESIDUAL]
        return max(inner or range(len(self.cells)), key=lambda i: abs(effect[i]))

    def _beside(self) -> Table:
        i = self._strongest()
        sign = 1.0 if float(self.effects[i].nansum()) >= 0 else -1.0
        real, control = sign * self.effects[i], sign * self.control[i]
        both = ~(real.isnan() | control.isnan())
        measure = f"effect on the metric ({self.metric})" + ("" if sign > 0 else ", sign turned")
        if not bool(both.any()):
            return beside(measure, (self._name(i), estimate(real)), None)
        return beside(
            measure, (self._name(i), estimate(real[both])), ("a third prompt there", estimate(control[both])),
            estimate((real - control)[both]),
        )  # fmt: skip

    def _name(self, i: int) -> str:
        cell = self.cells[i]
        where = "all positions" if cell.column is None else f"position {self.positions[cell.column]}"
        return f"{cell.site} at {where}"

    def findings(self) -> tuple[str, ...]:
        """The whole run's difference, the strongest cell, and what was left out."""
        total, whole = self.total(), whole_difference(self.totals)
        found = [f"The whole run's difference of the metric ({self.metric}) is {total}."]
        if whole is None:
            found.append("It is within noise, so effects are not given as shares of it. Use more pairs, or others.")
        i = self._strongest()
        found.append(f"The strongest cell is {self._name(i)}: {estimate(self.effects[i])}; it was chosen for its size.")
        return (*found, f"Attribution doctor: {self.verdict}.", *([self.note] if self.note else []))

    def section(self) -> Section:
        """Heat maps, the strongest cells, and the whole run's difference."""
        frame = self.frame()
        top = frame.sort_values("effect", key=abs, ascending=False, kind="stable").head(_ROWS_IN_REPORT)
        columns = ("cell", "token", "effect", "se", "normalised", "control", "n")
        rows = tuple((self._name(i), *(plain(top.at[i, c]) for c in columns[1:])) for i in top.index.tolist())
        table = Table(columns, rows, f"Strongest cells. Effect: metric patched minus clean ({self.metric}); "
                      "normalised: as a share of the whole run's difference; control: patched from a third "
                      "prompt.")  # fmt: skip
        total = self.total()
        metrics: dict[str, Kept] = {} if total is None else {"whole_difference": total}
        return Section(
            "Activation patching", (self._picture(), self._beside(), table), self.findings(), metrics, self.headline()
        )

    def _picture(self) -> Heat:
        """Layers by positions, a heat map per kind of site; by head where heads were patched."""
        effect, _, _ = mean_and_error(self.effects)
        kinds = dict.fromkeys((cell.site.kind, cell.site.head is not None) for cell in self.cells)
        grids = tuple(self._grid(kind, heads, effect) for kind, heads in kinds)
        return Heat(marked("Effect of patching", self.doctor), grids, f"Metric patched minus clean: {self.metric}.")

    def _column(self, column: int) -> str:
        return clipped(visible(f"{self.positions[column]} {self.tokens[column]}"), _NAME)

    def _grid(self, kind: str, heads: bool, effect: np.ndarray) -> Grid:
        cells = [(i, c) for i, c in enumerate(self.cells) if c.site.kind == kind and (c.site.head is not None) == heads]
        by_head = heads and all(cell.column is None for _, cell in cells)
        where = {(_row(cell.site, by_head), cell.site.head if by_head else cell.column): effect[i] for i, cell in cells}
        rows = sorted({row for row, _ in where}, reverse=True)
        left_out = ""
        if heads and not by_head and len(rows) > _HEADS_DRAWN:
            largest = {row: max(abs(v) for (r, _), v in where.items() if r == row) for row in rows}
            left_out = f", the {_HEADS_DRAWN} strongest of {len(rows)}"
            rows = sorted(sorted(rows, key=lambda row: -largest[row])[:_HEADS_DRAWN], reverse=True)
        columns = sorted({column for _, column in where if column is not None})
        names = [
            f"h{c}" if by_head else clipped(visible(f"{self.positions[c]} {self.tokens[c]}"), _NAME) for c in columns
        ] or ["all"]
        values = tuple(tuple(where.get((row, column)) for column in columns or [None]) for row in rows)
        return Grid(kind + left_out, tuple(_row_name(row) for row in rows), tuple(names), values)


def _row(site: Site, by_head: bool) -> tuple[int, int]:
    return site.layer or 0, -1 if site.head is None or by_head else site.head


def _row_name(row: tuple[int, int]) -> str:
    return str(row[0]) if row[1] < 0 else f"{row[0]}.h{row[1]}"


@checked
@torch.no_grad()
def patch_grid(
    model: Model,
    pairs: Pairs,
    metric: AnyMetric | None = None,
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    *,
    by: By = "position",
    align: Align = "start",
    rows: int = 64,
    seed: int = 0,
    keep: Keeper | None = None,
) -> PatchGrid:
    """Effect of giving one site, at one token, the activation of the patch prompt: each cell is a run, no estimate.

    All cells of a site are rows of one segment, which runs the blocks behind the site alone. Tokens before the first
    difference of a pair are not run: nothing can differ there, and the effect is exactly 0.

    Args:
        model: the model.
        pairs: all of one length, unless `align="end"`.
        metric: `circuits.logit_difference()` by default, so effects above 0 support the clean answer.
        sites: kinds such as "resid_pre", or single sites; "z" patches head by head, "z.5.h3" one head.
        by: "position" patches one token at a time; "all" every token from the first difference on.
        align: "end" counts positions from the last token.
        rows: prompts in one forward pass.
        seed: of the choice of third prompts.
        keep: of finished parts, which a stopped call continues; its key must hold all arguments.

    Raises:
        InvalidInputError: for pairs without counterparts, or of several lengths and not aligned.
        MismatchError: if the metric reads below a site.

    Source: Meng et al. 2022 (arXiv 2202.05262); with the words of Heimersheim and Nanda 2024 (arXiv 2404.15255) this is
    the noising form, from the clean run.
    """
    if by not in ("position", "all") or rows < 1:
        raise InvalidInputError(f"patch_grid(by={by!r}, rows={rows}): by is 'position' or 'all', rows at least 1.")
    pairs, patch = comparable("patch_grid", model, pairs, align)
    measured = bound(logit_difference() if metric is None else metric, model, pairs)
    third, there = third_prompts(pairs, seed)
    chosen, note = _chosen(model, sites, measured)
    width = pairs.clean.ids.shape[1]
    columns = [None] if by == "all" else list(range(width))
    cells = [Cell(replace(s, head=head), c) for s, heads in chosen.items() for head in heads for c in columns]
    runs = _Runs(model, pairs, measured, whole_run(model, pairs.clean, measured), rows)
    effects = runs.effects(cells, [model.capture(source, list(chosen)) for source in (patch, third)], keep)
    notes = [note, without_third(there)]
    return PatchGrid(
        metric=named(measured), cells=tuple(cells), effects=effects[0],
        control=effects[1].masked_fill(~there, torch.nan), totals=whole_run(model, patch, measured) - runs.before,
        positions=tuple(range(-width, 0) if align == "end" else range(width)), tokens=position_names(pairs),
        note=" ".join(filter(None, notes)),
    )  # fmt: skip


def _chosen(model: Model, wanted: Sequence[str], metric: Metric) -> tuple[dict[Site, list[int | None]], str]:
    """The sites from which the metric is reached, with their heads; and which were left out, in words."""
    chosen: dict[Site, list[int | None]] = {}
    left_out: list[str] = []
    for name in wanted:
        found = model.site_map.named([name])
        reaching = [site for site in found if model.site_map.reaches(site, metric.site)]
        left_out += [str(site) for site in found if site not in reaching]
        if not reaching:
            raise MismatchError(
                f"patch_grid(sites={[name]}): the metric reads at {metric.site}, which {name} does not reach. Patch at "
                "an earlier site, or read later."
            )
        for site in reaching:
            point = model.site_map[site]
            if point.width is None:
                raise InvalidInputError(f"patch_grid(sites={[name]}): {site} has no vector per token. Patch q, k or z.")
            whole = replace(site, head=None)
            heads = [site.head] if site.head is not None else _heads(site, point.heads)
            chosen.setdefault(whole, []).extend(heads)
    require_rows("patch_grid(sites=[])", list(chosen), "name at least one site, such as 'resid_pre'.")
    ordered = {site: list(dict.fromkeys(chosen[site])) for site in sorted(chosen, key=lambda site: site.order)}
    text = f"Left out, since the metric reads at {metric.site}: {', '.join(left_out)}." if left_out else ""
    return ordered, text


def _heads(site: Site, n: int | None) -> list[int | None]:
    return list(range(n or 0)) if site.kind in HEAD_KINDS else [None]


def _part(site: Site, columns: Sequence[int | None]) -> str:
    """Of what is kept: one site at some positions."""
    first, last = columns[0], columns[-1]
    return f"{site}-all" if first is None else f"{site}-{first}-to-{last}"


_Job = tuple[int, int, int]
"""Source of the patch (0 is the clean run itself), cell and pair of one row."""


@dataclass(frozen=True, eq=False)
class _Runs:
    """The runs of a grid: every cell and pair that can differ from the clean run is a row of a segment.

    Attributes:
        before: the metric of the clean run.
        size: rows in one forward pass.
    """

    model: Model
    pairs: Pairs
    metric: Metric
    before: Float[Tensor, " pairs"]
    size: int

    def effects(
        self, cells: Sequence[Cell], sources: Sequence[Activations], keep: Keeper | None = None
    ) -> Float[Tensor, "sources cells pairs"]:
        """Zero where nothing differs, nan at padding."""
        effects = self.before.new_zeros(len(sources), len(cells), len(self.pairs))
        for i, cell in enumerate(cells):
            if cell.column is not None:
                effects[:, i].masked_fill_(~self.pairs.clean.mask[:, cell.column], torch.nan)
        wholes = [replace(cell.site, head=None) for cell in cells]
        sites = list(dict.fromkeys(wholes))
        groups = self._groups(cells)
        for columns in track(groups, description="patching", unit="groups of positions"):
            left = [site for site in sites if keep is None or not keep.has(_part(site, columns))]
            segments = segments_at(self.model, self.pairs.clean, left, self.metric.site, last=self._tail(columns))
            for site in sites:
                here = [i for i, c in enumerate(cells) if wholes[i] == site and c.column in columns]
                if site not in segments:
                    assert keep is not None
                    effects[:, here] = keep.tensors(_part(site, columns))["effects"].to(effects)
                    continue
                segment = segments[site]
                cut = self.pairs.clean.ids.shape[1] - segment.x.shape[1]
                states = [acts.flat(site)[:, cut:].to(segment.x) for acts in sources]
                self._fill(effects, segment, torch.stack([segment.x, *states]), {i: cells[i] for i in here})
                if keep is not None:
                    keep.put(_part(site, columns), Made(tensors={"effects": effects[:, here]}))
        return effects

    def _groups(self, cells: Sequence[Cell]) -> list[list[int | None]]:
        """Columns that run together.

        A run computes no token before its first column, so few columns are cheaper, as long as their rows are many
        enough for a forward pass to be efficient.
        """
        changed = self.pairs.changed().sum(0)
        columns = changed.nonzero()[:, 0].tolist()
        if cells[0].column is None:
            return [[None]]
        n_rows = 2 * int(changed.sum()) * max(self._n_heads(cell.site) for cell in cells)
        size = -(-len(columns) // min(len(columns), max(1, n_rows // _FEWEST_ROWS)))
        return [columns[i : i + size] for i in range(0, len(columns), size)]

    def _tail(self, columns: Sequence[int | None]) -> int:
        """How many last tokens have to run; 0 for all, where the metric reads the activations of all."""
        width = self.pairs.clean.ids.shape[1]
        first = min(int(self.pairs.changed().any(0).int().argmax()) if c is None else c for c in columns)
        return width - first if self.metric.site == "logits" and first > 0 else 0

    def _fill(self, effects: Tensor, segment: Segment, states: Tensor, cells: Mapping[int, Cell]) -> None:
        before, jobs = self.before.clone(), self._jobs(states, cells)
        for part in range(0, len(jobs), self.size):
            source, cell, row = torch.tensor(jobs[part : part + self.size], device=states.device).T
            where = self._where([cells.get(i) for i in cell.tolist()], row, states)
            x = torch.where(where, states[source, row], states[0, row])
            after, is_clean = value(self.metric, segment.run(x, rows=row), row), source == 0
            before[row[is_clean]] = after[is_clean]
            effects[(source - 1)[~is_clean], cell[~is_clean], row[~is_clean]] = (after - before[row])[~is_clean]

    def _jobs(self, states: Tensor, cells: Mapping[int, Cell]) -> list[_Job]:
        """In 16 bits the clean run is a part of each batch: how a batch is rounded depends on what is in it."""
        rows = range(len(self.pairs)) if self.model.dtype in (torch.bfloat16, torch.float16) else ()
        jobs: list[_Job] = [(0, -1, row) for row in rows]
        cut, heads = self.pairs.clean.ids.shape[1] - states.shape[2], self._n_heads(next(iter(cells.values())).site)
        for k in range(1, len(states)):
            differs = (states[0] != states[k]).unflatten(2, (heads, -1)).any(-1)
            differs &= self.pairs.changed()[:, cut:, None].to(differs.device)
            for i, cell in cells.items():
                here = differs[..., cell.site.head or 0]
                rows = here.any(1) if cell.column is None else here[:, cell.column - cut]
                jobs += [(k, i, row) for row in rows.nonzero()[:, 0].tolist()]
        return jobs

    def _where(self, cells: Sequence[Cell | None], rows: Tensor, states: Tensor) -> Tensor:
        """True at what each row patches, `(rows, pos, width)`."""
        n_columns, device = self.pairs.clean.ids.shape[1], rows.device
        sites = [cell.site for cell in cells if cell is not None]
        n_heads = self._n_heads(sites[0]) if sites else 1
        columns = torch.tensor([-1 if c is None or c.column is None else c.column for c in cells], device=device)
        heads = torch.tensor([0 if c is None else c.site.head or 0 for c in cells], device=device)
        single = torch.arange(n_columns, device=device) == columns[:, None]
        at = torch.where(columns[:, None] < 0, self.pairs.changed()[rows], single)[:, -states.shape[2] :]
        of = torch.arange(n_heads, device=device) == heads[:, None]
        return at[:, :, None] & of.repeat_interleave(states.shape[3] // n_heads, dim=1)[:, None]

    def _n_heads(self, site: Site) -> int:
        """Of the site; 1 where it is patched whole."""
        return 1 if site.head is None else self.model.site_map[replace(site, head=None)].heads or 1
