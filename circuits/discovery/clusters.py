"""Behaviours that nobody named: clusters of confident predictions that the model makes in the same way.

Source: Marks et al. 2024 (arXiv 2403.19647), section 5, after Michaud et al. 2023.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from jaxtyping import Int

from circuits.discovery.agreement import Stability, stability
from circuits.discovery.grouping import METHODS, ClusterMethod, Grouping, units
from circuits.discovery.samples import SampleOptions, Samples, find_samples
from circuits.discovery.splitting import Splits, split_clusters
from circuits.discovery.vectors import OF_FEATURES, SampleVectors, VectorKind, VectorOptions, sample_vectors
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, require
from workbench.core.html import Shown
from workbench.core.numbers import counted
from workbench.core.similarity import SparseMatrix
from workbench.core.tokenizer import decoded
from workbench.engine.keeper import Keeper
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd

MIN_SAMPLES = 4
_SHOWN_CONTEXT = 60


@checked
@dataclass(frozen=True, kw_only=True)
class DiscoveryOptions(OneLine):
    """How behaviours are looked for.

    Attributes:
        samples: which predictions are samples, where texts are given.
        vectors: how vectors are made.
        neighbours: of each sample in the graph of spectral clustering and Leiden.
        min_size: members of a cluster that counts, and of a part of one that is split.
        resamples: for the stability of clusters; 0 leaves it out.
        split: whether clusters that hold two mechanisms are split; only where vectors are made of features.
        seed: of starts, halves and resamples.
    """

    samples: SampleOptions = field(default_factory=SampleOptions)
    vectors: VectorOptions = field(default_factory=VectorOptions)
    neighbours: int = 15
    min_size: int = 4
    resamples: int = 5
    split: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.neighbours >= 1, f"DiscoveryOptions(neighbours={self.neighbours})", "it must be at least 1")
        require(self.min_size >= 2, f"DiscoveryOptions(min_size={self.min_size})", "it must be at least 2")
        require(
            self.resamples == 0 or self.resamples >= 2, f"DiscoveryOptions(resamples={self.resamples})",
            "an interval needs at least 2; 0 leaves it out",
        )  # fmt: skip


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Behaviours(Shown):
    """Clusters of samples, the largest first.

    Attributes:
        samples: all samples.
        vectors: what they were compared by.
        labels: number of the cluster of each sample.
        method: how they were clustered.
        min_size: members of a cluster that counts; `clusters` lists these.
        stability: agreement with resamples; None if it was not asked for. It is of the clusters before any split.
        before: number of each sample's cluster before clusters were split.
        splits: what the rule for mixed clusters did; None if it was not applied.
    """

    how_to_make: ClassVar[str] = "circuits.find_behaviours(model, texts, bases) finds behaviours."
    samples: Samples
    vectors: SampleVectors
    labels: Int[np.ndarray, " samples"]
    method: ClusterMethod
    min_size: int
    stability: Stability | None
    before: Int[np.ndarray, " samples"]
    splits: Splits | None

    @property
    def clusters(self) -> list[int]:
        """Numbers of the clusters that have enough members."""
        return [int(c) for c in np.flatnonzero(np.bincount(self.labels) >= self.min_size)]

    def members(self, cluster: int) -> list[int]:
        """The samples of a cluster, those nearest to its centre first.

        Raises:
            InvalidInputError: if there is no such cluster.
        """
        rows = np.flatnonzero(self.labels == cluster)
        if not len(rows):
            raise InvalidInputError(
                f"members({cluster}): there are clusters 0 to {int(self.labels.max())}. Choose one of them."
            )
        unit = units(self.vectors.matrix[rows])
        near = (unit @ np.asarray(unit.sum(0)).ravel()).round(9)  # so that equal ones keep their order
        return rows[np.argsort(-near, kind="stable")].tolist()

    def cluster(self, cluster: int) -> Samples:
        """The samples of a cluster, those nearest to its centre first."""
        return self.samples.chosen(self.members(cluster))

    def coherence(self, cluster: int) -> float:
        """Mean cosine between two members; nan for a single one."""
        unit = units(self.vectors.matrix[np.flatnonzero(self.labels == cluster)])
        n, norm = unit.shape[0], float((np.asarray(unit.sum(0)) ** 2).sum())
        own = float(unit.multiply(unit).sum())
        return (norm - own) / (n * (n - 1)) if n > 1 else float("nan")

    def answers(self, cluster: int) -> list[tuple[str, int]]:
        """Tokens that the cluster's samples are answered with, and how often, the commonest first."""
        ids = self.samples.answers[torch.as_tensor(np.flatnonzero(self.labels == cluster))].tolist()
        return [(self.text([token]), n) for token, n in Counter(ids).most_common()]

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        tokenizer = self.samples.contexts.tokenizer
        return str(list(ids)) if tokenizer is None else decoded(tokenizer, list(ids))

    def frame(self) -> pd.DataFrame:
        """One row per cluster that counts: cluster, n, documents, answer, share, coherence, jaccard, context.

        `answer` is the commonest one and `share` its share; `coherence` the mean cosine between members; `jaccard` the
        overlap with resamples and `jaccard_null` that with shuffled ones (of the cluster before it was split);
        `context` ends the context of the sample nearest to the centre.
        """
        import pandas as pd

        return pd.DataFrame(list(self._rows()))

    def _rows(self) -> Iterator[Mapping[str, object]]:
        for c in self.clusters:
            members, answers = self.members(c), self.answers(c)
            parent = int(self.before[members[0]])
            row: dict[str, object] = {
                "cluster": c, "n": len(members), "documents": len(set(self.samples.documents[members].tolist())),
                "answer": answers[0][0], "share": answers[0][1] / len(members), "coherence": self.coherence(c),
            }  # fmt: skip
            if self.stability is not None:
                row |= {
                    "jaccard": float(self.stability.jaccard[parent]),
                    "jaccard_null": float(self.stability.jaccard_null[parent]),
                }
            context = self.samples.contexts.rows()[members[0]].tolist()
            yield {**row, "context": self.text(context)[-_SHOWN_CONTEXT:]}

    def _shown_line(self) -> str:
        inside = int(np.isin(self.labels, self.clusters).sum())
        line = (
            f"{counted(len(self.clusters), 'clusters')} of at least {self.min_size} members hold {inside} of "
            f"{counted(len(self.samples), 'samples')}; {METHODS[self.method]} of {self.vectors.kind}"
        )
        return line if self.stability is None else f"{line}; {self.stability._shown_line()}"


