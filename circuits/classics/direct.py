"""Direct logit attribution: what each component adds to the logits of both answers, beside what ablating it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.classics.shared import comparable, estimate, segments_at, whole_difference
from circuits.classics.tables import AttributionTable
from circuits.doctor.report import attrs_of, marked
from circuits.pairs import Pairs
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.numbers import counted, number
from workbench.core.precision import precise
from workbench.core.progress import track
from workbench.core.stats import Estimate
from workbench.hooks.ends import unembedding
from workbench.hooks.sites import Site
from workbench.interventions.scopes import Last
from workbench.models.frozennorm import FrozenAt, FrozenNorm
from workbench.models.model import Model
from workbench.models.segment import Segment
from workbench.report.base import Bars, Grid, Headline, Heat, Says, Section, Table, beside
from workbench.saes.basis import basis

if TYPE_CHECKING:
    import pandas as pd

By = Literal["head", "layer", "component"]
_OFF = 1e-3
_SHOWN = 30


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """What one component adds to the logits at each pair's last token.

    Attributes:
        component: "embed", "attn_out", "mlp_out", "head", "layer" or a bias.
        logit_a: of the clean answer.
        logit_b: of the patch answer.
        ablation: fall of the logit difference when the component writes nothing at the last token; nan if not ablated.
    """

    component: str
    layer: int | None
    head: int | None
    logit_a: Float[Tensor, " pairs"]
    logit_b: Float[Tensor, " pairs"]
    ablation: Float[Tensor, " pairs"]

    @property
    def diff(self) -> Float[Tensor, " pairs"]:
        """Above 0 it supports the clean answer."""
        return self.logit_a - self.logit_b

    @property
    def name(self) -> str:
        """Such as "attn_out.3" or "head.3.h1"."""
        layer = "" if self.layer is None else f".{self.layer}"
        return f"{self.component}{layer}" + ("" if self.head is None else f".h{self.head}")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DirectAttribution(AttributionTable):
    """Direct effects on the logit difference `clean answer - patch answer`, on clean prompts, at the last token.

    Attributes:
        parts: in the order of a forward pass; they add up to `logits`.
        logits: of both answers, before a soft cap or scale, as the model has them; `(pairs, 2)`.
        by: what a part is.
        pos: position of the last token; None where the prompts differ in length.
    """

    parts: tuple[Part, ...]
    logits: Float[Tensor, "pairs 2"]
    by: By
    pos: int | None

    def frame(self) -> pd.DataFrame:
        """One row per component: its logits, their difference with a 95 % interval, its share, and the ablation."""
        import pandas as pd

        whole = whole_difference(self.logits[:, 0] - self.logits[:, 1])
        rows = []
        for part in self.parts:
            diff, ablation = _estimate(part.diff), estimate(part.ablation)
            rows.append(
                {
                    "component": part.component, "layer": part.layer, "head": part.head, "pos": self.pos,
                    "logit_a": float(part.logit_a.mean()), "logit_b": float(part.logit_b.mean()), "diff": diff.value,
                    "ci_low": diff.low, "ci_high": diff.high,
                    "share": float("nan") if whole is None else diff.value / whole,
                    "ablation_effect": float("nan") if ablation is None else ablation.value,
                    "ablation_ci_low": float("nan") if ablation is None else ablation.low,
                    "ablation_ci_high": float("nan") if ablation is None else ablation.high, "n": diff.n,
                }
            )  # fmt: skip
        frame = pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64", "pos": "Int64"})
        frame.attrs.update(attrs_of(self.doctor))
        return frame

    def headline(self) -> Headline:
        """What ablating the component with the largest direct effect takes away, beside the other components."""
        says = Says(
            "Ablating the component with the largest direct effect costs more than ablating another.",
            "Ablating the component with the largest direct effect costs no more than ablating another.",
            "Ablating the component with the largest direct effect costs less than ablating another.",
            "No component was ablated.",
        )
        return Headline.of(says, self._beside())

    def _ablated(self) -> list[Part]:
        return [part for part in self.parts if not bool(part.ablation.isnan().any())]

    def _largest(self) -> Part:
        return max(self._ablated() or self.parts, key=lambda part: abs(float(part.diff.mean())))

    def _beside(self) -> Table:
        part, measure = self._largest(), "change of the logit difference by ablation"
        others = [p.ablation.abs() for p in self._ablated() if p is not part]
        if not others:
            return beside(measure, (part.name, estimate(part.ablation)), None)
        real = part.ablation if float(part.diff.mean()) >= 0 else -part.ablation
        rest = torch.stack(others).mean(0)
        control = ("mean size over the other components", _estimate(rest))
        return beside(measure, (part.name, _estimate(real)), control, _estimate(real - rest))

    def findings(self) -> tuple[str, ...]:
        """The sum, the largest component, and how well direct effects predict ablations."""
        whole, part = _estimate(self.logits[:, 0] - self.logits[:, 1]), self._largest()
        total = sum(float(p.diff.mean()) for p in self.parts)
        found = [
            f"The logit difference before a soft cap is {whole}; {counted(len(self.parts), 'components')} add up to "
            f"{number(total)}.",
            f"The largest direct effect is that of {part.name}: {_estimate(part.diff)}.",
        ]
        if whole_difference(self.logits[:, 0] - self.logits[:, 1]) is None:
            found.append("It is within noise, so no shares of it are given. Use more pairs, or others.")
        both = [(float(p.diff.mean()), float(p.ablation.mean())) for p in self._ablated()]
        if len(both) > 2:
            r = float(torch.corrcoef(torch.tensor(both).T)[0, 1])
            found.append(
                f"Over {len(both)} components direct and ablation effects correlate by {number(r)}: what later layers "
                "do with a component is in its ablation alone."
            )
        return (*found, f"Attribution doctor: {self.verdict}.")

    def section(self) -> Section:
        """A picture of the components, and the table."""
        parts = sorted(self.parts, key=lambda part: -abs(float(part.diff.mean())))
        rows = tuple(
            (p.name, float(p.logit_a.mean()), float(p.logit_b.mean()), _estimate(p.diff), estimate(p.ablation))
            for p in parts
        )
        table = Table(
            ("component", "logit of the clean answer", "of the patch answer", "difference", "ablation effect"), rows,
            "Components. Direct effect on the logits through the final norm with its scale held fast; ablation effect: "
            "fall of the logit difference when the component writes nothing at the last token.",
        )  # fmt: skip
        whole = _estimate(self.logits[:, 0] - self.logits[:, 1])
        blocks = (self._picture(), self._beside(), table)
        return Section("Direct logit attribution", blocks, self.findings(), {"difference": whole}, self.headline())

    def _picture(self) -> Heat | Bars:
        if self.by != "head":
            parts = (
                self.parts
                if len(self.parts) <= _SHOWN
                else tuple(sorted(self.parts, key=lambda part: -abs(float(part.diff.mean())))[:_SHOWN])
            )
            values = tuple(_estimate(part.diff) for part in parts)
            title = marked("Direct effects", self.doctor)
            return Bars(title, tuple(p.name for p in parts), values, "logit difference", 0.0)
        grids = []
        for what, value in (("direct", lambda p: p.diff), ("ablation", lambda p: p.ablation)):
            found = {(p.layer, p.head): float(value(p).mean()) for p in self.parts if p.head is not None}
            layers, heads = (sorted({key[i] or 0 for key in found}) for i in (0, 1))
            cells = tuple(tuple(found[layer, head] for head in heads) for layer in reversed(layers))
            grids.append(Grid(what, tuple(map(str, reversed(layers))), tuple(f"h{head}" for head in heads), cells))
        title = marked("Heads: logit difference", self.doctor)
        return Heat(title, tuple(grids), "Layers by heads; the last layer is on top.")


def _estimate(values: Tensor) -> Estimate:
    found = estimate(values)
    assert found is not None
    return found


@checked
@torch.no_grad()
def direct_logit_attribution(
    model: Model, pairs: Pairs, by: By = "component", *, ablate: bool = True, rows: int = 256
) -> DirectAttribution:
    """What each component writes directly to the logit difference, on the clean prompts, at the last token.

    `logit_t = sum over components c of scale * gain * centred(c) . W_U[:, t] + bias`: the final norm with the scale
    that it has at this token, exact by construction. A norm behind attention or MLP is part of what they write; with
    `by="head"` its scale at the token is held fast too. Beside each: the fall of the logit difference when the
    component writes nothing at the last token and all later layers run.

    Args:
        model: the model.
        pairs: prompts with both answers; any lengths.
        by: "component" for attn_out and mlp_out of each layer, "layer" for both together, "head" for the heads and
            mlp_out.
        ablate: whether to ablate each.
        rows: prompts in one forward pass.

    Raises:
        InvalidInputError: for pairs without a patch answer.
        MismatchError: if the stream is not the sum of its components in this model, or its final norm is neither an
            RMS norm nor a layer norm.

    Source: Elhage et al. 2021, "A mathematical framework for transformer circuits"; nostalgebraist 2020.
    """
    if by not in ("head", "layer", "component"):
        raise InvalidInputError(f"direct_logit_attribution(by={by!r}): give 'head', 'layer' or 'component'.")
    pairs, _ = comparable("direct_logit_attribution", model, pairs, align="end")
    reader = _Reader.of(model, pairs)
    jobs = list(reader.parts(by))
    ablations = _ablations(model, pairs, [site for *_, site in jobs], rows) if ablate else {}
    nothing = torch.full_like(reader.logits[:, 0], torch.nan)
    parts = []
    for component, layer, head, written, site in jobs:
        logits = written if written.shape[-1] == 2 else reader.read(written)
        parts.append(
            Part(component=component, layer=layer, head=head, logit_a=logits[:, 0], logit_b=logits[:, 1],
                 ablation=nothing if site is None else ablations.get(site, nothing))
        )  # fmt: skip
    _require_sum(model, parts, reader.logits)
    return DirectAttribution(
        parts=tuple(parts), logits=reader.logits, by=by, pos=None if pairs.length is None else pairs.length - 1
    )


_Job = tuple[str, int | None, int | None, Tensor, Site | None]
"""Component, layer, head, what it writes (or its two logits), and the site at which it is ablated."""


@dataclass(frozen=True, eq=False)
class _Reader:
    """The last tokens of the clean prompts: what was written there, and how the end of the model reads it."""

    model: Model
    acts: dict[Site, Tensor]
    norm: FrozenAt
    answers: Float[Tensor, "pairs 2 d_model"]
    bias: Float[Tensor, "pairs 2"]
    logits: Float[Tensor, "pairs 2"]

    @classmethod
    def of(cls, model: Model, pairs: Pairs) -> _Reader:
        kinds = ["resid_pre.0", "attn_out", "mlp_out", "z", f"resid_post.{model.n_layers - 1}"]
        captured = model.capture(pairs.clean, kinds, positions=Last())
        acts = {Site.parse(site): precise(captured[site]) for site in captured}
        last = acts[Site("resid_post", model.n_layers - 1)]
        norm = FrozenNorm.of(model.site_map["final_norm"].module, last)
        head, ids = unembedding(model.hf), pairs.answers.to(unembedding(model.hf).weight.device)
        rows = head.weight.detach()[ids].to(last)
        bias = torch.zeros(ids.shape) if head.bias is None else head.bias.detach()[ids]
        normed = norm.at(last)
        logits = torch.einsum("nd,nkd->nk", normed.sum_of(last), rows) + bias.to(last)
        extra = torch.einsum("d,nkd->nk", norm.bias, rows) + bias.to(last)
        return cls(model, acts, normed, rows, extra, logits)

    def read(self, written: Float[Tensor, "pairs d_model"]) -> Float[Tensor, "pairs 2"]:
        """What a part of the last tokens' stream adds to the logits of both answers."""
        return torch.einsum("nd,nkd->nk", self.norm.part(written), self.answers)

    def parts(self, by: By) -> Iterator[_Job]:
        """The components, in the order of a forward pass."""
        yield "embed", None, None, self.acts[Site("resid_pre", 0)], None
        for layer in range(self.model.n_layers):
            attn, mlp = Site("attn_out", layer), Site("mlp_out", layer)
            if by == "layer":
                yield "layer", layer, None, self.acts[attn] + self.acts[mlp], Site("resid_post", layer)
                continue
            if by == "head":
                yield from self._heads(layer)
            else:
                yield "attn_out", layer, None, self.acts[attn], attn
            yield "mlp_out", layer, None, self.acts[mlp], mlp
        yield "final bias", None, None, self.bias, None

    def _heads(self, layer: int) -> Iterator[_Job]:
        z = Site("z", layer)
        heads = basis("heads", self.model, z)
        x = self.acts[z]
        for head in range(heads.d_sae):
            yield "head", layer, head, heads.contribution(x, [head]).to(x), Site("z", layer, head)
        yield "attention bias", layer, None, heads.constant(x).to(x), None


