"""What the tables share: pairs whose positions mean the same, prompts for the control, means with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.metrics import Metric, value
from circuits.pairs import Pairs
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted
from workbench.core.stats import Estimate, sample_mean
from workbench.core.tokens import TokenBatch
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.models.segment import Segment
from workbench.models.stretches import stretches

Align = Literal["start", "end"]
ROUNDING = 1e-3
"""A difference of a single pair below this (nats or logits) is taken for rounding."""
_TEXTS_SHOWN = 2


def comparable(who: str, model: Model, pairs: Pairs, align: Align = "start") -> tuple[Pairs, TokenBatch]:
    """The pairs on the model's device, and their patch prompts, once positions mean the same in all of them.

    Args:
        who: the function, to begin the message.
        model: the model.
        pairs: the pairs.
        align: "end" counts positions from the last token, and takes pairs of any length.

    Raises:
        InvalidInputError: if there are no patch prompts, or the pairs differ in length and are not aligned.
    """
    if pairs.patch is None:
        raise InvalidInputError(
            f"{who}: these prompts have no counterparts to patch from. Give patch= when the pairs are made."
        )
    if align not in ("start", "end"):
        raise InvalidInputError(f"{who}(align={align!r}): positions count from the 'start' or from the 'end'.")
    if pairs.length is None and align == "start":
        lengths = pairs.clean.lengths.tolist()
        raise InvalidInputError(
            f"{who}: the pairs have {min(lengths)} to {max(lengths)} tokens, so a position means something else in "
            "each. Take pairs.of_one_length(), or count from the last token with align='end'."
        )
    pairs = pairs.to(model.device)
    assert pairs.patch is not None
    return pairs, pairs.patch


def third_prompts(pairs: Pairs, seed: int = 0) -> tuple[TokenBatch, Bool[Tensor, " pairs"]]:
    """For each pair a prompt of another pair with as many tokens, and whether there is one.

    A prompt that has the clean answer is preferred: its words differ, and what the behaviour depends on does not.
    Otherwise it is the patch prompt of another pair. A pair without either keeps its own clean prompt.
    """
    assert pairs.patch is not None
    both = [(pairs.clean, 0), (pairs.patch, 1)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths, answers = pairs.clean.lengths.tolist(), pairs.answers.tolist()
    ids, there = pairs.clean.ids.clone(), torch.zeros(len(pairs), dtype=torch.bool, device=pairs.clean.ids.device)
    for i in range(len(pairs)):
        place = order.index(i)
        others = [j for j in order[place + 1 :] + order[:place] if lengths[j] == lengths[i]]
        alike = [(batch, j) for j in others for batch, k in both if answers[j][k] == answers[i][0]]
        for batch, j in [*alike, *((pairs.patch, j) for j in others)]:
            if not any(torch.equal(batch.ids[j], own.ids[i]) for own, _ in both):
                ids[i], there[i] = batch.ids[j], True
                break
    return replace(pairs.clean, ids=ids), there


def without_third(there: Bool[Tensor, " pairs"]) -> str:
    """How many pairs have no control, in words; "" if all have one."""
    missing = int((~there).sum())
    return (
        f"{counted(missing, 'pairs')} without a third prompt of as many tokens, so without control." if missing else ""
    )


def whole_run(model: Model, batch: TokenBatch, metric: Metric) -> Float[Tensor, " pairs"]:
    """The metric of unpatched prompts, with the answers of the pairs."""
    with torch.no_grad():
        segment = model.segment(batch, "resid_pre.0", metric.site)
        return value(metric, segment.run(), torch.arange(len(batch), device=batch.ids.device))


def segments_at(
    model: Model, batch: TokenBatch, sites: Sequence[Site], to: str, *, last: bool | int = False
) -> dict[Site, Segment]:
    """A segment from each site to the same end, all of one recorded run; with `last` of so many last tokens alone."""
    wanted = [(site, (to,), ()) for site in sites]
    return dict(zip(sites, stretches(model, batch, wanted, last=last), strict=True))


def mean_and_error(values: Float[Tensor, "cells pairs"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard error and number of the pairs of each cell that are not nan; nan for a single pair's error."""
    there = ~values.isnan()
    n = there.sum(1)
    mean = values.nansum(1) / n
    squares = ((values - mean[:, None]).masked_fill(~there, 0) ** 2).sum(1)
    spread = torch.where(n > 1, (squares / (n - 1).clamp_min(1) / n.clamp_min(1)).sqrt(), torch.nan)
    return mean.cpu().double().numpy(), spread.cpu().double().numpy(), n.cpu().numpy()


def estimate(values: Tensor, unit: str = "pairs") -> Estimate | None:
    """Mean of one value per pair with its interval; those that are nan are left out, None if no pair is left."""
    kept = values[~values.isnan()].cpu().double().numpy()
    return sample_mean(kept, unit=unit) if len(kept) else None


def whole_difference(totals: Float[Tensor, " pairs"]) -> float | None:
    """The mean whole-run difference if it is more than noise: its interval excludes 0, or one pair's is no rounding."""
    found = estimate(totals)
    if found is None:
        return None
    clear = abs(found.value) > ROUNDING if found.n == 1 else found.excludes(0.0)
    return found.value if clear else None


def position_names(pairs: Pairs) -> tuple[str, ...]:
    """For each column what stands there: the token of the pairs, with what it becomes, where they agree."""
    assert pairs.patch is not None
    names = []
    for column in range(pairs.clean.ids.shape[1]):
        real = pairs.clean.mask[:, column].nonzero()[:, 0].tolist()
        texts = {_change(pairs, row, column): None for row in real}
        shown = list(texts)[:_TEXTS_SHOWN]
        names.append(" | ".join(shown) + (" …" if len(texts) > len(shown) else ""))
    return tuple(names)


def _change(pairs: Pairs, row: int, column: int) -> str:
    assert pairs.patch is not None
    texts = [_token(batch, row, column) for batch in (pairs.clean, pairs.patch)]
    return texts[0] if texts[0] == texts[1] else "→".join(texts)


def _token(batch: TokenBatch, row: int, column: int) -> str:
    place = int(batch.positions[row, column])
    return batch.str_tokens[row][place] if batch.str_tokens else str(int(batch.ids[row, column]))


def require_rows(who: str, rows: Sequence[object], why: str) -> None:
    """Refuses a table without rows.

    Raises:
        DegenerateInputError: if there are none.
    """
    if not rows:
        raise DegenerateInputError(f"{who}: {why}")


def single_token(who: str, model: Model, text: str) -> int:
    """The id of a text that is one token.

    Raises:
        InvalidInputError: if it is none or several.
    """
    ids = model.tokens(text, bos=False).rows()[0].tolist()
    if len(ids) != 1:
        raise InvalidInputError(f"{who}: it is {len(ids)} tokens; give one, often with a space in front.")
    return int(ids[0])
