"""Effects of nodes: one number per example and node, kept sparse, and what is said of them over examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.doctor.report import DoctorReport, Examinable, attrs_of
from circuits.graph.circuit import ARRAYS, ERROR, Circuit, ErrorRule, Sign, SiteNodes
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, require_known
from workbench.core.html import Shown
from workbench.core.numbers import counted, number, setting

if TYPE_CHECKING:
    import pandas as pd

Aggregation = Literal["sum", "none", "max", "last"]
GAP_WARNING = 0.1
"""Gap above which an attribution is called incomplete."""


@dataclass(frozen=True, eq=False, kw_only=True)
class NodeTable(OneLine):
    """Nodes of one site, what each does on average.

    Attributes:
        pos: column of the batch; -1 where positions were put together.
        feature: number of the feature; `ERROR` for the error node.
        effect: mean over examples.
        se: standard error of the mean; NaN for a single example.
        n: number of examples.
        consistency: of the examples in which the node has an effect, the share with the sign of the mean.
    """

    pos: Int[Tensor, " nodes"]
    feature: Int[Tensor, " nodes"]
    effect: Float[Tensor, " nodes"]
    se: Float[Tensor, " nodes"]
    n: Int[Tensor, " nodes"]
    consistency: Float[Tensor, " nodes"]


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class SiteEffects(Shown):
    """Effects of the nodes of one site, `metric(patched) - metric(clean)`, per example.

    Nodes that are inactive in both runs have no effect and are not listed.

    Attributes:
        site: the site.
        d_sae: number of features.
        n: number of examples.
        example: of each entry.
        pos: column of the batch; -1 where positions were put together.
        feature: number of the feature; `ERROR` for the error node.
        value: effect of this node in this example.
        added: per example the sum over all nodes, whatever the aggregation.
        total: per example the measured effect of patching the whole site; NaN where it was not measured.
        method: how the effects were made, in words.
    """

    site: str
    d_sae: int
    n: int
    example: Int[Tensor, " entries"]
    pos: Int[Tensor, " entries"]
    feature: Int[Tensor, " entries"]
    value: Float[Tensor, " entries"]
    added: Float[Tensor, " n"]
    total: Float[Tensor, " n"]
    method: str

    def nodes(self) -> NodeTable:
        """The nodes with their means over examples."""
        key, which = torch.unique(_key(self.pos, self.feature, self.d_sae), return_inverse=True)
        sums = [
            self.value.new_zeros(len(key), dtype=torch.float64).index_add_(0, which, v.double())
            for v in (self.value, self.value**2, self.value > 0, self.value < 0)
        ]
        mean, n = sums[0] / self.n, self.n
        var = (sums[1] - n * mean**2).clamp_min(0) / (n - 1) if n > 1 else torch.full_like(mean, float("nan"))
        agreeing = torch.where(mean >= 0, sums[2], sums[3]) / (sums[2] + sums[3]).clamp_min(1)
        pos, feature = _unkey(key, self.d_sae)
        dtype = self.value.dtype
        return NodeTable(
            pos=pos, feature=feature, effect=mean.to(dtype), se=(var / n).sqrt().to(dtype),
            n=torch.full_like(feature, n), consistency=agreeing.to(dtype),
        )  # fmt: skip

    def _dense(self, power: int) -> Float[Tensor, " d_sae"]:
        """Sum over examples of a power of each feature's effect, which positions add up to."""
        real = self.feature != ERROR
        key, which = torch.unique(self.example[real] * self.d_sae + self.feature[real], return_inverse=True)
        per_example = self.value.new_zeros(len(key)).index_add_(0, which, self.value[real])
        return self.value.new_zeros(self.d_sae).index_add_(0, key % self.d_sae, per_example**power)

    @property
    def effect(self) -> Float[Tensor, " d_sae"]:
        """Of every feature, summed over positions, mean over examples; zero for those that have none."""
        return self._dense(1) / self.n

    @property
    def se(self) -> Float[Tensor, " d_sae"]:
        """Standard error of `effect`; NaN for a single example."""
        if self.n == 1:
            return torch.full_like(self.effect, float("nan"))
        return ((self._dense(2) / self.n - self.effect**2).clamp_min(0) / (self.n - 1)).sqrt()

    @property
    def error(self) -> float:
        """Effect of the error node, summed over positions, mean over examples."""
        return float(self.value[self.feature == ERROR].sum()) / self.n

    @property
    def gap(self) -> float:
        """`|sum of effects - measured effect| / |measured effect|`, of the means over examples; NaN if not measured."""
        total = float(self.total.mean())
        return abs(float(self.added.mean()) - total) / max(abs(total), 1e-30)

    @property
    def is_complete(self) -> bool:
        """Whether the effects add up to the measured one within 10 %."""
        return self.gap <= GAP_WARNING

    def frame(self) -> pd.DataFrame:
        """One row per node, the strongest first."""
        import pandas as pd

        table = self.nodes()
        columns = {name: getattr(table, name).detach().cpu().numpy() for name in ("effect", "se", "consistency")}
        positions = {"pos": table.pos.cpu().numpy()} if bool((table.pos >= 0).any()) else {}
        names = ["error" if f == ERROR else f for f in table.feature.tolist()]
        frame = pd.DataFrame({"site": self.site, **positions, "feature": pd.Series(names, dtype=object), **columns})
        frame.insert(len(frame.columns) - 1, "n", self.n)
        frame = frame.rename(columns={"consistency": "sign_consistency"})
        return frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class NodeEffects(Examinable, Shown, Mapping[str, SiteEffects]):
    """Effects of the nodes of several sites; `effects["resid_post.10"]` are those of one.

    Above zero, patching the node raises the metric, so with the metrics of `circuits.metrics` the node supports the
    clean answer.

    Attributes:
        sites: per site, in the order of a forward pass.
        metric: what the effects are on.
        baseline: what a patched node is.
        aggregation: "sum", "max" or "last" over positions, or "none".
        n_tokens: number of columns of the batch where positions are kept; None otherwise.
        model_fingerprint: of the model.
        bases: fingerprint of each basis, by site.
        note: what was left out, in words.
        doctor: what `circuits.attribution_doctor` found, where it was attached.
    """

    sites: Mapping[str, SiteEffects]
    metric: str
    baseline: str
    aggregation: Aggregation
    n_tokens: int | None
    model_fingerprint: str
    bases: Mapping[str, str]
    note: str = ""
    doctor: DoctorReport | None = None

    def __getitem__(self, site: str) -> SiteEffects:
        require_known("site with effects", site, self.sites)
        return self.sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def n(self) -> int:
        """Number of examples."""
        return next(iter(self.sites.values())).n

    @property
    def gaps(self) -> dict[str, float]:
        """Per site, how far the effects are from adding up to what patching the whole site does, as a share of it."""
        return {name: site.gap for name, site in self.sites.items()}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sites whose effects do not add up, in words."""
        return tuple(
            f"{name}: the effects add up to {number(float(site.added.mean()))}, patching the whole site gives "
            f"{number(float(site.total.mean()))}; use more steps, or another baseline"
            for name, site in self.sites.items()
            if site.gap > GAP_WARNING
        )

    def frame(self) -> pd.DataFrame:
        """One row per node, the strongest first: site, pos (where kept), feature, effect, se, n, sign_consistency.

        `pos` counts the columns of the batch; `feature` is "error" for what a basis leaves unexplained. `attrs` has the
        doctor's verdict.
        """
        import pandas as pd

        frame = pd.concat([site.frame() for site in self.sites.values()], ignore_index=True)
        frame = frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)
        frame.attrs.update(attrs_of(self.doctor))
        return frame

    def circuit(
        self, *, n: int | None = None, threshold: float | None = None, sign: Sign = "both", errors: ErrorRule = "ranked"
    ) -> Circuit:
        """The nodes that matter most.

        Args:
            n: how many; features and, with errors="ranked", error nodes.
            threshold: nodes whose mean effect is larger, in absolute value. 0 takes every feature of every site, those
                without any effect here too.
            sign: "positive" keeps nodes that support the clean answer, "negative" those that oppose it.
            errors: "ranked" lets error nodes compete with features; "all" keeps all of them, "none" none, and "resid"
                those of the residual stream, beside `n` features.

        Raises:
            InvalidInputError: unless one of `n` and `threshold` is given.
        """
        if (n is None) == (threshold is None):
            raise InvalidInputError("circuit(): give either n= or threshold=, one of them.")
        return selected(self, n=n, threshold=threshold, sign=sign, errors=errors)

    def merged(self, other: NodeEffects) -> NodeEffects:
        """These effects and those of further examples; the doctor's verdict is not that of both.

        Raises:
            MismatchError: if the two were not made in the same way.
        """
        for name in ("metric", "baseline", "aggregation", "n_tokens", "model_fingerprint", "bases"):
            if getattr(self, name) != getattr(other, name):
                raise MismatchError(
                    f"merged: {name} is {getattr(self, name)!r} here and {getattr(other, name)!r} there. Merge effects "
                    "that were made in the same way."
                )
        return dataclasses.replace(
            self, sites={name: _joined(site, other.sites[name]) for name, site in self.sites.items()},
            note=" ".join(filter(None, dict.fromkeys((self.note, other.note)))), doctor=None,
        )  # fmt: skip

    def _shown_line(self) -> str:
        made = f"{len(self.sites)} sites, {self.n} examples, {self.metric}, {self.baseline}"
        return f"{made}; attribution doctor: {self.verdict}"

    def _shown_note(self) -> str:
        return "; ".join((*self.warnings, f"attribution doctor: {self.verdict}"))


def selected(
    effects: NodeEffects, *, n: int | None, threshold: float | None, sign: Sign = "both", errors: ErrorRule = "ranked"
) -> Circuit:
    """The nodes of largest mean effect; the arguments are those of `NodeEffects.circuit`.

    Raises:
        InvalidInputError: for another sign or rule, or a negative number.
    """
    if sign not in ("both", "positive", "negative") or errors not in ("ranked", "all", "resid", "none"):
        raise InvalidInputError(
            f"circuit(sign={sign!r}, errors={errors!r}): signs are both, positive, negative; errors ranked, all, "
            "resid, none."
        )
    if (n is not None and n < 0) or (threshold is not None and not threshold >= 0):
        raise InvalidInputError(f"circuit(n={n}, threshold={threshold}): give a number that is not negative.")
    if threshold == 0 and sign == "both" and errors in ("ranked", "all"):
        sites = {
            name: dataclasses.replace(SiteNodes.of(site.d_sae), every=True) for name, site in effects.sites.items()
        }
        return _circuit(effects, sites, "everything")
    tables = {name: site.nodes() for name, site in effects.sites.items()}
    where = torch.cat([torch.full_like(t.feature, i) for i, t in enumerate(tables.values())])
    columns = {f: torch.cat([getattr(t, f) for t in tables.values()]) for f in ARRAYS}
    is_error = columns["feature"] == ERROR
    able = torch.ones_like(is_error) if errors == "ranked" else ~is_error
    if sign != "both":
        able &= (columns["effect"] > 0) if sign == "positive" else (columns["effect"] < 0)
    size = columns["effect"].abs()
    if threshold is not None:
        kept = able & (size > threshold)
    else:
        order = torch.where(able, size, -1.0).argsort(descending=True, stable=True)[: int(n or 0)]
        kept = torch.zeros_like(able).index_fill_(0, order, value=True) & able
    sites = {
        name: SiteNodes(
            d_sae=site.d_sae,
            pos=columns["pos"][kept & (where == i)].cpu(),
            feature=columns["feature"][kept & (where == i)].cpu(),
            effect=columns["effect"][kept & (where == i)].detach().cpu(),
            se=columns["se"][kept & (where == i)].detach().cpu(),
            n=columns["n"][kept & (where == i)].cpu(),
        )
        for i, (name, site) in enumerate(effects.sites.items())
    }
    if errors in ("all", "resid"):
        with_error = [name for name in sites if errors == "all" or name.startswith("resid")]
        sites |= {name: _with_errors(sites[name], tables[name], effects.n_tokens) for name in with_error}
    how = f"|effect| > {setting(threshold)}" if threshold is not None else f"the {n} nodes of largest effect"
    return _circuit(effects, sites, f"{how}; sign {sign}; errors {errors}")


def _with_errors(nodes: SiteNodes, table: NodeTable, n_tokens: int | None) -> SiteNodes:
    """The nodes and every error node of the site; an effect that was not computed is NaN."""
    is_error = table.feature == ERROR
    known = {name: getattr(table, name)[is_error].detach().cpu() for name in ARRAYS}
    every = [-1] if n_tokens is None else range(n_tokens)
    missing = sorted(set(every) - set(known["pos"].tolist()))
    rest = SiteNodes.of(nodes.d_sae, [ERROR] * len(missing), missing)
    columns = {name: torch.cat([getattr(nodes, name), known[name], getattr(rest, name)]) for name in ARRAYS}
    return dataclasses.replace(nodes, **columns)


def _circuit(effects: NodeEffects, sites: Mapping[str, SiteNodes], how: str) -> Circuit:
    made = f"{how}; {effects.metric}; {next(iter(effects.sites.values())).method}; {counted(effects.n, 'examples')}"
    return Circuit(
        sites=sites, bases=dict(effects.bases), model_fingerprint=effects.model_fingerprint,
        n_tokens=effects.n_tokens, made=made, doctor=effects.doctor,
    )  # fmt: skip


def _joined(a: SiteEffects, b: SiteEffects) -> SiteEffects:
    parts = {name: torch.cat([getattr(a, name), getattr(b, name)]) for name in ("pos", "feature", "value", "added")}
    return dataclasses.replace(
        a, n=a.n + b.n, example=torch.cat([a.example, b.example + a.n]), total=torch.cat([a.total, b.total]), **parts
    )


def _key(pos: Tensor, feature: Tensor, d_sae: int) -> Tensor:
    return (pos + 1) * (d_sae + 1) + feature + 1


def _unkey(key: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    return key // (d_sae + 1) - 1, key % (d_sae + 1) - 1


def aggregated(
    example: Tensor, pos: Tensor, feature: Tensor, value: Tensor, d_sae: int, how: Aggregation, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries with a position each, put together over positions: example, pos, feature, value.

    Args:
        example: of each entry.
        pos: of each entry.
        feature: of each entry.
        value: of each entry.
        d_sae: number of features.
        how: how.
        last: column of the last token of every example.

    Raises:
        InvalidInputError: for another aggregation.
    """
    if how == "none":
        return example, pos, feature, value
    if how == "last":
        at_end = pos == last.to(pos.device)[example]
        return example[at_end], torch.full_like(pos[at_end], -1), feature[at_end], value[at_end]
    key, which = torch.unique(example * (d_sae + 1) + feature + 1, return_inverse=True)
    if how == "sum":
        out = value.new_zeros(len(key)).index_add_(0, which, value)
    elif how == "max":
        order = value.abs().argsort(stable=True)  # the largest of each node is written last
        largest = which.new_zeros(len(key)).scatter_reduce_(
            0, which[order], torch.arange(len(order), device=which.device), "amax", include_self=False
        )
        out = value[order[largest]] if len(key) else value
    else:
        raise InvalidInputError(f"aggregation={how!r}: it is sum, none, max or last.")
    return key // (d_sae + 1), torch.full_like(key, -1), key % (d_sae + 1) - 1, out


def require_examples(n: int) -> None:
    """Refuses to make effects of nothing."""
    if n == 0:
        raise DegenerateInputError("There are no examples. Give at least one.")
