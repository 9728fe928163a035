"""The probe of three labels or more: softmax regression, its margins, and the effects of features on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.nodes.effects import SiteEffects
from circuits.shift.groups import SMALLEST_EXCESS
from circuits.shift.heads.solve import Linear, Scale, fit_softmax
from workbench.bases.base import Basis
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError
from workbench.core.stats import Estimate, wilson
from workbench.probes.linear import Probe, ProbeOptions, fit_probe, mean_pool


@dataclass(frozen=True, eq=False, kw_only=True)
class SoftmaxProbe(OneLine):
    """A linear classifier of several labels.

    Attributes:
        weight: in the units of the raw activations.
        bias: one per label.
        site: where the activations were read.
        accuracy: cross-validated accuracy on the training rows, or None if it was not asked for.
        shuffled: the same after shuffling the labels.
    """

    weight: Float[Tensor, "labels d"]
    bias: Float[Tensor, " labels"]
    site: str
    accuracy: Estimate | None = None
    shuffled: Estimate | None = None

    def logits(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows labels"]:
        """Logits of each row, in fp64."""
        return x.to(self.weight) @ self.weight.T + self.bias

    def predict(self, x: Float[Tensor, "rows d"]) -> Int[Tensor, " rows"]:
        """The label of each row."""
        return self.logits(x).argmax(dim=1)


AnyProbe = Probe | SoftmaxProbe


def logits_of(probe: AnyProbe, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows labels"]:
    """Logits of each label; of two labels the first has 0."""
    if isinstance(probe, SoftmaxProbe):
        return probe.logits(x)
    logit = probe.logit(x).double()
    return torch.stack([torch.zeros_like(logit), logit], dim=1)


def linear_of(probe: AnyProbe) -> tuple[Float[Tensor, "labels d"], Float[Tensor, " labels"]]:
    """Weight and bias of each label; of two labels those of the first are 0."""
    if isinstance(probe, SoftmaxProbe):
        return probe.weight, probe.bias
    return torch.stack([torch.zeros_like(probe.w), probe.w]), torch.tensor([0.0, probe.b], dtype=torch.float64)


def probe_of(
    x: Float[Tensor, "rows d"], labels: Sequence[int], site: str, options: ProbeOptions, groups: tuple[str, ...] = ()
) -> AnyProbe:
    """The probe of two labels or more."""
    if max(labels) > 1:
        return fit_softmax_probe(x, labels, site, options)
    return fit_probe(x, torch.tensor(labels, dtype=torch.long), site, groups=groups or None, options=options)


def fit_softmax_probe(
    x: Float[Tensor, "rows d"], labels: Sequence[int], site: str, options: ProbeOptions
) -> SoftmaxProbe:
    """The L2 softmax probe, on standardised dimensions and solved to convergence.

    Raises:
        DegenerateInputError: if a label has fewer rows than there are folds.
    """
    rows, y = x.double().cpu().numpy(), np.array(labels)
    linear = _fitted(rows, y, int(y.max()) + 1, options.l2)
    probe = SoftmaxProbe(weight=torch.from_numpy(linear.weight), bias=torch.from_numpy(linear.bias), site=site)
    if not options.folds:
        return probe
    shuffled = np.random.default_rng(options.seed).permutation(y)
    return SoftmaxProbe(
        weight=probe.weight, bias=probe.bias, site=site, accuracy=_cross_validated(rows, y, options),
        shuffled=_cross_validated(rows, shuffled, options),
    )  # fmt: skip


def _fitted(x: np.ndarray, y: np.ndarray, classes: int, l2: float) -> Linear:
    scale = Scale.of(x)
    return scale.folded(fit_softmax(scale(x), y, classes, l2=l2))


def _cross_validated(x: np.ndarray, y: np.ndarray, options: ProbeOptions) -> Estimate:
    from sklearn.model_selection import StratifiedKFold

    if (smallest := int(np.bincount(y).min())) < options.folds:
        raise DegenerateInputError(
            f"fit_softmax_probe: {options.folds} folds need as many rows of each label; the rarest has {smallest}. Use "
            "fewer folds."
        )
    hits = 0
    for train, held in StratifiedKFold(options.folds, shuffle=True, random_state=options.seed).split(x, y):
        hits += int((_fitted(x[train], y[train], int(y.max()) + 1, options.l2).predict(x[held]) == y[held]).sum())
    return wilson(hits, len(y))


def contrasts(chosen: Bool[np.ndarray, "values labels"]) -> Float[Tensor, "values labels"]:
    """For each value the mean over its labels less the mean over the others.

    >>> contrasts(np.eye(3, dtype=bool))[0].tolist()
    [1.0, -0.5, -0.5]
    """
    inside = torch.from_numpy(chosen).double()
    outside = 1 - inside
    return inside / inside.sum(1, keepdim=True) - outside / outside.sum(1, keepdim=True).clamp_min(1)


def of_labels(n: int) -> Float[Tensor, "labels labels"]:
    """The contrast of each label: its own logit against the mean of the others."""
    return contrasts(np.eye(n, dtype=bool))


@dataclass(frozen=True, eq=False)
class LossOfContrast(OneLine):
    """Minus a contrast of logits per row, as metric of `node_effects`; an effect above zero supports the row's value.

    Attributes:
        probe: reads pooled activations.
        contrast: of each value.
        values: value of each row, such as its label.
        keep: the tokens that are pooled.
    """

    probe: SoftmaxProbe
    contrast: Float[Tensor, "values labels"]
    values: Int[Tensor, " rows"]
    keep: Bool[Tensor, "rows pos"]

    @property
    def site(self) -> str:
        """The probe's site."""
        return self.probe.site

    def __call__(self, x: Float[Tensor, "batch pos d"], rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Minus the contrast, one per row."""
        pooled = mean_pool(x, self.keep[rows.to(self.keep.device)])
        weight, bias = self.probe.weight.to(pooled), self.probe.bias.to(pooled)
        own = self.contrast.to(pooled)[self.values[rows.to(self.values.device)].to(pooled.device)]
        return -((pooled @ weight.T + bias) * own).sum(1)


def contrast_effects(
    acts: Float[Tensor, "rows d_sae"],
    basis: Basis,
    probe: SoftmaxProbe,
    contrast: Float[Tensor, "values labels"],
    values: Int[Tensor, " rows"],
) -> SiteEffects:
    """Exact effects of zeroing each feature on each row's contrast, at the probe's own site.

    The effect is `pooled contribution * (row of f . direction)`, the direction being the contrast of the probe's
    weights of the row's value; see `linear_effects`.
    """
    directions = contrast @ probe.weight
    writes = basis.rows().double().cpu() @ directions.T
    per_row = (acts.double() * writes.T[values]).float()
    example, feature = per_row.nonzero(as_tuple=True)
    total = per_row.sum(dim=1)
    return SiteEffects(
        site=probe.site, d_sae=per_row.shape[1], n=len(per_row), example=example,
        pos=torch.full_like(feature, -1), feature=feature, value=per_row[example, feature], added=total, total=total,
        method="exact (linear probe at the SAE's own site; zero, error kept)",
    )  # fmt: skip


def side_of(
    acts: Float[np.ndarray, " rows"], labels: Int[np.ndarray, " rows"], usual: Int[np.ndarray, " labels"] | None
) -> tuple[int, Bool[np.ndarray, " labels"]]:
    """The label that a feature is most active on, and the labels that a judge is to tell from the others with it.

    Those that usually have the same value of the attribute, or itself alone where the attribute is not known.
    """
    n = int(labels.max()) + 1
    means = np.array([acts[labels == label].mean() for label in range(n)])
    spread = means - means.mean()
    strongest = int(np.abs(spread).argmax()) if np.abs(spread).max() > SMALLEST_EXCESS else 0
    return strongest, np.arange(n) == strongest if usual is None else usual == usual[strongest]
