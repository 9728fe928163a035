"""One vector per sample, which says how the model comes to its answer there: the rows that clustering compares.

Rows are compared by their angle alone. They are made some samples at a time, and only the strongest entries of each are
kept, so memory grows with the number of samples and not with the size of the dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from torch import Tensor

from circuits.decomposition import Place, places, reads_of
from circuits.decomposition import bases as checked_bases
from circuits.discovery.samples import Samples
from circuits.discovery.sketch import GradientSketch
from circuits.faithful.means import counting
from circuits.metrics import bound, log_probability
from circuits.nodes.effects import NodeEffects, SiteEffects, aggregated
from circuits.nodes.runs import AttributionOptions, clean_pass, dots
from circuits.nodes.setting import Setting
from circuits.pairs import Pairs
from workbench.bases.base import CHUNK_ENTRIES, Basis
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, require
from workbench.core.html import Shown
from workbench.core.numbers import counted, percent
from workbench.core.precision import precise
from workbench.core.progress import task
from workbench.core.similarity import SparseMatrix
from workbench.engine.job import Made
from workbench.engine.keeper import Keeper
from workbench.models.model import Model

VectorKind = Literal["effects", "activations", "dense", "gradients"]
KINDS: dict[str, str] = {
    "effects": "what each feature does to the answer's log probability, by attribution patching, summed over tokens",
    "activations": "what each feature writes, as activation times the norm of its row, summed over tokens",
    "dense": "activations at the last token, each site centred and scaled to one size",
    "gradients": "gradient of the answer's log probability with respect to the weights of linear maps, sketched",
}
METRIC_NAME = "minus log probability of the clean answer"
"""What effects are on, as `log_probability` names it."""
OF_FEATURES = ("effects", "activations")
"""Kinds whose entries are features of a dictionary."""


@checked
@dataclass(frozen=True, kw_only=True)
class VectorOptions(OneLine):
    """How vectors are made.

    Attributes:
        per_sample: strongest entries of a vector of features that are kept.
        sketch: entries of a sketched gradient; cosines are off by about one over its square root.
        batch_size: samples per pass, and per part that a stopped run keeps.
        seed: of the sketch.
    """

    per_sample: int = 1000
    sketch: int = 4096
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("per_sample", "sketch", "batch_size"):
            require(getattr(self, name) >= 1, f"VectorOptions({name}={getattr(self, name)})", "it must be at least 1")


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class SampleVectors(Shown):
    """One sparse vector per sample.

    Attributes:
        kind: "effects", "activations", "dense" or "gradients".
        matrix: a row per sample, in the order of the samples.
        sites: of vectors of features, how many columns each site has, in their order; empty otherwise.
        kept: share of the squared norm of all rows that the kept entries hold.
    """

    kind: VectorKind
    matrix: SparseMatrix
    sites: Mapping[str, int]
    kept: float = 1.0

    def __len__(self) -> int:
        return int(self.matrix.shape[0])

    def feature(self, column: int) -> tuple[str, int]:
        """Site and number of the feature of a column.

        Raises:
            InvalidInputError: for a column that is no feature.
        """
        start = 0
        for site, width in self.sites.items():
            if start <= column < start + width:
                return site, column - start
            start += width
        raise InvalidInputError(
            f"feature({column}): these vectors ({self.kind}) have {start} columns of features. Name one of them."
        )

    def effects(self, rows: Sequence[int], model_fingerprint: str, bases: Mapping[str, str]) -> NodeEffects:
        """The effects of features on some samples, as `node_effects` by attribution patching has them.

        Entries that were dropped as too small count as 0.

        Args:
            rows: the samples.
            model_fingerprint: of the model.
            bases: fingerprint of the basis of each site.

        Raises:
            InvalidInputError: if the vectors are of another kind.
        """
        if self.kind != "effects":
            raise InvalidInputError(f"effects: these vectors are of {self.kind}. Make vectors of kind 'effects'.")
        some, sites, start = self.matrix[list(rows)].tocsc(), {}, 0
        unmeasured = torch.full((len(rows),), float("nan"))
        for site, width in self.sites.items():
            part = some[:, start : start + width].tocoo()
            example, feature = (torch.as_tensor(index, dtype=torch.long) for index in (part.row, part.col))
            value = torch.as_tensor(part.data, dtype=torch.float32)
            sites[site] = SiteEffects(
                site=site, d_sae=width, n=len(rows), example=example, pos=torch.full_like(example, -1), feature=feature,
                value=value, added=torch.zeros(len(rows)).index_add_(0, example, value), total=unmeasured,
                method=AttributionOptions(method="atp").words,
            )  # fmt: skip
            start += width
        return NodeEffects(
            sites=sites, metric=METRIC_NAME, baseline="zero_keep_error", aggregation="sum", n_tokens=None,
            model_fingerprint=model_fingerprint, bases={site: bases[site] for site in sites},
        )  # fmt: skip

    def _shown_facts(self) -> Mapping[str, object]:
        per_row = self.matrix.nnz / max(1, len(self))
        return {"kind": KINDS[self.kind], "samples": len(self), "entries per sample": per_row, "sites": len(self.sites)}

    def _shown_line(self) -> str:
        return f"{counted(len(self), 'samples')}, {self.kind}; {percent(self.kept)} of the squared norm is kept"


@checked
def sample_vectors(
    model: Model,
    samples: Samples,
    bases: Mapping[str, AnySAE] | None = None,
    *,
    kind: VectorKind = "effects",
    sites: Sequence[str] = (),
    options: VectorOptions | None = None,
    keep: Keeper | None = None,
) -> SampleVectors:
    """One vector per sample, from one pass each; gradients of all sites come from a single backward pass.

    Args:
        model: the model.
        samples: from `find_samples`.
        bases: a basis per site, for "effects" and "activations".
        kind: what the vectors hold: effects of features, activations of features, dense activations, or gradients.
        sites: where dense activations are read; by default at the bases, or at the stream behind every layer.
        options: how they are made.
        keep: keeper of finished parts, so that a stopped run continues.

    Raises:
        InvalidInputError: for another kind, or features without bases.
    """
    if kind not in KINDS:
        raise InvalidInputError(f"sample_vectors(kind={kind!r}): it is one of {', '.join(KINDS)}.")
    if kind in OF_FEATURES and not bases:
        raise InvalidInputError(
            f"sample_vectors(kind={kind!r}) describes samples by features. Give bases=, such as circuits.bases(model, "
            "FOLDER), or another kind: dense, gradients."
        )
    options = options or VectorOptions()
    maker = _Maker(model, places(model, checked_bases(model, bases)) if bases else [], kind, sites, options)
    parts: list[_Entries] = []
    with task(total=len(samples), description=f"vectors of samples ({kind})", unit="samples") as bar:
        for name, rows in _chunks(samples, options.batch_size):
            is_kept = keep is not None and keep.has(name)
            if keep is None:
                parts.append(maker.entries(samples, rows))
            else:
                if not is_kept:
                    keep.put(name, maker.entries(samples, rows).made())
                parts.append(_Entries.kept(keep, name))
            (bar.skip if is_kept else bar.advance)(len(rows))
    return maker.joined(len(samples), parts)


@dataclass(frozen=True)
class _Entries:
    """Entries of some vectors: sample, column and value of each, and the squared norm before entries were dropped."""

    row: Int[Tensor, " m"]
    column: Int[Tensor, " m"]
    value: Float[Tensor, " m"]
    whole: float

    def made(self) -> Made:
        """As a part."""
        return Made(self.whole, {"row": self.row, "column": self.column, "value": self.value})

    @classmethod
    def kept(cls, keep: Keeper, name: str) -> _Entries:
        """The entries of a part."""
        return cls(**keep.tensors(name), whole=keep.value(name, float))


def _chunks(samples: Samples, size: int) -> Iterator[tuple[str, Int[Tensor, " rows"]]]:
    """Samples of similar length together, so that little is padding; each part with its name."""
    order = samples.contexts.lengths.cpu().argsort(stable=True)
    for start in range(0, len(order), size):
        yield f"vectors-{start:07d}", order[start : start + size]


class _Maker:
    """Makes the vectors of some samples."""

    def __init__(
        self, model: Model, placed: list[Place], kind: VectorKind, sites: Sequence[str], options: VectorOptions
    ) -> None:
        self._model, self._places, self._options = model, placed, options
        self._kind: VectorKind = kind
        self._widths = {place.site: place.basis.d_sae for place in placed} if kind in OF_FEATURES else {}
        read = [str(site) for site in model.site_map.named(sites or ["resid_post"])]
        self._dense = read if sites or not placed else [place.site for place in placed]
        self._norms = {place.site: place.basis.rows().norm(dim=1) for place in placed if kind == "activations"}
        self._sketch = GradientSketch(model, options.sketch, options.seed) if kind == "gradients" else None

    def entries(self, samples: Samples, rows: Int[Tensor, " rows"]) -> _Entries:
        """The vectors of some samples; entries name them by their numbers in the whole."""
        made: dict[str, Callable[[Pairs], _Entries]] = {
            "effects": self._effects, "activations": self._activations, "dense": self._last,
            "gradients": self._gradients,
        }  # fmt: skip
        found = made[self._kind](samples.pairs(rows.tolist()))
        return _Entries(rows[found.row], found.column, found.value, found.whole)

    def joined(self, n: int, parts: Sequence[_Entries]) -> SampleVectors:
        """All vectors in the order of the samples."""
        row, column, value = (
            torch.cat([getattr(part, name) for part in parts]).numpy() for name in ("row", "column", "value")
        )
        width = sum(self._widths.values())
        if self._kind == "dense":
            width = sum(self._model.width(site) for site in self._dense)
        elif self._kind == "gradients":
            width = self._options.sketch
        matrix = csr_matrix((value, (row, column)), shape=(n, width))
        if self._kind == "dense":
            matrix = csr_matrix(_centred(matrix.toarray(), [self._model.width(site) for site in self._dense]))
        whole = sum(part.whole for part in parts)
        kept = float((value.astype(np.float64) ** 2).sum()) / whole if whole > 0 else 1.0
        return SampleVectors(kind=self._kind, matrix=matrix, sites=dict(self._widths), kept=min(1.0, kept))

    def _effects(self, pairs: Pairs) -> _Entries:
        clean = pairs.clean
        setting = Setting(
            model=self._model, places=self._places, clean=clean, patch=None, keep=counting(clean),
            metric=bound(log_probability(), self._model, pairs), baseline="zero_keep_error", note="",
        )  # fmt: skip
        every = torch.arange(len(clean), device=clean.ids.device)
        acts, slopes = clean_pass(setting, every, reads_of(self._places))

        def of(place: Place, some: slice, acts: Tensor, token: Tensor, feature: Tensor) -> Tensor:
            return -acts[token, feature] * dots(place.basis, slopes[place.site][some], token, feature)

        read = {p.read: precise(acts.flat(p.read).detach()[setting.keep]) for p in self._places}
        return self._of_features(setting.keep, read, of)

    def _activations(self, pairs: Pairs) -> _Entries:
        keep = counting(pairs.clean)
        with torch.no_grad():
            acts = self._model.capture(pairs.clean, reads_of(self._places))

        def of(place: Place, _: slice, acts: Tensor, token: Tensor, feature: Tensor) -> Tensor:
            return acts[token, feature] * self._norms[place.site].to(acts)[feature]

        return self._of_features(keep, {p.read: precise(acts.flat(p.read)[keep]) for p in self._places}, of)

    @torch.no_grad()
    def _of_features(
        self, keep: Bool[Tensor, "batch pos"], read: Mapping[str, Float[Tensor, "tokens d"]],
        values: Callable[[Place, slice, Tensor, Tensor, Tensor], Tensor],
    ) -> _Entries:  # fmt: skip
        """Entries of active features, summed over the tokens of each sample, the strongest of each sample."""
        row_of = keep.nonzero()[:, 0]
        rows, columns, found, start = [], [], [], 0
        for place in self._places:
            x, basis = read[place.read], place.basis
            for some in _slices(basis, len(x)):
                acts = basis.coefficients(x[some])
                token, feature = acts.nonzero(as_tuple=True)
                value = values(place, some, acts, token, feature)
                row = row_of[some][token.to(row_of.device)]
                row, _, feature, value = aggregated(
                    row.cpu(), torch.zeros_like(row).cpu(), feature.cpu(), value.cpu(), basis.d_sae, "sum", row
                )  # fmt: skip
                rows.append(row)
                columns.append(feature + start)
                found.append(value)
            start += basis.d_sae
        row, column, value = _added(torch.cat(rows), torch.cat(columns), torch.cat(found), start)
        whole = float((value.double() ** 2).sum())
        strong = _strongest(row, value, self._options.per_sample)
        return _Entries(row[strong], column[strong], value[strong].float(), whole)

    def _last(self, pairs: Pairs) -> _Entries:
        with torch.no_grad():
            acts = self._model.capture(pairs.clean, self._dense)
        return _full(torch.cat([precise(acts.flat(site)[:, -1]).cpu() for site in self._dense], dim=1))

    def _gradients(self, pairs: Pairs) -> _Entries:
        assert self._sketch is not None
        return _full(self._sketch.of(pairs))


def _slices(basis: Basis, n: int) -> Iterator[slice]:
    step = max(1, CHUNK_ENTRIES // basis.d_sae)
    return (slice(start, min(n, start + step)) for start in range(0, max(n, 1), step))


def _added(row: Tensor, column: Tensor, value: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of the same row and column added up, which lie in several slices of tokens."""
    key, which = torch.unique(row * width + column, return_inverse=True)
    return key // width, key % width, value.new_zeros(len(key)).index_add_(0, which, value)


def _strongest(row: Int[Tensor, " m"], value: Float[Tensor, " m"], most: int) -> Int[Tensor, " kept"]:
    """The entries of largest absolute value of each row, in the order of rows."""
    order = value.abs().argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    _, counts = torch.unique_consecutive(row[order], return_counts=True)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return order[torch.arange(len(order)) - first < most]


def _full(x: Float[Tensor, "rows width"]) -> _Entries:
    """Every entry of some rows."""
    n, width = x.shape
    row, column = torch.arange(n).repeat_interleave(width), torch.arange(width).repeat(n)
    return _Entries(row, column, x.float().flatten(), float((x.double() ** 2).sum()))


def _centred(x: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Rows without the mean of all, each site scaled so that its mean squared norm is 1."""
    out, start = x - x.mean(0), 0
    for width in widths:
        part = out[:, start : start + width]
        part /= max(float(np.sqrt((part.astype(np.float64) ** 2).sum(1).mean())), 1e-30)
        start += width
    return out
