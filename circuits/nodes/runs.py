"""The metric as a function of the activations at a site, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.decomposition import Place
from circuits.metrics import Metric, value
from circuits.nodes.effects import Aggregation
from circuits.nodes.setting import BASELINES, Baseline, Setting
from workbench.bases.base import CHUNK_ENTRIES, Basis
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.numbers import counted
from workbench.core.precision import precise
from workbench.core.tokens import TokenBatch
from workbench.hooks.capture import Activations
from workbench.models.model import Model
from workbench.models.segment import Segment
from workbench.models.stretches import stretches

Method = Literal["ig", "atp", "exact"]
Rule = Literal["midpoint", "left", "right", "trapezoid", "gauss"]
_METHODS, _RULES = ("ig", "atp", "exact"), ("midpoint", "left", "right", "trapezoid", "gauss")
_SITES_AT_ONCE = 16
_SPARSE = 0.25
"""Share of active entries below which rows are gathered instead of multiplied with all."""


@checked
@dataclass(frozen=True, kw_only=True)
class AttributionOptions(OneLine):
    """How effects are estimated.

    Attributes:
        method: "ig" integrates the gradient from the clean to the patched state; "atp" takes it at the clean state
            alone; "exact" patches every node by itself, one run each.
        steps: points of the integral.
        rule: where the points are. "midpoint" is the most exact at equal cost; "left" has the clean state and not the
            patched one (the published code), "right" the other way round (the published formula).
        baseline: what a patched site is. "patch": what it is in the counterpart; "zero": all features and the error
            zero, so the site holds the constant of the basis; "zero_keep_error": features zero, error kept; "mean":
            what it is on average over all tokens. "zero" passes near the origin, where RMS norms make gradients
            explode: see the gap.
        aggregation: how the positions of a node are put together: "sum", "max" by absolute value, "last", or "none",
            which keeps them apart.
        measured: whether the effect of patching the whole site is measured, which the gap needs.
        batch_size: rows per forward pass.
    """

    method: Method = "ig"
    steps: int = 10
    rule: Rule = "midpoint"
    baseline: Baseline = "zero_keep_error"
    aggregation: Aggregation = "sum"
    measured: bool = True
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name, known in (
            ("method", _METHODS), ("rule", _RULES), ("baseline", BASELINES),
            ("aggregation", ("sum", "none", "max", "last")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise InvalidInputError(f"{name}={getattr(self, name)!r}: it is one of {', '.join(known)}.")
        if self.steps < 1 or self.batch_size < 1:
            raise InvalidInputError(f"steps={self.steps}, batch_size={self.batch_size}: both at least 1.")

    def points(self) -> tuple[list[float], list[float]]:
        """Shares of the way from clean to patched, and their weights, which add up to 1."""
        n = self.steps
        if self.method == "atp":
            return [0.0], [1.0]
        if self.rule == "gauss":
            x, w = np.polynomial.legendre.leggauss(n)
            return ((x + 1) / 2).tolist(), (w / 2).tolist()
        if self.rule == "trapezoid":
            return [k / n for k in range(n + 1)], [(0.5 if k in (0, n) else 1.0) / n for k in range(n + 1)]
        shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[self.rule]
        return [(k + shift) / n for k in range(n)], [1.0 / n] * n

    @property
    def words(self) -> str:
        """The method in words."""
        if self.method == "ig":
            return f"integrated gradients, {self.rule} rule, {counted(self.steps, 'steps')}; baseline {self.baseline}"
        return f"{'attribution' if self.method == 'atp' else 'exact'} patching; baseline {self.baseline}"


def clean_slopes(setting: Setting, rows: Int[Tensor, " rows"]) -> dict[str, Float[Tensor, "tokens d"]]:
    """Gradient of the metric at the clean state of every site, at the kept tokens, from one pass."""
    return clean_pass(setting, rows)[1]


def clean_pass(
    setting: Setting, rows: Int[Tensor, " rows"], more: Sequence[str] = ()
) -> tuple[Activations, dict[str, Float[Tensor, "tokens d"]]]:
    """One pass: activations at every site and at `more`, and the metric's gradient at every site, at kept tokens."""
    model, metric = setting.model, setting.metric
    reads = "final_norm" if metric.site == "logits" else metric.site
    sites = [place.site for place in setting.places]
    batch = setting.batch(rows)
    acts = model.capture(batch, list(dict.fromkeys([*sites, *more, reads])), grad=True)
    with torch.enable_grad():
        found = metric_of(model, metric, acts.flat(reads) if reads != "logits" else acts[reads], batch, rows)
    leaves = [acts[site] for site in sites]
    grads = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
    slopes = {}
    for site, grad in zip(sites, grads, strict=True):
        if grad is None:
            raise MismatchError(_no_gradient(metric, site))
        flat = model.site_map[site].flat(grad)
        slopes[site] = precise(flat.to(setting.keep.device)[setting.keep[rows]])
    return acts, slopes


