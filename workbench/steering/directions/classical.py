"""Directions of a concept from labelled texts: the classical ways, all of unit length, all pointing at the concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.sae import AnySAE
from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.registry import Registry
from workbench.core.tokens import TokenBatch
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.probes.erase.moments import ClassMoments
from workbench.probes.linear import ProbeOptions, fit_probe
from workbench.steering.directions.contrast import difference_of_means, mean_activations
from workbench.steering.directions.reft import ReftOptions, fit_reft

SHRINKAGE = 0.1
WHITENING_FLOOR = 1e-6


@checked
@dataclass(frozen=True)
class Concept(OneLine):
    """A concept, given by texts that have it and texts that do not.

    Attributes:
        name: for people.
        positives: texts with the concept.
        negatives: texts without it; for PCA the i-th one belongs to the i-th positive.
        tokens: ids of tokens that stand for the concept; () takes those that tell the two sides apart best.
    """

    name: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for side in ("positives", "negatives"):
            texts = getattr(self, side)
            if isinstance(texts, str) or len(texts) < 2:
                raise InvalidInputError(
                    f"Concept({self.name!r}): {1 if isinstance(texts, str) else len(texts)} {side}. Give two or more."
                )


@dataclass(frozen=True, eq=False, kw_only=True)
class DirectionTask:
    """What a method finds a direction from.

    Attributes:
        model: the model.
        site: where.
        texts: the positive texts.
        positives: mean activation of each positive text.
        negatives: of each negative text.
        start: unit difference of means.
        options: how directions are found.
    """

    model: Model
    site: str
    texts: TokenBatch
    positives: Float[Tensor, "n d"]
    negatives: Float[Tensor, "m d"]
    start: Float[Tensor, " d"]
    options: DirectionOptions


@dataclass(frozen=True)
class DirectionMethod:
    """A way to find a direction.

    Attributes:
        find: the direction, of any length.
        is_oriented: whether its sign and length are final, and not to be set by `oriented`.
    """

    find: Callable[[DirectionTask], Float[Tensor, " d"]]
    is_oriented: bool = False


METHODS: Registry[DirectionMethod] = Registry("direction method")
"""Every way to find a direction, in the order in which they are compared."""


@checked
@dataclass(frozen=True)
class DirectionOptions(OneLine):
    """How directions are found.

    Attributes:
        methods: which, of `METHODS`; by default all.
        probe_l2: penalty of the logistic probe.
        reft: training of ReFT-r1.
        sae: an SAE that reads the site; `steer_concepts` then also takes the feature that tells the sides apart best.
    """

    methods: tuple[str, ...] = field(default_factory=lambda: tuple(METHODS))
    probe_l2: float = 1.0
    reft: ReftOptions = ReftOptions()
    sae: AnySAE | None = None

    def __post_init__(self) -> None:
        METHODS.check(*self.methods)


@checked
def concept_directions(
    model: Model, concept: Concept, site: str | Site, options: DirectionOptions | None = None
) -> dict[str, Float[Tensor, " d"]]:
    """A unit direction per method, each oriented so that the positive texts lie further along it.

    A text is the mean activation of its tokens, without the first and without attention sinks. ReFT-r1 is trained on
    the positive texts, from the difference of means.

    Raises:
        InvalidInputError: for PCA with unequal numbers of positives and negatives.
        DegenerateInputError: if the two sides do not differ at the site.
    """
    options = options or DirectionOptions()
    where = str(model.resolve(site))
    positive, negative = model.tokens(list(concept.positives)), model.tokens(list(concept.negatives))
    a, b = (_text_means(model, batch, where) for batch in (positive, negative))
    start = oriented(difference_of_means(a, b), a, b)
    task = DirectionTask(
        model=model, site=where, texts=positive, positives=a, negatives=b, start=start, options=options
    )
    directions: dict[str, Tensor] = {}
    for name in options.methods:
        v = METHODS[name].find(task)
        directions[name] = v if METHODS[name].is_oriented else oriented(v.to(a.device), a, b)
    return directions


def _probe(task: DirectionTask) -> Tensor:
    a, b = task.positives, task.negatives
    labels, options = torch.tensor([1] * len(a) + [0] * len(b)), ProbeOptions(l2=task.options.probe_l2, folds=0)
    return fit_probe(torch.cat([a, b]), labels, task.site, options=options).w


def _reft(task: DirectionTask) -> Tensor:
    return fit_reft(task.model, task.texts, task.site, task.start, task.options.reft).direction


for _name, _method in {
    "difference of means": DirectionMethod(lambda task: task.start),
    "PCA": DirectionMethod(lambda task: pca_direction(task.positives, task.negatives, centred=False)),
    "centred PCA": DirectionMethod(lambda task: pca_direction(task.positives, task.negatives, centred=True)),
    "logistic probe": DirectionMethod(_probe),
    "LEACE": DirectionMethod(lambda task: leace_direction(task.positives, task.negatives)),
    "ReFT-r1": DirectionMethod(_reft, is_oriented=True),
}.items():
    METHODS.add(_name, _method)


def _text_means(model: Model, batch: TokenBatch, site: str) -> Float[Tensor, "texts d"]:
    acts = model.capture(batch, [site]).flat(site)
    return mean_activations(model, batch, [site], TokenPolicy.of_batch(batch, acts).kept(batch, acts))[site]


def oriented(
    direction: Float[Tensor, " d"], positives: Float[Tensor, "n d"], negatives: Float[Tensor, "m d"]
) -> Float[Tensor, " d"]:
    """The direction with unit length and the sign with which positives lie further along it on average.

    Where the two means do not differ along it, the sign is kept with which the majority of positives lies further
    than the median of all.

    Raises:
        DegenerateInputError: for a direction that is zero or not finite.

    >>> oriented(torch.tensor([-2.0, 0.0]), torch.tensor([[1.0, 5.0]]), torch.tensor([[0.0, 5.0]]))
    tensor([1., -0.])
    """
    norm = direction.norm()
    if not bool(torch.isfinite(norm)) or not bool(norm > 0):
        raise DegenerateInputError(
            f"oriented: a direction of norm {float(norm)}. The two sides do not differ; give other texts or another "
            "site."
        )
    unit = direction.float() / norm
    along, other = positives.float() @ unit, negatives.float() @ unit
    gap = along.mean() - other.mean()
    if gap == 0:
        gap = (along > torch.cat([along, other]).median()).float().mean() - 0.5
    return -unit if bool(gap < 0) else unit


def pca_direction(
    positives: Float[Tensor, "n d"], negatives: Float[Tensor, "m d"], *, centred: bool
) -> Float[Tensor, " d"]:
    """The first principal component of the differences of the pairs; its sign is arbitrary, see `oriented`.

    Uncentred it is close to the mean difference, if that is larger than the spread of the differences. Centred, the
    mean difference is subtracted first: what is left is how the pairs differ among themselves, often not the concept.

    Raises:
        InvalidInputError: if the sides are not pairs.

    Source: uncentred as in steering-vectors and in repeng's pca_center; centred as in repeng's pca_diff.

    >>> a, b = torch.tensor([[3.0, 1.0], [3.0, -1.0]]), torch.zeros(2, 2)  # differences (3, 1), (3, -1)
    >>> pca_direction(a, b, centred=False).abs(), pca_direction(a, b, centred=True).abs()
    (tensor([1., 0.]), tensor([0., 1.]))
    """
    if positives.shape != negatives.shape:
        raise InvalidInputError(
            f"pca_direction: {len(positives)} positives and {len(negatives)} negatives. PCA needs pairs: give as many "
            "of each, the i-th belonging together, or leave PCA out of the methods."
        )
    differences = (positives - negatives).double()
    if centred:
        differences = differences - differences.mean(0)
    return torch.linalg.svd(differences, full_matrices=False).Vh[0].float()


def leace_direction(
    positives: Float[Tensor, "n d"], negatives: Float[Tensor, "m d"], shrinkage: float = SHRINKAGE
) -> Float[Tensor, " d"]:
    """The direction along which LEACE reads the concept: inverse covariance times the difference of means.

    LEACE erases a binary concept by `x - S (S^+ d d^T) (x - mean) / (d^T S^+ d)`: it writes along the difference of
    means `d`, which is a baseline of its own, and reads along `S^+ d`. The covariance `S` is shrunk towards a multiple
    of the identity, because there are fewer texts than dimensions.

    Source: Belrose et al. 2023 (arXiv 2306.03819), theorem 4.3 for one label; the shrinkage is ours.

    >>> a = torch.tensor([[1.0, 9.0], [1.0, -9.0]])
    >>> v = leace_direction(a, torch.tensor([[-1.0, 9.0], [-1.0, -9.0]]))  # the noisy second axis is not read
    >>> bool(v[1].abs() < 1e-6 * v[0].abs())
    True
    """
    if positives.shape[1] != negatives.shape[1]:
        raise ShapeError(f"leace_direction: widths {positives.shape[1]} and {negatives.shape[1]} must agree.")
    labels = torch.tensor([1] * len(positives) + [0] * len(negatives), device=positives.device)
    moments = ClassMoments.of(torch.cat([positives, negatives]), labels, 2)
    floor = WHITENING_FLOOR * torch.linalg.eigvalsh(moments.covariance)[-1]
    whole = moments.shrunk(shrinkage) + floor * torch.eye(moments.width).to(floor)
    return torch.linalg.solve(whole, moments.means[1] - moments.means[0]).float()


def concept_tokens(
    positives: Sequence[Int[Tensor, " _"]],
    negatives: Sequence[Int[Tensor, " _"]],
    d_vocab: int,
    k: int = 20,
    without: Sequence[int] = (),
) -> Int[Tensor, " k"]:
    """The tokens that tell the positive texts apart best, best first: the largest z-scores of smoothed log-odds.

    Tokens in `without` are not counted: a BOS is the likelier in short texts and says nothing about them.

    Source: Monroe, Colaresi, Quinn 2008, with the counts of both sides together as the prior.

    >>> concept_tokens([torch.tensor([1, 1, 1, 2])], [torch.tensor([2, 2, 3, 3])], 5, k=1)
    tensor([1])
    """
    # a tokenizer may have special tokens for which the model has no row
    a, b = (torch.bincount(torch.cat(list(s)), minlength=d_vocab)[:d_vocab].double() for s in (positives, negatives))
    left_out = [i for i in without if i < d_vocab]
    a[left_out], b[left_out] = 0.0, 0.0
    if not a.any() or not b.any():
        raise DegenerateInputError("concept_tokens: one side holds no tokens but special ones. Give texts.")
    prior = (a + b) * (0.5 * min(a.sum(), b.sum()) / (a.sum() + b.sum())) + 1e-3
    ya, yb = a + prior, b + prior
    odds = (ya / (ya.sum() - ya)).log() - (yb / (yb.sum() - yb)).log()
    z = odds / (1 / ya + 1 / yb).sqrt()
    return z.masked_fill(a == 0, -torch.inf).topk(min(k, int((a > 0).sum()))).indices