def _ablations(model: Model, pairs: Pairs, sites: Sequence[Site | None], size: int) -> dict[Site, Tensor]:
    """Fall of the logit difference when each site writes nothing at the last token, all later layers running."""
    wanted = [site for site in sites if site is not None]
    wholes = list(dict.fromkeys(Site(site.kind, site.layer) for site in wanted))
    pre = model.capture(pairs.clean, ["resid_pre"], positions=Last())
    segments = segments_at(model, pairs.clean, wholes, "logits", last=True)
    found: dict[Site, Tensor] = {}
    for whole in track(wholes, description="ablating", unit="sites"):
        segment, here = (
            segments[whole],
            [site for site in wanted if (site.kind, site.layer) == (whole.kind, whole.layer)],
        )
        states = []
        for site in here:
            x = segment.x.clone()
            if site.head is not None:
                width = model.site_map[site].width or 0
                x[..., site.head * width : (site.head + 1) * width] = 0
            elif site.kind == "resid_post":
                x[:, -1] = pre[f"resid_pre.{site.layer}"].to(x)
            else:
                x[:, -1] = 0
            states.append(x)
        found |= dict(zip(here, _differences(segment, states, pairs, size), strict=True))
    return found


def _differences(segment: Segment, states: Sequence[Tensor], pairs: Pairs, size: int) -> list[Tensor]:
    """Clean minus changed logit difference of each state of the last tokens."""
    n = len(pairs)
    rows = torch.arange(n, device=segment.x.device)

    def difference(x: Tensor, index: Tensor) -> Tensor:
        logits = segment.run(x, rows=index).logits(pairs.answers[index])
        return logits[:, 0] - logits[:, 1]

    step = max(1, size // n)
    groups = [[segment.x, *states][i : i + step] for i in range(0, len(states) + 1, step)]
    values = torch.cat([difference(torch.cat(group), rows.repeat(len(group))) for group in groups]).unflatten(
        0, (-1, n)
    )
    return list(values[0] - values[1:])


def _require_sum(model: Model, parts: Sequence[Part], logits: Float[Tensor, "pairs 2"]) -> None:
    sums = torch.stack([torch.stack([p.logit_a, p.logit_b], 1) for p in parts]).sum(0)
    size = torch.stack([p.logit_a.abs() for p in parts]).amax()
    off = float((sums - logits).abs().max() / size.clamp_min(1e-6))
    tolerance = _OFF if model.dtype in (torch.float32, torch.float64) else 30 * _OFF
    if not off <= tolerance:
        raise MismatchError(
            f"direct_logit_attribution: in {model.name} the components add up to the logits only up to {number(off)} "
            "(relative), so its stream is not their plain sum. Use patch_grid, which assumes nothing."
        )
