"""Faithfulness that a stopped run does not measure again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from circuits.faithful.measure import Ablation, Errors, Faithfulness
from workbench.core.stats import Estimate
from workbench.engine.job import Made
from workbench.engine.keeper import Keeper

_ARRAYS = ("full", "empty", "kept")


@dataclass(frozen=True, kw_only=True)
class _Header:
    value: Estimate
    n_features: int
    n_errors: int
    ablation: Ablation
    errors: Errors
    complement: bool
    metric: str


def once(keep: Keeper, name: str, make: Callable[[], Faithfulness]) -> Faithfulness:
    """The kept result of this name, or the one that `make` returns, which is kept."""
    part = name.replace(" ", "-").replace(",", "")
    if not keep.has(part):
        f = make()
        header = _Header(
            value=f.value, n_features=f.n_features, n_errors=f.n_errors, ablation=f.ablation, errors=f.errors,
            complement=f.complement, metric=f.metric,
        )  # fmt: skip
        keep.put(part, Made(header, {array: getattr(f, array) for array in _ARRAYS}))
    header, tensors = keep.value(part, _Header), keep.tensors(part)
    return Faithfulness(
        value=header.value, n_features=header.n_features, n_errors=header.n_errors, ablation=header.ablation,
        errors=header.errors, complement=header.complement, metric=header.metric,
        full=tensors["full"], empty=tensors["empty"], kept=tensors["kept"],
    )  # fmt: skip