def metric_of(
    model: Model, metric: Metric, x: Float[Tensor, "rows pos d"], batch: TokenBatch, rows: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """The metric from the activations that it reads; of logits, from the unembedding's input."""
    if metric.site != "logits":
        return metric(precise(x), rows.to(x.device))
    hidden = x[torch.arange(len(x), device=x.device), last_columns(batch).to(x.device)]
    tokens: Tensor | None = getattr(metric, "tokens", None)
    logits = model.head.all(hidden) if tokens is None else model.head.some(hidden, tokens[rows.to(tokens.device)])
    return metric(logits, rows.to(logits.device))


def last_columns(batch: TokenBatch) -> Int[Tensor, " rows"]:
    """Column of the last token of each row."""
    return batch.mask.shape[1] - 1 - batch.mask.flip(1).long().argmax(1)


def _no_gradient(metric: Metric, site: str) -> str:
    return (
        f"The metric at {metric.site} does not depend on {site}. Read at a site that the model computes from it, "
        "without detaching."
    )


class Run:
    """The metric as a function of the kept tokens at a site, everything else as in the clean run; many at once.

    Attributes:
        clean: activations of the kept tokens, in row order.
    """

    def __init__(
        self, setting: Setting, segment: Segment, site: str, rows: Int[Tensor, " rows"], options: AttributionOptions
    ) -> None:
        self._metric, self._segment, self._rows, self._site = setting.metric, segment, rows, site
        self._keep = setting.keep[rows][:, -segment.x.shape[1] :]  # of the last tokens, where those run alone
        self._points, self._at_once = options.points(), max(1, options.batch_size // len(rows))
        self.clean: Float[Tensor, "tokens d"] = precise(self._segment.x[self._keep])

    def values(self, xs: Sequence[Float[Tensor, "tokens d"]]) -> Float[Tensor, "n rows"]:
        """The metric of each row under each state of the kept tokens, without gradient."""
        with torch.no_grad():
            parts = [self._values(xs[i : i + self._at_once]) for i in range(0, len(xs), self._at_once)]
        return torch.cat(parts)

    def _values(self, xs: Sequence[Tensor]) -> Tensor:
        n = len(xs)
        reached = self._segment.run(torch.cat(list(xs)), rows=n, keep=self._keep.repeat(n, 1))
        return value(self._metric, reached, self._rows.repeat(n)).unflatten(0, (n, -1))

    def alone(self, row: int, xs: Float[Tensor, "n tokens d"]) -> Float[Tensor, " n"]:
        """The metric of one row under each state of its kept tokens, without gradient."""
        found = []
        with torch.no_grad():
            for some in xs.split(self._at_once * len(self._rows)):
                index = self._rows.new_full((len(some),), row)
                keep = self._keep[index.to(self._keep.device)]
                reached = self._segment.run(some.flatten(0, 1), rows=index, keep=keep)
                found.append(value(self._metric, reached, self._rows[index]))
        return torch.cat(found) if found else xs.new_zeros(0)

    def slope(self, change: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
        """Weighted mean of the gradient on the way to `clean + change`; rows are independent, so their sum will do."""
        total = torch.zeros_like(self.clean)
        shares, weights = self._points
        for some in torch.arange(len(shares)).split(self._at_once):
            leaf = torch.stack([self.clean + shares[k] * change for k in some.tolist()]).detach().requires_grad_(True)
            with torch.enable_grad():
                found = self._values(leaf.unbind()).sum()
            slope = torch.autograd.grad(found, leaf, allow_unused=True)[0] if found.requires_grad else None
            if slope is None:
                raise MismatchError(_no_gradient(self._metric, self._site))
            part = torch.tensor([weights[k] for k in some.tolist()], dtype=slope.dtype, device=slope.device)
            total += torch.einsum("ktd,k->td", precise(slope), part)
        return total


def runs_of(
    setting: Setting, places: Sequence[Place], rows: Int[Tensor, " rows"], options: AttributionOptions
) -> Iterator[tuple[Place, Run]]:
    """A run per place, so many of one recorded run at a time. Tokens before the first that is patched do not run."""
    # Rows are taken by hand, so that the padding and with it `keep` stay as they are.
    batch, to = setting.batch(rows), setting.metric.site
    first = int(setting.keep[rows].any(0).long().argmax())
    tail = batch.ids.shape[1] - first if first and to == "logits" and bool(batch.mask[:, -1].all()) else False
    for i in range(0, len(places), _SITES_AT_ONCE):
        some = places[i : i + _SITES_AT_ONCE]
        segments = stretches(setting.model, batch, [(place.site, (to,), ()) for place in some], last=tail)
        for place, segment in zip(some, segments, strict=True):
            yield place, Run(setting, segment, place.site, rows, options)


def dots(
    basis: Basis, slope: Float[Tensor, "tokens d"], token: Int[Tensor, " m"], feature: Int[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """`slope[token] . row of feature` for some entries; only the rows that are needed are read where they are few."""
    if len(token) > _SPARSE * len(slope) * basis.d_sae:
        return (slope @ basis.rows().to(slope).T)[token, feature]
    size = max(1, CHUNK_ENTRIES // slope.shape[1])
    parts = [
        (slope[t] * basis.rows(f).to(slope)).sum(1) for t, f in zip(token.split(size), feature.split(size), strict=True)
    ]
    return torch.cat(parts) if parts else slope.new_zeros(0)
