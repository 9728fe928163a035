"""Communities of a graph by the Leiden algorithm, which the library leidenalg has."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from workbench.core.errors import MissingFileError


def leiden(
    n: int,
    edges: Int[np.ndarray, "edges 2"],
    *,
    who: str,
    instead: str,
    weights: Float[np.ndarray, " edges"] | None = None,
    resolution: float = 1.0,
    seed: int = 0,
) -> Int[np.ndarray, " n"]:
    """Number of the community of each vertex, from 0.

    Args:
        n: number of vertices.
        edges: pairs of vertices, each once.
        who: what needs it, for the error.
        instead: what does without it.
        weights: of the edges; None weighs all alike.
        resolution: more gives more and smaller communities.
        seed: of the order in which vertices are visited.

    Raises:
        MissingFileError: if leidenalg is not installed.

    Source: Traag et al. 2019 (arXiv 1810.08473).
    """
    try:
        import igraph
        import leidenalg
    except ImportError as error:
        raise MissingFileError(
            f"{who} needs the libraries leidenalg and igraph ({error}). Install them with "
            f"`pip install interp-workbench[search]`, or use {instead}."
        ) from error
    graph: Any = igraph.Graph(n=n, edges=edges)  # igraph has no types
    partition = leidenalg.find_partition(
        graph, leidenalg.RBConfigurationVertexPartition, weights=None if weights is None else weights.tolist(),
        resolution_parameter=resolution, seed=seed,
    )  # fmt: skip
    return np.asarray(partition.membership, dtype=np.int64)
