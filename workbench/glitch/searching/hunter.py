"""GlitchHunter: glitch tokens lie together in embedding space, so clusters are sampled and the clean ones dropped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.errors import DegenerateInputError, ShapeError, require
from workbench.core.leiden import leiden
from workbench.core.numbers import counted
from workbench.core.progress import task, track
from workbench.glitch.searching.oracle import Asker, Found, Oracle

_BLOCK = 2048
_DISTANCES = 1 << 26
"""Distances held at a time: 256 MB whatever the size of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class HunterOptions:
    """How clusters are made and sampled.

    Attributes:
        components: principal components of the input rows that distances are measured in.
        neighbours: edges from each token to its nearest ones.
        resolution: of the communities (RBConfiguration); the higher, the smaller they are.
        at_least: smallest sample of a cluster, unless the cluster is smaller.
        keep_above: a cluster is kept if more than this share of its sample are glitch tokens.
        max_rounds: rounds after which the members are tested even if the set still shrinks.
    """

    components: int = 50
    neighbours: int = 50
    resolution: float = 75.0
    share: float = 0.1
    at_least: int = 5
    at_most: int = 50
    keep_above: float = 0.0
    max_rounds: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.components, self.neighbours, self.at_least, self.max_rounds)
        is_valid = min(counts) >= 1 and self.at_most >= self.at_least and self.resolution > 0
        is_valid &= 0 < self.share <= 1 and 0 <= self.keep_above < 1
        rule = (
            "components, neighbours, at_least and max_rounds are at least 1, at_most is at least at_least, resolution "
            "is above 0, share lies in (0, 1], keep_above in [0, 1)."
        )
        require(is_valid, self, rule)

    def sample_size(self, size: int) -> int:
        """Tokens of a cluster that are tested.

        >>> [HunterOptions().sample_size(size) for size in (3, 40, 200, 900)]
        [3, 5, 20, 50]
        """
        return min(size, max(self.at_least, int(min(self.share * size, self.at_most))))


def hunt(
    rows: Float[Tensor, "d_vocab d_model"], ids: np.ndarray, oracle: Oracle, options: HunterOptions | None = None
) -> Found:
    """Clusters input embeddings, samples, drops clean clusters and repeats until none is dropped; then tests the rest.

    Raises:
        DegenerateInputError: if there are fewer than two tokens.
        ShapeError: if an id has no row.

    Source: GlitchHunter (Li and others 2024, arXiv 2404.09894) with the parameters of its reproduction in
    GlitchMiner. Departs from it in two points: real Leiden communities on an unweighted graph of nearest neighbours,
    and one oracle in place of three chat questions.
    """
    options = options or HunterOptions()
    current = np.unique(np.asarray(ids, dtype=np.int64))
    if len(current) < 2:
        raise DegenerateInputError(f"hunt: {counted(len(current), 'tokens')} can't be clustered. Give at least two.")
    if current[0] < 0 or current[-1] >= len(rows):
        raise ShapeError(f"hunt: ids from {current[0]} to {current[-1]}, but the embedding has {len(rows)} rows.")
    asker, rng, notes = Asker(oracle), np.random.default_rng(options.seed), []
    for turn in range(1, options.max_rounds + 1):
        member = communities(rows[torch.from_numpy(current)], options)
        kept = _kept(current, member, asker, rng, options)
        n_clusters = int(member.max()) + 1
        notes.append(
            f"round {turn}: {counted(len(current), 'tokens')} in {counted(n_clusters, 'clusters')}; "
            f"{counted(len(kept), 'tokens')} kept"
        )
        shrunk, current = len(kept) < len(current), kept
        if not shrunk or len(current) < 2:
            break
    more = int((~asker.knows(current)).sum())
    asker(current)
    notes.append(f"the {counted(len(current), 'members')} tested one by one: {counted(more, 'calls')} more")
    return asker.found("hunter", notes=notes)


def _kept(
    current: np.ndarray, member: np.ndarray, asker: Asker, rng: np.random.Generator, options: HunterOptions
) -> np.ndarray:
    order = np.argsort(member, kind="stable")
    clusters = np.split(current[order], np.flatnonzero(np.diff(member[order])) + 1)
    samples = [rng.choice(ids, options.sample_size(len(ids)), replace=False) for ids in clusters]
    labels = np.split(asker(np.concatenate(samples)), np.cumsum([len(sample) for sample in samples])[:-1])
    kept = [ids for ids, glitch in zip(clusters, labels, strict=True) if glitch.mean() > options.keep_above]
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, dtype=np.int64)


def communities(rows: Float[Tensor, "n d_model"], options: HunterOptions) -> np.ndarray:
    """Number of the Leiden community of each row, from 0.

    Raises:
        DegenerateInputError: if a row is not finite.
        MissingFileError: if leidenalg is not installed.
    """
    edges = nearest_pairs(principal_components(rows, options.components), options.neighbours)
    with task(total=None, description=f"communities of {counted(len(rows), 'tokens')}", unit="steps"):
        return leiden(
            len(rows), edges, who="The hunter", instead="another search", resolution=options.resolution,
            seed=options.seed,
        )  # fmt: skip


def principal_components(rows: Float[Tensor, "n d_model"], k: int) -> Float[Tensor, "n k"]:
    """Coordinates of the centred rows along their first principal components; fp32, block by block.

    >>> principal_components(torch.tensor([[0.0, 1.0], [4.0, 1.0]]), 1).abs()  # along x, 2 from the mean
    tensor([[2.],
            [2.]])
    """
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows).all(1)).sum())
        raise DegenerateInputError(f"{bad} of {len(rows)} rows are not finite. Leave these tokens out of the search.")
    blocks, scatter = rows.split(_BLOCK), torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0).cpu() / len(rows)
    for block in blocks:
        centred = block.double().cpu() - mean
        scatter += centred.T @ centred
    axes = torch.linalg.eigh(scatter).eigenvectors.flip(1)[:, : min(k, *rows.shape)].float()
    return torch.cat([(block.float().cpu() - mean.float()) @ axes for block in blocks])


def nearest_pairs(x: Float[Tensor, "n k"], neighbours: int) -> Int[np.ndarray, "edges 2"]:
    """Every pair of rows of which one is among the nearest neighbours of the other, once; by Euclidean distance.

    >>> nearest_pairs(torch.tensor([[0.0], [1.0], [5.0]]), 1).tolist()  # 0-1 both ways, 5 is nearest to 1
    [[0, 1], [1, 2]]
    """
    n, k = len(x), min(neighbours, len(x) - 1)
    square = (x * x).sum(1)
    near = np.empty((n, k), dtype=np.int64)
    size = max(1, min(_BLOCK, _DISTANCES // n))
    distances = torch.empty(min(size, n), n, dtype=x.dtype)
    for start in track(range(0, n, size), description=f"neighbours of {counted(n, 'tokens')}", unit="blocks"):
        block = x[start : start + size]
        distance = torch.addmm(square, block, x.T, alpha=-2, out=distances[: len(block)])
        here = torch.arange(len(block))
        distance[here, start + here] = torch.inf
        near[start : start + len(block)] = distance.topk(k, largest=False).indices.numpy()
    own = np.arange(n)[:, None]
    pairs = np.unique(np.minimum(own, near) * n + np.maximum(own, near))
    return np.stack(np.divmod(pairs, n), 1)
