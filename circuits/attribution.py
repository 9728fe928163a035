"""How much each SAE feature supports a metric: exact where the metric is linear, integrated gradients elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.decomposition import bases as checked_bases
from circuits.decomposition import refuse_unreached
from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, ShapeError
from workbench.core.html import Shown
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model
from workbench.probes.linear import Probe, mean_pool

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["ig", "atp"]
Baseline = Literal["zero", "zero_keep_error", "mean"]
GAP_WARNING = 0.1


@runtime_checkable
class Metric(Protocol):
    """A number per row, computed from the activations at one site."""

    @property
    def site(self) -> str:
        """Where the metric reads."""
        ...

    def __call__(self, x: Float[Tensor, "batch pos d"], rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The metric of some rows, given their activations with the padding of the whole batch."""
        ...


@checked
@dataclass(frozen=True, eq=False)
class LossOfMargin(OneLine):
    """Minus the margin by which a probe gives each row its label; lower is better.

    As metric of `node_effects`, an effect `metric(patched) - metric(clean)` above zero therefore means that the
    feature supports the label.

    Attributes:
        probe: reads mean-pooled activations.
        labels: 0 or 1 per row.
        keep: the tokens that are pooled.
    """

    probe: Probe
    labels: Int[Tensor, " rows"]
    keep: Bool[Tensor, "rows pos"]

    @property
    def site(self) -> str:
        """The probe's site."""
        return self.probe.site

    def __call__(self, x: Float[Tensor, "batch pos d"], rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Minus the signed log-odds, one per row."""
        logit = self.probe.logit(mean_pool(x, _taken(self.keep, rows)))
        return -sign_of(_taken(self.labels, rows)).to(logit.device) * logit


@dataclass(frozen=True, eq=False, kw_only=True)
class NodeEffects(Shown):
    """Effects of the features of one site, `metric(patched) - metric(clean)`, summed over tokens, mean over rows.

    Attributes:
        site: the site.
        effect: one per feature.
        se: standard error over rows.
        error: effect of the SAE's error, patched together with the features.
        total: effect of patching the whole site at once: measured, or the sum itself where effects are exact.
        gap: `|sum of effects - total| / |total|`; how far the attribution is from complete.
        n_rows: rows that were averaged.
        method: how the effects were made, in words.
    """

    site: str
    effect: Float[Tensor, " d_sae"]
    se: Float[Tensor, " d_sae"]
    error: float
    total: float
    gap: float
    n_rows: int
    method: str

    def frame(self) -> pd.DataFrame:
        """One row per feature, the strongest first: effect and standard error."""
        import pandas as pd

        columns = {name: getattr(self, name).detach().float().cpu().numpy() for name in ("effect", "se")}
        frame = pd.DataFrame({"feature": range(len(self.effect)), **columns})
        return frame.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)

    @property
    def is_complete(self) -> bool:
        """Whether the effects add up to the measured total within 10 %."""
        return self.gap <= GAP_WARNING


@checked
@dataclass(frozen=True, kw_only=True)
class AttributionOptions(OneLine):
    """How effects are estimated.

    Attributes:
        method: "ig" integrates the gradient by the midpoint rule; "atp" takes it at the clean point only.
        steps: points of the integral.
        baseline: what a patched site is. "zero": all features and the error zero, so the site holds `b_dec`;
            "zero_keep_error": features zero, error kept; "mean": features and error at their mean over all tokens.
            An SAE that normalises its input keeps the scale and the mean of each token.
            "zero" passes near the origin, where RMS norms make gradients explode: see the gap.
        batch_size: rows per forward pass.
    """

    method: Method = "ig"
    steps: int = 10
    baseline: Baseline = "zero_keep_error"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.method not in ("ig", "atp") or self.baseline not in ("zero", "zero_keep_error", "mean"):
            raise InvalidInputError(
                f"AttributionOptions(method={self.method!r}, baseline={self.baseline!r}): methods are ig, atp; "
                "baselines zero, zero_keep_error, mean."
            )
        if self.steps < 1 or self.batch_size < 1:
            raise InvalidInputError(
                f"AttributionOptions(steps={self.steps}, batch_size={self.batch_size}): both at least 1."
            )


def sign_of(labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Labels 0 and 1 as -1 and +1."""
    return 2.0 * labels.float() - 1.0


def _taken(values: Tensor, rows: Tensor) -> Tensor:
    return values[rows.to(values.device)]


@checked
def linear_effects(
    contributions: Float[Tensor, "rows d_sae"], sae: AnySAE, probe: Probe, labels: Int[Tensor, " rows"]
) -> NodeEffects:
    """Exact effects of zeroing each feature (error kept) on a linear probe at the SAE's own site.

    Pooling and probe are linear, so the effect is `sign(label) * pooled contribution * (w . row of f)`: no gradient, no
    model run, no error of approximation, and effects of sets add up.

    Args:
        contributions: those of `Basis.coefficients` (activations, if the SAE does not normalise its input), mean over
            the tokens that the probe pools.
        sae: the SAE.
        probe: the probe; its site is the SAE's.
        labels: 0 or 1 per row.

    Raises:
        ShapeError: if the numbers of labels and rows differ.
    """
    if len(labels) != len(contributions):
        raise ShapeError(
            f"linear_effects: {len(labels)} labels for {len(contributions)} rows of contributions. Give one per row."
        )
    writes = as_basis(sae).rows().to(contributions) @ probe.w.to(contributions)
    per_row = sign_of(labels).to(contributions)[:, None] * contributions * writes
    total = per_row.sum(dim=1).mean()
    return NodeEffects(
        site=probe.site, effect=per_row.mean(0), se=_standard_error(per_row), error=0.0, total=float(total), gap=0.0,
        n_rows=len(per_row), method="exact (linear probe at the SAE's own site; zero, error kept)",
    )  # fmt: skip


@checked
def node_effects(
    model: Model,
    bases: Mapping[str, AnySAE],
    batch: TokenBatch,
    metric: Metric,
    *,
    keep: Bool[Tensor, "batch pos"],
    options: AttributionOptions | None = None,
) -> dict[str, NodeEffects]:
    """Effects of every SAE feature at every site on the metric, one site at a time.

    The SAE stays out of the gradient: its decoder is affine, so moving features and error in a straight line moves
    the activation in a straight line. One mean gradient `G` per token gives all effects, `G . W_dec[f] * change of f`,
    where f is measured in the units of the activation (`Basis.coefficients`).

    Args:
        model: the model.
        bases: an SAE per site.
        batch: the rows.
        metric: what is explained; reads at or above each site.
        keep: the tokens that are patched.
        options: method, steps and baseline.

    Raises:
        MismatchError: if the metric reads below a site or beside it, or an SAE was made for another model or site.
        ShapeError: if the mask or an SAE has another shape than the batch or the site.
        DegenerateInputError: if there is no SAE, or the mask keeps no token.

    Source: Marks et al. 2025 (arXiv 2403.19647), section 3 and appendix A; midpoint rule instead of its one-sided sum.
    """
    options = options or AttributionOptions()
    _require_kept("node_effects", keep, batch)
    checked = checked_bases(model, bases)
    refuse_unreached(model, checked, metric.site, "The metric")
    batch = batch.to(model.device)
    keep = keep.to(model.device)
    return {site: _site_effects(model, site, basis, batch, metric, keep, options) for site, basis in checked.items()}


@dataclass(frozen=True, eq=False)
class _Patch:
    """Clean and patched state of the kept tokens of some rows."""

    clean: Tensor
    change: Tensor
    feature_change: Tensor
    error_change: Tensor


def _require_kept(who: str, keep: Tensor, batch: TokenBatch) -> None:
    if keep.shape != batch.ids.shape:
        raise ShapeError(f"{who}: keep {tuple(keep.shape)} and ids {tuple(batch.ids.shape)} must be alike.")
    if not bool(keep.any()):
        raise DegenerateInputError(f"{who}: the mask keeps no token, so there is nothing to patch. Keep at least one.")


def _site_effects(
    model: Model, site: str, basis: Basis, batch: TokenBatch, metric: Metric, keep: Tensor, options: AttributionOptions
) -> NodeEffects:
    chunks = torch.arange(len(batch), device=keep.device).split(options.batch_size)
    mean = _mean_state(model, site, basis, batch, keep, chunks) if options.baseline == "mean" else None
    alphas = [0.0] if options.method == "atp" else [(k + 0.5) / options.steps for k in range(options.steps)]
    effects, errors, totals = [], [], []
    for rows in chunks:
        run = _Suffix(model, site, batch, metric, keep, rows)
        patch = _patch(run.clean, basis, mean, options.baseline)
        slope = torch.zeros_like(patch.clean)
        for some in torch.tensor(alphas).split(max(1, options.batch_size // len(rows))):
            slope += run.gradient([patch.clean + float(alpha) * patch.change for alpha in some]).sum(0) / len(alphas)
        before, after = run.values([patch.clean, patch.clean + patch.change])
        totals.append(after - before)
        per_token = (slope @ basis.rows().to(slope).T) * patch.feature_change
        row = keep[rows].nonzero(as_tuple=True)[0].to(per_token.device)
        effects.append(per_token.new_zeros(len(rows), per_token.shape[1]).index_add_(0, row, per_token))
        errors.append((slope * patch.error_change).sum(dim=1).sum() / len(batch))
    return _collect(site, torch.cat(effects), float(sum(errors)), float(torch.cat(totals).mean()), options)


def _collect(site: str, per_row: Tensor, error: float, total: float, options: AttributionOptions) -> NodeEffects:
    effect, n = per_row.mean(0), len(per_row)
    gap = abs(float(effect.sum()) + error - total) / max(abs(total), 1e-30)
    rule = (
        f"integrated gradients, midpoint rule, {options.steps} steps"
        if options.method == "ig"
        else "attribution patching"
    )
    return NodeEffects(
        site=site, effect=effect, se=_standard_error(per_row), error=error, total=total, gap=gap, n_rows=n,
        method=f"{rule}; baseline {options.baseline}",
    )  # fmt: skip


def _standard_error(per_row: Float[Tensor, "rows d_sae"]) -> Float[Tensor, " d_sae"]:
    """Of the mean over rows; NaN for a single row, which has no spread."""
    n = len(per_row)
    return per_row.std(0) / n**0.5 if n > 1 else torch.full_like(per_row.mean(0), float("nan"))


def _patch(clean: Tensor, basis: Basis, mean: tuple[Tensor, Tensor] | None, baseline: Baseline) -> _Patch:
    rows, parts = basis.rows().to(clean), basis.coefficients(clean)
    error = clean - parts @ rows - basis.constant(clean)
    if mean is not None:
        features, residue = mean[0] - parts, mean[1] - error
    else:
        features, residue = -parts, torch.zeros_like(error) if baseline == "zero_keep_error" else -error
    return _Patch(clean, features @ rows + residue, features, residue)


def _mean_state(
    model: Model, site: str, basis: Basis, batch: TokenBatch, keep: Tensor, chunks: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean contributions and mean error over all kept tokens."""
    n, parts_sum, rest_sum = int(keep.sum()), 0.0, 0.0
    for rows in chunks:
        x = model.capture(TokenBatch(batch.ids[rows], batch.mask[rows]), [site]).flat(site)[keep[rows]].float()
        parts_sum = parts_sum + basis.coefficients(x).sum(0)
        rest_sum = rest_sum + (x - basis.constant(x)).sum(0)
    parts = torch.as_tensor(parts_sum) / n
    return parts, torch.as_tensor(rest_sum) / n - parts @ basis.rows().to(parts)


class _Suffix:
    """The metric as a function of the kept tokens at a site, everything else as in the clean run; many at once.

    Attributes:
        clean: activations of the kept tokens in fp32, in row order.
    """

    def __init__(self, model: Model, site: str, batch: TokenBatch, metric: Metric, keep: Tensor, rows: Tensor) -> None:
        # Rows are taken by hand, so that the padding and with it `keep` stay as they are.
        part = TokenBatch(batch.ids[rows], batch.mask[rows])
        self._segment = model.segment(part, site, metric.site)
        self._site, self._metric, self._rows, self._keep = site, metric, rows, keep[rows]
        self.clean: Float[Tensor, "tokens d"] = self._segment.x[self._keep].float()

    def values(self, xs: Sequence[Float[Tensor, "tokens d"]]) -> Float[Tensor, "n rows"]:
        """The metric of each row under each state of the kept tokens."""
        n = len(xs)
        reached = self._segment.run(torch.cat(list(xs)), rows=n, keep=self._keep.repeat(n, 1))
        read = reached.acts.flat(self._metric.site)
        return self._metric(read.float(), self._rows.repeat(n).to(read.device)).unflatten(0, (n, -1))

    def gradient(self, xs: Sequence[Float[Tensor, "tokens d"]]) -> Float[Tensor, "n tokens d"]:
        """Gradient of the metric at each state; rows are independent, so their sum has the gradients of all."""
        leaf = torch.stack(list(xs)).detach().requires_grad_(True)
        with torch.enable_grad():
            value = self.values(leaf.unbind()).sum()
        slope = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
        if slope is None:
            raise MismatchError(
                f"The metric at {self._metric.site} does not depend on {self._site}. Read at a site that the model "
                "computes from it, without detaching."
            )
        return slope.float()


@checked
def exact_effects(
    model: Model,
    site: str,
    sae: AnySAE,
    batch: TokenBatch,
    metric: Metric,
    features: Sequence[int],
    *,
    keep: Bool[Tensor, "batch pos"],
) -> Float[Tensor, " k"]:
    """Effect of zeroing each of some features alone (error kept), each one run from the site on; mean over rows.

    The reference that an estimate has to agree with; slow.

    Raises:
        MismatchError: as `node_effects`.
        ShapeError: as `node_effects`.
        DegenerateInputError: if the mask keeps no token.
        InvalidInputError: if a feature does not exist.
    """
    _require_kept("exact_effects", keep, batch)
    ((site, basis),) = checked_bases(model, {site: sae}).items()
    refuse_unreached(model, {site: basis}, metric.site, "The metric")
    batch, keep = batch.to(model.device), keep.to(model.device)
    run = _Suffix(model, site, batch, metric, keep, torch.arange(len(batch), device=model.device))
    parts, decoder = basis.coefficients(run.clean), basis.rows().to(run.clean)
    states = [run.clean, *(run.clean - parts[:, f, None] * decoder[f] for f in basis.features(features).tolist())]
    size = max(1, AttributionOptions.batch_size // len(batch))
    with torch.no_grad():
        values = torch.cat([run.values(states[i : i + size]) for i in range(0, len(states), size)])
    return (values[1:] - values[0]).mean(1)
