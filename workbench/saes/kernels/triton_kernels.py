"""Sparse products on a GPU in Triton: checked in Triton's interpreter, never yet run or timed on a GPU.

One program computes one row or one feature and walks its entries in order, so sums over tokens need no atomics and
repeat to the bit.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.core.errors import ResourceError
from workbench.saes.kernels.sparse import FeatureLists, SparseActs

WIDEST_BLOCK = 1024


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


if has_triton():
    # Triton is not among the dependencies, so its types are not known where this is checked.
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
    constexpr = tl.constexpr

    @triton.jit
    def _gather_sum(offsets, indices, values, W, out, width: Any, block: constexpr):  # noqa: ANN001, ANN202
        """Row i of `out` is the sum over its entries of `value * W[index]`, for one block of columns."""
        row = tl.program_id(0)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        inside = columns < width
        total = tl.zeros((block,), dtype=out.dtype.element_ty)
        for entry in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
            source = tl.load(indices + entry) * width + columns
            total += tl.load(values + entry) * tl.load(W + source, mask=inside, other=0.0)
        tl.store(out + row * width + columns, total, mask=inside)

    @triton.jit
    def _gather_sum_two(  # noqa: ANN202
        offsets,
        rows,
        v1,
        x1,
        out1,
        v2,
        x2,
        out2,
        width1: Any,
        width2: Any,
        block: constexpr,  # noqa: ANN001
    ):
        """The sums of both weight gradients of one feature in one walk over its tokens."""
        feature = tl.program_id(0)
        columns = tl.program_id(1) * block + tl.arange(0, block)
        inside1, inside2 = columns < width1, columns < width2
        total1 = tl.zeros((block,), dtype=out1.dtype.element_ty)
        total2 = tl.zeros((block,), dtype=out2.dtype.element_ty)
        for entry in range(tl.load(offsets + feature), tl.load(offsets + feature + 1)):
            row = tl.load(rows + entry)
            total1 += tl.load(v1 + entry) * tl.load(x1 + row * width1 + columns, mask=inside1, other=0.0)
            total2 += tl.load(v2 + entry) * tl.load(x2 + row * width2 + columns, mask=inside2, other=0.0)
        tl.store(out1 + feature * width1 + columns, total1, mask=inside1)
        tl.store(out2 + feature * width2 + columns, total2, mask=inside2)

    @triton.jit
    def _entry_dots(offsets, indices, x, W, out, width: Any, block: constexpr):  # noqa: ANN001, ANN202
        """The dot products of one row of `x` with the rows of `W` that its entries name."""
        row = tl.program_id(0)
        for entry in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
            source = tl.load(indices + entry) * width
            total = tl.zeros((block,), dtype=out.dtype.element_ty)
            for start in range(0, width, block):
                columns = start + tl.arange(0, block)
                inside = columns < width
                left = tl.load(x + row * width + columns, mask=inside, other=0.0)
                total += left * tl.load(W + source + columns, mask=inside, other=0.0)
            tl.store(out + entry, tl.sum(total, axis=0))


@dataclass(frozen=True)
class TritonProducts:
    """The sparse products as one program per row or feature."""

    def __post_init__(self) -> None:
        if not has_triton():
            raise ResourceError(
                "kernel='triton' needs Triton, which is not installed. Install it or take kernel='csr'."
            )

    def decode(self, acts: SparseActs, W_dec: Tensor) -> Tensor:
        """See `SparseActs.decode`."""
        width = W_dec.shape[1]
        out = torch.empty(len(acts), width, dtype=W_dec.dtype, device=W_dec.device)
        block = _block(width)
        grid = (len(acts), -(-width // block))
        values = acts.values.to(W_dec.dtype).contiguous()
        _gather_sum[grid](acts.offsets, acts.indices, values, W_dec.contiguous(), out, width, block)
        return out

    def dots(self, acts: SparseActs, x: Tensor, W: Tensor) -> Tensor:
        """See `SparseActs.products`."""
        out = torch.empty(len(acts.indices), dtype=x.dtype, device=x.device)
        width = x.shape[1]
        _entry_dots[(len(acts),)](acts.offsets, acts.indices, x.contiguous(), W.contiguous(), out, width, _block(width))
        return out

    def sums(self, acts: SparseActs, lists: FeatureLists, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """See `FeatureLists.weighted_sum`; two pairs share one walk over the tokens of a feature."""
        if len(pairs) != 2:
            return [self._sum(acts.d_sae, lists, values, x) for values, x in pairs]
        (v1, x1), (v2, x2) = pairs
        out1, out2 = (torch.empty(acts.d_sae, x.shape[1], dtype=x.dtype, device=x.device) for x in (x1, x2))
        widest = max(x1.shape[1], x2.shape[1])
        block = _block(widest)
        _gather_sum_two[(acts.d_sae, -(-widest // block))](
            lists.offsets, lists.rows, v1[lists.order], x1.contiguous(), out1, v2[lists.order], x2.contiguous(), out2,
            x1.shape[1], x2.shape[1], block,
        )  # fmt: skip
        return [out1, out2]

    def _sum(self, d_sae: int, lists: FeatureLists, values: Tensor, x: Tensor) -> Tensor:
        out, width = torch.empty(d_sae, x.shape[1], dtype=x.dtype, device=x.device), x.shape[1]
        block = _block(width)
        grid = (d_sae, -(-width // block))
        _gather_sum[grid](lists.offsets, lists.rows, values[lists.order], x.contiguous(), out, width, block)
        return out


def _block(width: int) -> int:
    """Columns per program: the next power of two, bounded by the registers."""
    return min(WIDEST_BLOCK, 1 << max(4, (width - 1).bit_length()))