@checked
def find_behaviours(
    model: Model,
    corpus: Samples | Iterable[str],
    bases: Mapping[str, AnySAE] | None = None,
    *,
    vectors: VectorKind = "effects",
    cluster: ClusterMethod = "spectral",
    k: int | None = None,
    sites: Sequence[str] = (),
    options: DiscoveryOptions | None = None,
    folder: str | Path | None = None,
) -> Behaviours:
    """Clusters of confident predictions that the model makes in the same way.

    Args:
        model: the model.
        corpus: samples from `find_samples`, or texts to look for them in.
        bases: a basis per site, for "effects" and "activations".
        vectors: what two predictions are compared by: "effects" of features on the answer, "activations" of features,
            "dense" activations, or "gradients" of weights.
        cluster: "spectral", "kmeans" (spherical), or "leiden".
        k: number of clusters; None tries several and takes that with most clusters of at least `min_size` members;
            Leiden then takes its own number.
        sites: where dense activations are read.
        options: the rest.
        folder: keeps finished vectors, so that a stopped call continues when it is given again.

    Raises:
        InvalidInputError: for an unknown word, features without bases, or more clusters than samples.
        DegenerateInputError: if there are fewer than 4 samples.
        MissingFileError: for "leiden" without leidenalg.
        MismatchError: if the folder holds vectors of something else.
    """
    options = options or DiscoveryOptions()
    if cluster not in METHODS:
        raise InvalidInputError(f"find_behaviours(cluster={cluster!r}): it is one of {', '.join(METHODS)}.")
    samples = corpus if isinstance(corpus, Samples) else find_samples(model, corpus, options=options.samples)
    if len(samples) < MIN_SAMPLES:
        raise DegenerateInputError(
            f"find_behaviours: {counted(len(samples), 'samples')} make no clusters. Give at least {MIN_SAMPLES}: more "
            "text, or a larger loss_max."
        )
    given = {"kind": vectors, "sites": sites, "options": options.vectors}
    if folder is None:
        made = sample_vectors(model, samples, bases, **given)  # type: ignore[arg-type]
    else:
        with Keeper.open(folder, vectors_key(model, samples, bases, vectors, sites, options.vectors)) as keep:
            made = sample_vectors(model, samples, bases, keep=keep, **given)  # type: ignore[arg-type]
    return clustered(samples, made, cluster, k, options)


def vectors_key(
    model: Model, samples: Samples, bases: Mapping[str, AnySAE] | None, kind: str, sites: Sequence[str],
    options: VectorOptions,
) -> Mapping[str, object]:  # fmt: skip
    """What kept vectors depend on."""
    from circuits.decomposition import bases as checked_bases

    placed = checked_bases(model, bases) if bases else {}
    return {
        "model": model.fingerprint, "kind": kind, "sites": list(sites), "options": dataclasses.asdict(options),
        "bases": {site: basis.fingerprint for site, basis in placed.items()},
        "samples": samples.fingerprint,
    }  # fmt: skip


def clustered(
    samples: Samples, vectors: SampleVectors, method: ClusterMethod, k: int | None, options: DiscoveryOptions
) -> Behaviours:
    """The clusters of samples whose vectors are made."""
    o = options
    grouping = Grouping(method=method, k=k, neighbours=o.neighbours, min_size=o.min_size, seed=o.seed)
    before = grouping.labels(vectors.matrix)
    stable, splits, labels = None, None, before
    if o.resamples:
        # of a resample as many clusters are asked for as there are of all samples
        fixed = dataclasses.replace(grouping, k=k if method == "leiden" else int(before.max()) + 1)
        stable = stability(
            vectors.matrix, before, samples.documents.tolist(), lambda some: _few(fixed, some), resamples=o.resamples,
            seed=o.seed,
        )  # fmt: skip
    if o.split and vectors.kind in OF_FEATURES:
        labels, splits = split_clusters(vectors.matrix, before, o.min_size, o.seed)
    return Behaviours(
        samples=samples, vectors=vectors, labels=labels, method=method, min_size=o.min_size, stability=stable,
        before=before, splits=splits,
    )  # fmt: skip


def _few(grouping: Grouping, some: SparseMatrix) -> Int[np.ndarray, " n"]:
    """Labels of a resample, which may have fewer samples than clusters are asked for."""
    k = grouping.k if grouping.k is None else min(grouping.k, some.shape[0])
    return dataclasses.replace(grouping, k=k).labels(some)
