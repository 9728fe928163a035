"""Ablation by plain torch hooks with the SAE's own encode and decode: a second path, to check the first against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import EditError
from workbench.hooks.sites import Point
from workbench.models.model import Model
from workbench.tokens import TokenBatch

SHARE_OF_EDIT = 0.01
"""Difference that is allowed, as a share of the edit: by rounding a feature may cross its threshold at a token."""
ROUNDINGS = 2.0
"""Difference that is allowed besides, in roundings of the model's dtype at the size of the activations."""


def allowed_difference(edit: float, x: float, dtype: torch.dtype) -> float:
    """Largest difference between two computations of one edit that rounding explains.

    Args:
        edit: norm of the edit.
        x: norm of the activations.
        dtype: of the model.

    >>> round(allowed_difference(1.0, 100.0, torch.float32), 6)  # 0.01 * 1 + 2 * 1.19e-7 * 100
    0.010024
    """
    return SHARE_OF_EDIT * edit + ROUNDINGS * torch.finfo(dtype).eps * x


def require_same_edit(
    computed: Float[Tensor, "rows d"], run: Float[Tensor, "rows d"], x: Float[Tensor, "rows d"], dtype: torch.dtype
) -> tuple[float, float]:
    """Difference between two computations of one edit and the difference allowed, both relative to the edit.

    Args:
        computed: edited activations.
        run: the same by another path.
        x: unedited activations.
        dtype: of the model.

    Raises:
        EditError: if they differ by more than rounding explains, or are not finite.
    """
    size, off = float((run - x).norm()), float((computed - run).norm())
    allowed = allowed_difference(size, float(x.norm()), dtype)
    if not off <= allowed:
        raise EditError(
            "The ablation differs from the one made by plain hooks with the SAE's own encode and decode: by "
            f"{off:.3g}, where the edit's norm is {size:.3g} and rounding to {str(dtype).removeprefix('torch.')} "
            f"explains {allowed:.3g}. Every number of the study would be wrong, so it ends here. Does the SAE decode "
            "as acts @ W_dec + b_dec, in the units of the activations or of its own input normalisation?"
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
        read = before.to(sae.W_dec)
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

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
