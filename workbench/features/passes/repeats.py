"""Finds documents of a store that repeat an earlier one: their tokens count, but they give no windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.activations.shardfile import read_tensor
from workbench.activations.store import ActivationStore
from workbench.features.passes.sampling import MISSING, mixed


def repeated_documents(store: ActivationStore, max_tokens: int | None = None) -> Int[Tensor, " n"]:
    """Numbers of the documents with the same tokens as an earlier one, by a 64-bit hash; special tokens do not count.

    Left-out tokens belong to the document of the next kept token of their row, so that a document is recognised
    wherever its rows begin.

    Args:
        store: the store.
        max_tokens: kept tokens to read, from the start of the store, rounded up to whole shards; None reads all.
    """
    special = np.array(store.manifest.special_ids, dtype=np.int64)
    seen, lengths, hashes, order = 0, {}, {}, []
    for shard in store.manifest.shards:
        columns = [read_tensor(store.folder, shard.file, key).numpy() for key in ("row", "position", "document")]
        ids = read_tensor(store.folder, shard.file, "token_rows").numpy().astype(np.int64)
        documents, ids = _document_of_each(ids, shard.first_row, columns, special)
        for document, part in _runs(documents, ids):
            if document not in hashes:
                order.append(document)
            start = lengths.get(document, 0)
            places = mixed(np.arange(start, start + len(part)).astype(np.uint64))
            total = mixed(part.astype(np.uint64) ^ places).sum(dtype=np.uint64)
            hashes[document] = (hashes.get(document, 0) + int(total)) % 2**64
            lengths[document] = start + len(part)
        seen += shard.kept
        if max_tokens is not None and seen >= max_tokens:
            break
    first: dict[tuple[int, int], int] = {}
    repeated = [d for d in order if first.setdefault((hashes[d], lengths[d]), d) != d]
    return torch.tensor(repeated, dtype=torch.long)


def _document_of_each(
    ids: np.ndarray, first_row: int, columns: Sequence[np.ndarray], special: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Document and id of each token that is not special, in order; rows without a kept token are left out."""
    row, position, document = columns
    known = np.full(ids.shape, MISSING, dtype=np.int64)
    known[row.astype(np.int64) - first_row, position] = document
    width = ids.shape[1]
    at = np.where(known != MISSING, np.arange(width), width)
    following = np.minimum.accumulate(at[:, ::-1], axis=1)[:, ::-1]
    last = np.where(known != MISSING, np.arange(width), MISSING).max(axis=1, keepdims=True)
    filled = np.take_along_axis(known, np.where(following < width, following, np.maximum(last, 0)), axis=1)
    chosen = (filled != MISSING) & ~np.isin(ids, special)
    return filled[chosen], ids[chosen]


def _runs(documents: np.ndarray, ids: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The tokens of each run of one document."""
    cuts = (np.diff(documents) != 0).nonzero()[0] + 1
    parts = np.split(ids, cuts)
    return [(int(d), part) for d, part in zip(documents[np.r_[0, cuts]], parts, strict=True)] if len(ids) else []
