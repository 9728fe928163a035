"""What the activations of a site look like: outlier dimensions, massive activations, sinks, position, anisotropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from workbench.activations.moments import ClassCounts, Moments, PositionSums, Reservoir, Thresholds
from workbench.activations.store import ActivationStore
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.progress import track
from workbench.core.stats import Estimate
from workbench.core.tokenizer import special_ids
from workbench.models.model import Model

CLASSES = ("BOS", "first", "special", "punctuation", "other")
"""Classes of tokens: a special token that opens its row; the first other token of the row; special tokens elsewhere;
tokens without a letter or digit; the rest."""
HELD_OUT_EVERY = 5


@dataclass(frozen=True, kw_only=True)
class GeometryOptions:
    """What counts as large, and how much is sampled. All of these are conventions; a report shows them.

    Attributes:
        extremal_share: a dimension is an outlier if it holds the largest absolute value of more than this share of the
            ordinary tokens, and of more than five times its even share 1 / d;
        rms_factor: or if its root mean square is above this multiple of the median over the dimensions.
        massive: a massive activation is larger than this
        massive_ratio: and larger than this multiple of the median absolute value.
        top: dimensions that are listed, and up to which the share of the squared norm is given.
        sample: tokens that are held for anisotropy.
        components: principal components that "all but the top" removes; None takes d / 100, at least 1.
        ridge: penalty of the position probe, per token and unit variance.
        seed: of the sample and of the random pairs.
    """

    extremal_share: float = 0.1
    rms_factor: float = 6.0
    massive: float = 100.0
    massive_ratio: float = 1000.0
    top: int = 5
    sample: int = 4096
    components: int | None = None
    ridge: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (self.extremal_share, self.rms_factor, self.massive, self.massive_ratio, self.ridge)
        if min(positive) <= 0 or self.top < 1 or self.sample < 4 or (self.components or 1) < 1:
            raise InvalidInputError(f"{self}: thresholds must be positive, top >= 1, sample >= 4, components >= 1.")


@dataclass(frozen=True)
class DimStats:
    """One dimension over the ordinary tokens.

    Attributes:
        kurtosis: 3 for a Gaussian.
        extremal: share of the tokens whose largest absolute value it holds.
        norm_share: its share of the squared norm.
    """

    dim: int
    mean: float
    std: float
    kurtosis: float
    extremal: float
    norm_share: float


@dataclass(frozen=True)
class ClassStats:
    """One class of tokens, see `CLASSES`: tokens, tokens with a massive activation, sinks, largest absolute value."""

    name: str
    tokens: int
    massive: int
    sinks: int
    largest: float


@dataclass(frozen=True, kw_only=True)
class SiteGeometry:
    """The geometry of one site. Ordinary tokens are neither first in their row, nor special, nor sinks.

    Attributes:
        ordinary: ordinary tokens; everything but `classes` and `massive_dims` is over these.
        median_abs: median absolute value, of the first batch.
        outliers: dimensions that stand out by `GeometryOptions.extremal_share` or `rms_factor`.
        largest_means: dimensions with the largest `|mean| / std`.
        kurtosis: median over the dimensions.
        norm_share: share of the squared norm in the 1 to `top` largest dimensions.
        classes: massive activations and sinks (norm above ten medians), by class of token.
        massive_dims: dimensions with massive activations, the most frequent first, and on how many tokens.
        position: held-out R2 of a linear probe of the position in the row: "all dimensions", "without outliers" and
            "outliers alone"; None where it can't be computed.
        anisotropy: mean cosine of random pairs of tokens of different rows: "raw", "clipped" (outlier dimensions set to
            0), "standardised" (each dimension), "all but the top" (without mean and first principal components).
    """

    site: str
    d: int
    tokens: int
    ordinary: int
    median_abs: float
    outliers: tuple[DimStats, ...]
    largest_means: tuple[DimStats, ...]
    kurtosis: float
    norm_share: tuple[float, ...]
    classes: tuple[ClassStats, ...]
    massive_dims: tuple[tuple[int, int], ...]
    position: dict[str, float | None]
    anisotropy: dict[str, Estimate]

    @property
    def outlier_dims(self) -> tuple[int, ...]:
        """Numbers of the outlier dimensions."""
        return tuple(dim.dim for dim in self.outliers)


class Geometry:
    """Streaming measurement of one site; `add` tokens, then take `result`.

    The first batch fixes the scales. Tokens with a norm above `max_norm` are sinks.

    Raises:
        DegenerateInputError: if fewer than two tokens of the first batch are ordinary.
    """

    def __init__(
        self,
        site: str,
        first: Float[Tensor, "n d"],
        ordinary: Bool[Tensor, " n"],
        max_norm: float,
        options: GeometryOptions,
    ) -> None:
        chosen = first[ordinary].float()
        if len(chosen) < 2:
            raise DegenerateInputError(f"{site}: {len(chosen)} ordinary tokens in the first batch; give longer rows.")
        self.site, self.options, self.d = site, options, first.shape[1]
        self.median_abs = float(chosen.abs().median())
        limits = Thresholds(max_norm, max(options.massive, options.massive_ratio * self.median_abs))
        self._moments = Moments(chosen.mean(0))
        self._extremal = torch.zeros(self.d, dtype=torch.long)
        self._position = PositionSums(chosen.mean(0), chosen.std(0))
        self._sample = Reservoir(options.sample, options.seed)
        self._counts = ClassCounts(len(CLASSES), self.d, limits)

    def add(
        self,
        x: Float[Tensor, "n d"],
        kinds: Int[Tensor, " n"],
        ordinary: Bool[Tensor, " n"],
        positions: Int[Tensor, " n"],
        rows: Int[Tensor, " n"],
    ) -> None:
        """Counts some tokens: their class, whether they are ordinary, their position, and the row they stand in."""
        self._counts.add(x, kinds)
        chosen, row = x[ordinary].float(), rows[ordinary]
        self._moments.add(chosen)
        self._extremal += torch.bincount(chosen.abs().argmax(1), minlength=self.d)
        self._position.add(chosen, positions[ordinary], row % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)
        self._sample.add(chosen, row)

    def result(self) -> SiteGeometry:
        """What was measured so far."""
        energy = self._moments.mean_square
        flagged = self._flagged(energy)
        ratio = self._moments.mean.abs() / self._moments.std.clamp_min(1e-12)
        top = min(self.options.top, self.d)
        shares = energy.sort(descending=True).values.cumsum(0)[:top] / energy.sum().clamp_min(1e-300)
        counts, dims = self._counts, self._counts.massive_dims
        frequent = [d for d in dims.argsort(descending=True, stable=True).tolist()[:top] if dims[d]]
        return SiteGeometry(
            site=self.site, d=self.d, tokens=int(counts.tokens.sum()), ordinary=self._moments.n,
            median_abs=self.median_abs, outliers=self._dims(flagged), largest_means=self._dims(ratio.topk(top).indices),
            kurtosis=float(self._moments.kurtosis.median()), norm_share=tuple(shares.tolist()),
            classes=tuple(
                ClassStats(name, int(counts.tokens[i]), int(counts.massive[i]), int(counts.sinks[i]), largest)
                for i, (name, largest) in enumerate(zip(CLASSES, counts.largest.tolist(), strict=True))
            ),
            massive_dims=tuple((dim, int(dims[dim])) for dim in frequent),
            position=self._positions(flagged),
            anisotropy=self._anisotropies(flagged),
        )  # fmt: skip

    def _flagged(self, energy: Tensor) -> Tensor:
        """Outlier dimensions, the largest first."""
        extremal = self._extremal / self._moments.n
        often = extremal > max(self.options.extremal_share, 5 / self.d)
        rms = energy.sqrt()
        flagged = (often | (rms > self.options.rms_factor * rms.median())).nonzero().flatten()
        return flagged[rms[flagged].argsort(descending=True)]

    def _dims(self, dims: Tensor) -> tuple[DimStats, ...]:
        m, energy = self._moments, self._moments.mean_square
        values = (m.mean, m.std, m.kurtosis, self._extremal / m.n, energy / energy.sum().clamp_min(1e-300))
        return tuple(DimStats(dim, *(float(value[dim]) for value in values)) for dim in dims.tolist())

    def _positions(self, flagged: Tensor) -> dict[str, float | None]:
        rest = torch.ones(self.d, dtype=torch.bool)
        rest[flagged] = False
        sets = {"all dimensions": torch.arange(self.d), "without outliers": rest.nonzero().flatten()}
        sets["outliers alone"] = flagged
        return {name: self._position.r2(dims, self.options.ridge) for name, dims in sets.items()}

    def _anisotropies(self, flagged: Tensor) -> dict[str, Estimate]:
        x, rows = self._sample.sample()
        mean, std = self._moments.mean.float(), self._moments.std.float()
        clipped = x.clone()
        clipped[:, flagged] = 0
        components = self.options.components or max(1, self.d // 100)
        variants = {
            "raw": x,
            "clipped": clipped,
            "standardised": (x - mean) / std.clamp_min(1e-12),
            "all but the top": all_but_the_top(x, components),
        }
        return {name: anisotropy(value, rows) for name, value in variants.items()}


def anisotropy(x: Float[Tensor, "n d"], rows: Int[Tensor, " n"]) -> Estimate:
    """Mean cosine of pairs of tokens of different rows: 0 for directions that are spread evenly.

    Each token is in one pair at most, neighbours in the given (random) order, so the standard error is honest.

    Raises:
        DegenerateInputError: if fewer than two pairs of different rows are there.

    >>> round(anisotropy(torch.ones(4, 3), torch.arange(4)).value, 6)
    1.0
    """
    n = len(x) // 2 * 2
    pairs, row = normalize(x[:n].double(), dim=1).view(-1, 2, x.shape[1]), rows[:n].view(-1, 2)
    pairs = pairs[row[:, 0] != row[:, 1]]
    if len(pairs) < 2:
        raise DegenerateInputError(f"anisotropy: {len(pairs)} pairs of different rows; give more rows of text.")
    cosine = (pairs[:, 0] * pairs[:, 1]).sum(1).numpy()
    value, reach = float(cosine.mean()), 1.96 * float(cosine.std(ddof=1)) / np.sqrt(len(cosine))
    return Estimate(value, value - reach, value + reach, len(cosine), "normal, disjoint pairs", "pairs")


def all_but_the_top(x: Float[Tensor, "n d"], components: int) -> Float[Tensor, "n d"]:
    """The rows without their mean and their first principal components.

    Source: Mu and Viswanath 2018 (arXiv 1702.01417).
    """
    centred = x.float() - x.float().mean(0)
    top = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -components:]
    return centred - centred @ top @ top.T


def token_kinds(model: Model) -> tuple[Int[Tensor, " d_vocab"], tuple[int, ...]]:
    """Class of each token by its text alone ("special", "punctuation" or "other"), and the special ids."""
    special = special_ids(model.tokenizer)
    known = min(model.d_vocab, len(model.tokenizer))
    kinds = torch.full((model.d_vocab,), CLASSES.index("other"))
    for i, text in enumerate(model.tokenizer.batch_decode([[i] for i in range(known)])):
        if not any(char.isalnum() for char in text):
            kinds[i] = CLASSES.index("punctuation")
    kinds[[i for i in special if i < model.d_vocab]] = CLASSES.index("special")
    return kinds, special


def classes_of(ids: Int[Tensor, "rows pos"], kinds: Int[Tensor, " d_vocab"]) -> Int[Tensor, "rows pos"]:
    """Class of each token in its row, an index into `CLASSES`."""
    classes = kinds[ids]
    special = classes == CLASSES.index("special")
    classes[:, 0] = torch.where(special[:, 0], CLASSES.index("BOS"), classes[:, 0])
    first = (~special).int().argmax(1)
    rows = torch.arange(len(ids))
    classes[rows, first] = torch.where(special[rows, first], classes[rows, first], CLASSES.index("first"))
    return classes


def measure_geometry(
    model: Model,
    rows: Int[Tensor, "rows pos"],
    sites: Sequence[str],
    *,
    batch_rows: int = 16,
    options: GeometryOptions | None = None,
) -> tuple[SiteGeometry, ...]:
    """The geometry of several sites from one pass over packed rows of tokens.

    The first batch of `batch_rows` rows fixes the sink limit and the median.

    Raises:
        UnknownSiteError: for a site that the model does not have.
        DegenerateInputError: if the rows hold too few ordinary tokens.
    """
    options, names = options or GeometryOptions(), [str(model.resolve(site)) for site in sites]
    kinds, special = token_kinds(model)
    running: dict[str, tuple[Geometry, TokenPolicy]] = {}
    batches = rows.split(batch_rows)
    for number, ids in enumerate(track(batches, description="Measuring geometry", unit="batches")):
        acts, classes = model.capture(ids, names), classes_of(ids, kinds).flatten()
        row, position = torch.meshgrid(torch.arange(len(ids)), torch.arange(ids.shape[1]), indexing="ij")
        row = (row + number * batch_rows).flatten()
        for name in names:
            x = acts.flat(name).float().cpu()
            if name not in running:
                rule = TokenPolicy.estimate(x, ids, special)
                first = Geometry(name, x.flatten(0, 1), rule.mask(x, ids).flatten(), rule.max_norm, options)
                running[name] = first, rule
            geometry, rule = running[name]
            geometry.add(x.flatten(0, 1), classes, rule.mask(x, ids).flatten(), position.flatten(), row)
    return tuple(geometry.result() for geometry, _ in running.values())


def geometry_of_store(
    model: Model, store: ActivationStore, site: str | None = None, *, options: GeometryOptions | None = None
) -> SiteGeometry:
    """The geometry of one stored site. A store holds ordinary tokens only, so it can't show sinks.

    Raises:
        MismatchError: if another model made the store.
    """
    store.check_model(model)
    kinds, name = token_kinds(model)[0], store.site(site)
    geometry: Geometry | None = None
    for block in store.blocks(name):
        x, ordinary = block.acts.float(), torch.ones(len(block.acts), dtype=torch.bool)
        if geometry is None:
            limit = store.keep_rule(name).max_norm
            geometry = Geometry(name, x, ordinary, limit, options or GeometryOptions())
        geometry.add(x, kinds[block.tokens], ordinary, block.positions, block.rows)
    if geometry is None:
        raise DegenerateInputError(f"{store.path} holds no tokens. Harvest again.")
    return geometry.result()
