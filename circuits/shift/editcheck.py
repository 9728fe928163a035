"""Ablation by plain torch hooks with the SAE's own encode and decode: a second path, to check the first against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.core.errors import EditError
from workbench.core.jsontext import Record
from workbench.core.numbers import number
from workbench.core.tokens import TokenBatch
from workbench.hooks.sites import Point
from workbench.models.model import Model


def allowed_difference(edit: float, x: float, dtypes: Iterable[torch.dtype]) -> float:
    """Largest difference between two computations of one edit that rounding explains.

    One rounding of the activations; of the edit 1 % and 16 roundings, because a feature near its threshold may be
    active in one computation and not in the other.

    Args:
        edit: norm of the edit.
        x: norm of the activations.
        dtypes: of the model and of the SAEs; the coarsest counts.

    >>> round(allowed_difference(1.0, 100.0, [torch.float32]), 6)  # 0.01 + 16 * 1.19e-7 + 1.19e-7 * 100
    0.010014
    """
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    return (0.01 + 16 * eps) * edit + eps * x


def require_same_edit(
    computed: Float[Tensor, "rows d"],
    run: Float[Tensor, "rows d"],
    x: Float[Tensor, "rows d"],
    dtypes: Iterable[torch.dtype],
) -> tuple[float, float]:
    """Difference between two computations of one edit and the difference allowed, both relative to the edit.

    Args:
        computed: edited activations.
        run: the same by another path.
        x: unedited activations.
        dtypes: of the model and of the SAEs.

    Raises:
        EditError: if they differ by more than rounding explains, or are not finite.
    """
    size, off = float((run - x).norm()), float((computed - run).norm())
    allowed = allowed_difference(size, float(x.norm()), dtypes)
    if not off <= allowed:
        raise EditError(
            "The ablation differs from the one made by plain hooks with the SAE's own encode and decode: by "
            f"{number(off)}, where the edit's norm is {number(size)} and rounding explains {number(allowed)}. Every "
            "number of the study would be wrong, so it ends here. Does the SAE decode as acts @ W_dec + b_dec, in the "
            "units of the activations or of its own input normalisation?"
        )
    return (off / size, allowed / size) if size else (0.0, 0.0)


@torch.no_grad()
def pooled_by_hooks(
    model: Model,
    batch: TokenBatch,
    keep: Bool[Tensor, "batch pos"],
    ablations: Mapping[str, tuple[Any, Sequence[int]]],
    read: str,
) -> Float[Tensor, "batch d"]:
    """Mean at a site over the kept tokens, with features set to zero at these tokens and each SAE's error kept.

    Shares nothing with interventions, plans and captures but the table of where sites are.

    Args:
        model: the model.
        batch: the rows.
        keep: the tokens that are edited and pooled.
        ablations: per site an SAE and its features.
        read: the site that is pooled.
    """
    pooled: list[Tensor] = []

    def pool(x: Tensor, columns: Tensor) -> None:
        chosen = keep.to(x.device)
        pooled.append(torch.stack([row[k][:, columns].float().mean(0) for row, k in zip(x, chosen, strict=True)]).cpu())

    with contextlib.ExitStack() as hooks:
        for site, (sae, features) in ablations.items():
            hooks.enter_context(_hooked(model.site_map[site], _ablation(sae, features, keep)))
        hooks.enter_context(_hooked(model.site_map[read], pool))
        model.hf(**batch.hf(), use_cache=False)
    return pooled[0]


def _ablation(sae: Any, features: Sequence[int], keep: Tensor) -> Callable[[Tensor, Tensor], None]:
    def ablate(x: Tensor, columns: Tensor) -> None:
        row, position = (index[:, None] for index in keep.to(x.device).nonzero(as_tuple=True))
        before = x[row, position, columns]
        read = before.to(getattr(sae, "W_dec", before.float()))
        if getattr(sae, "hook_z_reshaping_mode", False):
            read = read[:, None]  # sae_lens expects heads apart; one that is as wide as all of them will do
        kept = sae.decode(sae.encode(read)).flatten(1)
        without = sae.encode(read)  # again: an SAE that normalises decodes with what its last encode left behind
        without[:, list(features)] = 0.0
        change = sae.decode(without).flatten(1).float() - kept.float()
        # In place, so that the edit reaches whoever else holds this tensor, such as the sum around a sublayer.
        x[row, position, columns] = (before.float() + change.to(x.device)).to(x.dtype)

    return ablate


@contextlib.contextmanager
def _hooked(point: Point, fn: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `fn` with the module's tensor and the columns that are the site."""

    def call(x: Tensor) -> None:
        every = torch.arange(x.shape[-1], device=x.device)
        columns = every if point.columns is None else every[point.columns]
        if point.site.head is not None:
            columns = columns.view(point.heads or 1, -1)[point.site.head]
        fn(x, columns)

    def enter(_module: Any, args: tuple[Any, ...], kwargs: Record) -> None:
        call(args[0] if args else kwargs["hidden_states"])

    def leave(_module: Any, _args: Any, output: Any) -> None:
        call(output if isinstance(output, Tensor) else output[0])

    handle = (
        point.module.register_forward_pre_hook(enter, with_kwargs=True)
        if point.side == "in"
        else point.module.register_forward_hook(leave)
    )
    try:
        yield
    finally:
        handle.remove()
