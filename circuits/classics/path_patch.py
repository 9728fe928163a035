"""Exact path patching: what one component says to another, with the other heads in between held at the clean run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.classics.shared import (
    Align,
    comparable,
    estimate,
    require_rows,
    segments_at,
    third_prompts,
    whole_difference,
    whole_run,
    without_third,
)
from circuits.classics.tables import TableReport
from circuits.metrics import AnyMetric, Metric, bound, logit_difference, named, value
from circuits.pairs import Pairs
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted, number
from workbench.core.progress import track
from workbench.core.tokens import TokenBatch
from workbench.hooks.attach import Fn, attached
from workbench.hooks.sites import Point, Site
from workbench.models.model import Model
from workbench.models.segment import Segment
from workbench.report.base import Grid, Headline, Heat, Says, Section, Table, beside

if TYPE_CHECKING:
    import pandas as pd

LOGITS = "logits"
_INPUTS = {"q": "query", "k": "key", "v": "value", "z": "query, key and value", "mlp_out": "MLP input"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Path:
    """One sender and one receiver; numbers are `metric(patched) - metric(clean)`, one per pair.

    Attributes:
        sender: the site whose output is patched.
        receiver: the site that is computed from it; "logits" is the direct path.
        effect: exact.
        linear: the first-order estimate: the metric's gradient at the receiver times the receiver's change.
        control: exact, with a third prompt's output of the sender; nan where there is none.
    """

    sender: str
    receiver: str
    effect: Float[Tensor, " pairs"]
    linear: Float[Tensor, " pairs"]
    control: Float[Tensor, " pairs"]

    @property
    def input(self) -> str:
        """What of the receiver changes."""
        kind = LOGITS if self.receiver == LOGITS else Site.parse(self.receiver).kind
        return _INPUTS.get(kind, "residual stream")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PathEffects(TableReport):
    """Effects of paths.

    Attributes:
        metric: what was measured.
        paths: sender by sender.
        totals: `metric(patch prompt) - metric(clean prompt)` of each pair.
        frozen: what was held at the clean run, in words.
        note: what was left out, in words.
    """

    metric: str
    paths: tuple[Path, ...]
    totals: Float[Tensor, " pairs"]
    frozen: str
    note: str = ""

    def frame(self) -> pd.DataFrame:
        """One row per path: effect with its 95 % interval, linear estimate, and the control's effect."""
        import pandas as pd

        whole = whole_difference(self.totals)
        rows = []
        for path in self.paths:
            effect = estimate(path.effect)
            assert effect is not None
            control = estimate(path.control)
            rows.append(
                {
                    "sender": path.sender, "receiver": path.receiver, "input": path.input, "effect": effect.value,
                    "ci_low": effect.low, "ci_high": effect.high, "linear_estimate": float(path.linear.mean()),
                    "normalised": float("nan") if whole is None else effect.value / whole,
                    "control": float("nan") if control is None else control.value, "n": effect.n,
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def headline(self) -> Headline:
        """The strongest path beside its control."""
        says = Says(
            "The strongest path carries more than a third prompt through the same path.",
            "The strongest path carries no more than a third prompt through the same path.",
            "The strongest path carries less than a third prompt through the same path.",
            "There is no third prompt for a control.",
        )
        return Headline.of(says, self._beside())

    def _strongest(self) -> Path:
        return max(self.paths, key=lambda path: abs(float(path.effect.mean())))

    def _beside(self) -> Table:
        path = self._strongest()
        sign = 1.0 if float(path.effect.mean()) >= 0 else -1.0
        measure, name = f"effect on the metric ({self.metric})", f"{path.sender} to {path.receiver}"
        measure += "" if sign > 0 else ", sign turned"
        there = ~path.control.isnan()
        if not bool(there.any()):
            return beside(measure, (name, estimate(sign * path.effect)), None)
        real, control = sign * path.effect[there], sign * path.control[there]
        return beside(measure, (name, estimate(real)), ("a third prompt", estimate(control)), estimate(real - control))

    def findings(self) -> tuple[str, ...]:
        """The strongest path, what was frozen and what was left out."""
        path = self._strongest()
        return (
            f"The strongest of {counted(len(self.paths), 'paths')} is {path.sender} to {path.receiver}: "
            f"{estimate(path.effect)}; the first-order estimate is {number(float(path.linear.mean()))}.",
            f"The whole run's difference of the metric ({self.metric}) is {estimate(self.totals)}.",
            self.frozen,
            *([self.note] if self.note else []),
        )

    def section(self) -> Section:
        """Senders by receivers as a heat map, and the table."""
        rows = [
            (f"{p.sender} to {p.receiver}", p.input, estimate(p.effect), float(p.linear.mean()), estimate(p.control))
            for p in sorted(self.paths, key=lambda path: -abs(float(path.effect.mean())))
        ]
        table = Table(
            ("path", "input", "effect", "linear estimate", "control"), tuple(rows),
            f"Paths. Effect: metric patched minus clean ({self.metric}); linear estimate: gradient at the receiver "
            "times its change; control: a third prompt's output of the sender.",
        )  # fmt: skip
        blocks = (self._picture(), self._beside(), table)
        return Section("Path patching", blocks, self.findings(), {}, self.headline())

    def _picture(self) -> Heat:
        senders, receivers = (
            list(dict.fromkeys(getattr(p, end) for p in self.paths)) for end in ("sender", "receiver")
        )
        found = {(p.sender, p.receiver): float(p.effect.mean()) for p in self.paths}
        values = tuple(tuple(found.get((s, r)) for r in receivers) for s in senders)
        grid = Grid("from row to column", tuple(senders), tuple(receivers), values)
        return Heat("Effect of each path", (grid,), f"Metric patched minus clean: {self.metric}.")


@checked
def path_patch(
    model: Model,
    pairs: Pairs,
    metric: AnyMetric | None = None,
    senders: Sequence[str] = ("z.*.h*",),
    receivers: Sequence[str] = (LOGITS,),
    *,
    freeze_mlps: bool = False,
    align: Align = "start",
    seed: int = 0,
) -> PathEffects:
    """Effect of each path from a sender to a receiver: exact, two runs each, without a gradient.

    First run: the clean prompt, in which the sender holds its output of the patch prompt and every head behind it is
    frozen at the clean run (with `freeze_mlps` every MLP too); each receiver is noted as that stream gives it.
    Second run: the clean prompt, in which the receiver alone holds what was noted. A path that goes forward through no
    block, such as one to an earlier layer, is left out.

    Args:
        model: the model.
        pairs: all of one length, unless `align="end"`.
        metric: `circuits.logit_difference()` by default, so effects above 0 support the clean answer.
        senders: sites or patterns, such as "z.5.h3", "z.*.h*", "mlp_out.2", "resid_pre.0".
        receivers: "logits" for the direct path; "q.9.h1", "k.9.h0" or "v.9.h0" for one input of a head, "z.9.h1" for
            all three, "mlp_out.9" for the input of an MLP, "resid_pre.9" for the stream.
        freeze_mlps: count a path through an MLP as another path.
        align: "end" counts positions from the last token.
        seed: of the choice of third prompts.

    Raises:
        InvalidInputError: for pairs that can't be used, or if no receiver is behind a sender.

    Source: Wang et al. 2022 (arXiv 2211.00593), Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
    """
    pairs, patch = comparable("path_patch", model, pairs, align)
    measured = bound(logit_difference() if metric is None else metric, model, pairs)
    if LOGITS in receivers and measured.site != LOGITS:
        raise InvalidInputError(
            f"path_patch(receivers={list(receivers)}): the metric reads at {measured.site}, not at the logits. Name "
            f"{measured.site} or an earlier site as receiver."
        )
    froms = model.site_map.named(senders)
    ends = {str(site): site for name in receivers for site in _receivers(model, name)}
    third, there = third_prompts(pairs, seed)
    run = _Paths(model, pairs, measured, freeze_mlps, {LOGITS: _last(model)} | ends)
    notes = [without_third(there)]
    wanted = [LOGITS] * (LOGITS in receivers) + list(ends)
    reached = {s: [name for name in wanted if run.leads(s, name)] for s in froms}
    if left_out := sum(len(wanted) - len(names) for names in reached.values()):
        notes.append(f"{counted(left_out, 'paths')} left out: the sender does not come before the receiver.")
    require_rows("path_patch", [n for names in reached.values() for n in names], "no receiver is behind a sender.")
    noted = run.first({sender: names for sender, names in reached.items() if names}, (patch, third))
    found = run.second(noted, wanted)
    paths = [
        Path(sender=s, receiver=r, effect=e, linear=g, control=c.masked_fill(~there, torch.nan))
        for (s, r), (e, g, c) in sorted(found.items(), key=lambda item: (list(noted).index(item[0][0]), item[0][1]))
    ]
    frozen = f"Held at the clean run: every head behind the sender{' and every MLP' if freeze_mlps else ''}."
    return PathEffects(
        metric=named(measured), paths=tuple(paths), totals=whole_run(model, patch, measured)
        - whole_run(model, pairs.clean, measured), frozen=frozen, note=" ".join(filter(None, notes)),
    )  # fmt: skip


def _receivers(model: Model, name: str) -> list[Site]:
    return [] if name == LOGITS else model.site_map.named([name])


def _last(model: Model) -> Site:
    """The direct path ends in the stream that the final norm reads."""
    return model.resolve("resid_post.-1")


@dataclass(frozen=True, eq=False)
class _Paths:
    """The two runs.

    Attributes:
        ends: the site of each receiver.
    """

    model: Model
    pairs: Pairs
    metric: Metric
    freeze_mlps: bool
    ends: Mapping[str, Site]

    def leads(self, sender: Site, receiver: str) -> bool:
        """Whether the receiver is computed from what the sender writes, and the metric from the receiver."""
        end = self.ends[receiver]
        return sender != end and self.model.site_map.reaches(sender, end) and self._metric_from(end)

    def _metric_from(self, end: Site) -> bool:
        return self.model.site_map.reaches(end, self.metric.site)

    @torch.no_grad()
    def first(
        self, reached: Mapping[Site, Sequence[str]], sources: tuple[TokenBatch, TokenBatch]
    ) -> dict[str, dict[str, Float[Tensor, "sources pairs pos width"]]]:
        """By sender and receiver, the receiver as the first run computes it, for each source of the sender's output."""
        by_site: dict[Site, list[Site]] = {}
        for sender in reached:
            by_site.setdefault(replace(sender, head=None), []).append(sender)
        states = [self.model.capture(source, list(by_site)) for source in sources]
        noted: dict[str, dict[str, Tensor]] = {}
        for site, senders in track(by_site.items(), description="senders", unit="sites"):
            ends = list(dict.fromkeys(self.ends[name] for sender in senders for name in reached[sender]))
            to = list({replace(end, head=None): None for end in ends})
            segment = self.model.segment(self.pairs.clean, site, to, hold=self._frozen(site, to))
            patched = torch.stack([acts.flat(site).to(segment.x) for acts in states])
            for sender in senders:
                found = self._run(sender, segment, patched, ends)
                noted[str(sender)] = {name: found[self.ends[name]] for name in reached[sender]}
        return noted

    def _run(
        self, sender: Site, segment: Segment, patched: Tensor, ends: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "sources pairs pos width"]]:
        """The first run of one sender, the sources below each other."""
        sites, n_sources = self.model.site_map, len(patched)
        columns = slice(None) if sender.head is None else _columns(sender, sites[sender])
        x = segment.x.expand_as(patched).clone()
        x[..., columns] = torch.where(self.pairs.changed()[..., None], patched[..., columns], x[..., columns])
        found: dict[Site, Tensor] = {}
        # these come before the hooks of the segment, so a receiver is noted before it is held
        with attached([(sites[replace(end, head=None)], _note(found, end)) for end in ends]):
            segment.run(x.flatten(0, 1), rows=n_sources)
        return {end: x.unflatten(0, (n_sources, -1)) for end, x in found.items()}

    def _frozen(self, sender: Site, ends: Sequence[Site]) -> list[Site]:
        kinds, last = ("z", "mlp_out") if self.freeze_mlps else ("z",), max(end.order for end in ends)
        sites = [site for site in self.model.site_map.points if site.kind in kinds]
        return [site for site in sites if sender.precedes(site) and site.order < last]

    def second(
        self, noted: Mapping[str, Mapping[str, Tensor]], receivers: Sequence[str]
    ) -> dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]]:
        """Effect, linear estimate and control of each path; the runs of a receiver's site share one segment."""
        found: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}
        used = list({replace(self.ends[name], head=None): None for values in noted.values() for name in values})
        segments = segments_at(self.model, self.pairs.clean, used, self.metric.site)
        for name in track(receivers, description="receivers", unit="receivers"):
            senders = [sender for sender, values in noted.items() if name in values]
            if not senders:
                continue
            end = self.ends[name]
            segment = segments[replace(end, head=None)]
            columns = slice(None) if end.head is None else _columns(end, self.model.site_map[end])
            everyone = torch.arange(len(self.pairs), device=segment.x.device)
            leaf = segment.x.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                before = value(self.metric, segment.run(leaf, rows=everyone), everyone)
                (slope,) = torch.autograd.grad(before.sum(), leaf)
            with torch.no_grad():
                for sender in senders:
                    changed = noted[sender][name].to(segment.x)
                    x = segment.x.repeat(2, 1, 1)
                    x[..., columns] = changed.flatten(0, 1)
                    rows = everyone.repeat(2)
                    after = value(self.metric, segment.run(x, rows=rows), rows).unflatten(0, (2, -1))
                    effect, control = after - before.detach()
                    linear = (slope[..., columns] * (changed[0] - segment.x[..., columns])).sum((1, 2))
                    found[sender, name] = effect, linear.to(effect), control
        return found


def _columns(site: Site, point: Point) -> slice:
    """The columns of one head among the heads side by side."""
    width, head = point.width or 0, site.head or 0
    return slice(head * width, (head + 1) * width)


def _note(found: dict[Site, Tensor], end: Site) -> Fn:
    def fn(x: Tensor) -> None:
        found[end] = (x.flatten(2) if end.head is None else x[..., end.head, :]).clone()

    return fn
