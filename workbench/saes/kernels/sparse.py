"""Feature activations in sparse form (CSR): rows of any length, no tensor of shape `[rows, d_sae]`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from workbench.core.display import OneLine

ENTRIES_PER_CHUNK = 2**16


@dataclass(frozen=True)
class SparseActs(OneLine):
    """Feature activations of some tokens; an entry may be zero where fewer than k pre-activations were positive.

    Attributes:
        offsets: where the entries of each token begin, and where the last ends.
        indices: feature of each entry.
        values: its activation, not negative.
        d_sae: number of features.
    """

    offsets: Int[Tensor, " rows_plus_1"]
    indices: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    d_sae: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of_rows(cls, indices: Int[Tensor, "rows k"], values: Float[Tensor, "rows k"], d_sae: int) -> SparseActs:
        """Activations with the same number of entries in each row."""
        rows, k = indices.shape
        offsets = torch.arange(0, rows * k + 1, k, device=indices.device)
        return cls(offsets, indices.flatten(), values.flatten(), d_sae)

    @classmethod
    def of_dense(cls, acts: Float[Tensor, "rows d_sae"]) -> SparseActs:
        """The entries that are not zero.

        >>> SparseActs.of_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).offsets
        tensor([0, 1, 1])
        """
        mask = acts != 0
        rows, indices = mask.nonzero(as_tuple=True)
        offsets = torch.zeros(len(acts) + 1, dtype=torch.long, device=acts.device)
        offsets[1:] = mask.sum(1).cumsum(0)
        return cls(offsets, indices, acts[rows, indices], acts.shape[1])

    def with_values(self, values: Float[Tensor, " entries"]) -> SparseActs:
        """The same entries with other values."""
        return SparseActs(self.offsets, self.indices, values, self.d_sae)

    def rows(self) -> Int[Tensor, " entries"]:
        """Row of each entry."""
        counts = self.offsets.diff()
        numbers = torch.arange(len(self), device=counts.device)
        return numbers.repeat_interleave(counts, output_size=len(self.indices))

    def between(self, start: int, stop: int) -> SparseActs:
        """The activations of features `start` to `stop`, counted from `start`.

        >>> acts = SparseActs.of_dense(torch.tensor([[1.0, 2.0, 3.0]]))
        >>> acts.between(1, 3).dense()
        tensor([[2., 3.]])
        """
        kept = (self.indices >= start) & (self.indices < stop)
        before = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])
        return SparseActs(before[self.offsets], self.indices[kept] - start, self.values[kept], stop - start)

    def dense(self) -> Float[Tensor, "rows d_sae"]:
        """All activations, zeros included; for tests and small inputs."""
        out = self.values.new_zeros(len(self), self.d_sae)
        return out.index_put_((self.rows(), self.indices), self.values, accumulate=True)

    def decode(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "rows d_out"]:
        """`sum_j a_j W_dec[j]` per row, without the decoder bias.

        >>> SparseActs.of_dense(torch.tensor([[0.0, 2.0]])).decode(torch.tensor([[1.0], [3.0]]))  # 2 * 3
        tensor([[6.]])
        """
        return embedding_bag(
            self.indices, W_dec, self.offsets[:-1], per_sample_weights=self.values.to(W_dec.dtype), mode="sum"
        )

    def products(self, x: Float[Tensor, "rows d_in"], W: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " entries"]:
        """The dot products `x[row] . W[feature]` of the entries, and only those; the values are not used.

        >>> SparseActs.of_dense(torch.tensor([[0.0, 1.0]])).products(torch.tensor([[1.0, 2.0]]), torch.eye(2))
        tensor([2.])
        """
        if x.device.type in ("cpu", "cuda") and x.dtype in (torch.float32, torch.float64):
            pattern = _csr(self, torch.zeros(len(self.indices), dtype=x.dtype, device=x.device))
            return torch.sparse.sampled_addmm(pattern, x, W.t(), beta=0.0).values()
        rows, parts = self.rows(), []
        for start in range(0, len(rows), ENTRIES_PER_CHUNK):
            some = slice(start, start + ENTRIES_PER_CHUNK)
            parts.append((x[rows[some]] * W[self.indices[some]]).sum(1))
        return torch.cat(parts) if parts else x.new_zeros(0)

    def by_feature(self) -> FeatureLists:
        """The same entries ordered by feature; one sort serves every sum over tokens."""
        order = _stable_argsort(self.indices, self.d_sae)
        offsets = torch.zeros(self.d_sae + 1, dtype=torch.long, device=order.device)
        if order.device.type == "cpu":
            torch.cumsum(torch.bincount(self.indices, minlength=self.d_sae), 0, out=offsets[1:])
        else:
            # Counting by atomics or by bincount would add in any order, or make the device wait.
            features = torch.arange(1, self.d_sae + 1, device=order.device)
            offsets[1:] = torch.searchsorted(self.indices[order], features)
        return FeatureLists(order, self.rows()[order], offsets)


@dataclass(frozen=True)
class FeatureLists(OneLine):
    """The tokens of each feature: the transpose of a `SparseActs`. Sums do not depend on thread timing.

    Attributes:
        order: position of each entry in the `SparseActs` it was made from.
        rows: its token.
        offsets: where the entries of each feature begin, and where the last ends.
    """

    order: Int[Tensor, " entries"]
    rows: Int[Tensor, " entries"]
    offsets: Int[Tensor, " d_sae_plus_1"]

    def weighted_sum(
        self, values: Float[Tensor, " entries"], x: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """Row f holds the sum over the tokens of feature f of `value * x[token]`; `values` in the order of the rows."""
        weights = values[self.order]
        return embedding_bag(self.rows, x, self.offsets[:-1], per_sample_weights=weights, mode="sum")

    def sum(self, values: Float[Tensor, " entries"]) -> Float[Tensor, " d_sae"]:
        """Entry f holds the sum of the values of feature f."""
        return torch.segment_reduce(values[self.order], "sum", offsets=self.offsets)


@runtime_checkable
class Products(Protocol):
    """The three products of a sparse step, which a kernel may compute in its own way."""

    def decode(self, acts: SparseActs, W_dec: Tensor) -> Tensor:
        """See `SparseActs.decode`."""
        ...

    def dots(self, acts: SparseActs, x: Tensor, W: Tensor) -> Tensor:
        """See `SparseActs.products`."""
        ...

    def sums(self, acts: SparseActs, lists: FeatureLists, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """`FeatureLists.weighted_sum` of each pair of values and rows."""
        ...


@dataclass(frozen=True)
class SparseProducts:
    """The products in CSR form: work in proportion to the number of entries."""

    def decode(self, acts: SparseActs, W_dec: Tensor) -> Tensor:
        """See `SparseActs.decode`."""
        return acts.decode(W_dec)

    def dots(self, acts: SparseActs, x: Tensor, W: Tensor) -> Tensor:
        """See `SparseActs.products`."""
        return acts.products(x, W)

    def sums(self, acts: SparseActs, lists: FeatureLists, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """See `FeatureLists.weighted_sum`."""
        del acts
        return [lists.weighted_sum(values, x) for values, x in pairs]


@dataclass(frozen=True)
class DenseProducts:
    """The products as dense matrix products of `dtype` with fp32 results, for devices on which those cost less.

    On a GPU a dense bf16 product beats gathering while d_sae / k is below roughly 128; that figure is an estimate from
    memory bandwidth and has not been measured here. Rows are taken in chunks, so memory stays `chunk * d_sae`.
    """

    dtype: torch.dtype = torch.bfloat16
    chunk: int = 8192

    def decode(self, acts: SparseActs, W_dec: Tensor) -> Tensor:
        """See `SparseActs.decode`."""
        W = W_dec.to(self.dtype)
        parts = [(part.to(self.dtype) @ W).to(W_dec.dtype) for _, part in self._parts(acts, acts.values)]
        return torch.cat(parts)

    def dots(self, acts: SparseActs, x: Tensor, W: Tensor) -> Tensor:
        """See `SparseActs.products`."""
        x_low, W_low, rows = x.to(self.dtype), W.to(self.dtype).t(), acts.rows()
        found = torch.empty(len(rows), dtype=x.dtype, device=x.device)
        for start in range(0, len(acts), self.chunk):
            stop = min(start + self.chunk, len(acts))
            some = slice(int(acts.offsets[start]), int(acts.offsets[stop]))
            found[some] = (x_low[start:stop] @ W_low)[rows[some] - start, acts.indices[some]].to(x.dtype)
        return found

    def sums(self, acts: SparseActs, lists: FeatureLists, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """See `FeatureLists.weighted_sum`."""
        del lists
        found = []
        for values, x in pairs:
            total = x.new_zeros(acts.d_sae, x.shape[1])
            for rows, part in self._parts(acts, values):
                total.add_(part.to(self.dtype).t() @ x[rows].to(self.dtype))
            found.append(total)
        return found

    def _parts(self, acts: SparseActs, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        whole = acts.with_values(values)
        for start in range(0, len(acts), self.chunk):
            some = slice(start, min(start + self.chunk, len(acts)))
            yield some, _rows(whole, some).dense()


def _rows(acts: SparseActs, some: slice) -> SparseActs:
    offsets = acts.offsets[some.start : some.stop + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    return SparseActs(offsets - first, acts.indices[first:last], acts.values[first:last], acts.d_sae)


def _csr(acts: SparseActs, values: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # torch announces once per process that the CSR layout is in beta.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return torch.sparse_csr_tensor(
            acts.offsets, acts.indices, values, (len(acts), acts.d_sae), check_invariants=False
        )


def _stable_argsort(indices: Tensor, size: int) -> Tensor:
    """Stable order of integers below `size`."""
    if indices.device.type != "cpu" or size > 2**32:
        return indices.argsort(stable=True)
    # numpy sorts 16-bit keys by radix, about a hundred times faster than torch sorts integers.
    keys = indices.numpy()
    order = np.argsort(keys.astype(np.uint16), kind="stable")
    if size > 2**16:
        order = order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]
    return torch.from_numpy(order)
