"""Exact probabilities of tokens at the end of prompts and after greedy steps, batched, cached and resumable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, require
from workbench.core.metrics import token_log_probabilities
from workbench.core.progress import task
from workbench.core.records import from_jsonable
from workbench.core.tokens import TokenBatch
from workbench.engine.log import Log
from workbench.glitch.verification.prompts import Template
from workbench.interventions.plan import active_plans
from workbench.models.head import forward
from workbench.models.kvcache import holds, keeps_columns, new_cache, select_rows, takes_cache
from workbench.models.model import Model

VERIFIED = 0.01
"""A token is verified as under-trained if no prompt and no step gives it this probability (Land and Bartolo 2024)."""


@checked
@dataclass(frozen=True)
class VerifyOptions(OneLine):
    """How tokens are tested.

    Attributes:
        steps: greedy steps after each prompt; the token may come at any of them.
        batch_size: prompts per forward pass.
        stop_at: a token that reaches this probability is not tested further, which leaves the verdict as it is and
            makes its probability a lower bound; None runs everything.
        share_prefix: put what all prompts of a batch begin with through the model once.
    """

    steps: int = 3
    batch_size: int = 32
    stop_at: float | None = None
    share_prefix: bool = True

    def __post_init__(self) -> None:
        is_valid = min(self.steps, self.batch_size) >= 1 and (self.stop_at is None or self.stop_at >= VERIFIED)
        rule = f"steps and batch_size are at least 1; stop_at is at least {VERIFIED} (the threshold) or None."
        require(is_valid, self, rule)


def dtype_name(model: Model) -> str:
    """The type of number in which a model computes, such as "float32"."""
    return str(model.dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class Scores:
    """Probabilities of tokens, by `[token, template, step]`.

    Attributes:
        p: probability of the token; nan where it was not run, or where the model gave no number.
    """

    p: np.ndarray
    ran: np.ndarray

    @property
    def best(self) -> np.ndarray:
        """Highest probability of each token; nan where the model gave no number at all."""
        return highest(self.p)

    @property
    def where(self) -> np.ndarray:
        """Index of the template that gave it."""
        return np.nan_to_num(self.p, nan=-1.0).max(2).argmax(1)

    @property
    def passes(self) -> np.ndarray:
        """Number of (prompt, step) passes per token."""
        return self.ran.sum((1, 2))


def highest(p: np.ndarray) -> np.ndarray:
    """Highest number of each token over templates and steps, nan if there is none.

    >>> highest(np.array([[[0.1, np.nan]], [[np.nan, np.nan]]])).tolist()
    [0.1, nan]
    """
    flat = np.nan_to_num(p.reshape(len(p), -1), nan=-1.0).max(1)
    return np.where(flat < 0, np.nan, flat)


def require_numbers(best: np.ndarray) -> None:
    """Refuses a test in which no token has a probability.

    Raises:
        DegenerateInputError: if there are several tokens and the model gives no number for any of them.
    """
    if len(best) > 1 and np.isnan(best).all():
        raise DegenerateInputError(
            f"All {len(best)} tokens have probability NaN: a row of the model's output matrix is not finite. "
            "`workbench glitch scan` names such rows; correct the weights first."
        )


def score(
    model: Model, templates: Sequence[Template], tokens: Int[Tensor, " n"], options: VerifyOptions,
    journal: Log | None = None,
) -> Scores:  # fmt: skip
    """Probability of each token under each prompt and step.

    Prompt after prompt, those with the fewest ids of their own first; a token that reached `stop_at` takes no further
    part. With a journal every batch is written as soon as it is done, and what the journal holds is not run again.
    """
    shape = (len(tokens), len(templates), options.steps)
    scores = Scores(np.full(shape, np.nan), np.zeros(shape, dtype=bool))
    done = {} if journal is None else journal.done()
    for k, token in enumerate(tokens.tolist()):
        for t, template in enumerate(templates if token in done else ()):
            values = probabilities_in(done[token], template)
            scores.p[k, t, : len(values)], scores.ran[k, t, : len(values)] = values, True
    with task(total=len(tokens) * len(templates), description="verify tokens", unit="prompts") as running:
        for t in sorted(range(len(templates)), key=lambda t: len(templates[t].ids) - templates[t].shared):
            template = templates[t]
            settled = scores.best >= (np.inf if options.stop_at is None else options.stop_at)
            todo = np.flatnonzero(~settled & ~scores.ran[:, t].any(1))
            running.skip(len(tokens) - len(todo))
            for start in range(0, len(todo), options.batch_size):
                part = todo[start : start + options.batch_size]
                p, ran = _steps(model, template, tokens[part], options)
                scores.p[part, t], scores.ran[part, t] = p, ran
                if journal is not None:
                    rows = zip(tokens[part].tolist(), p, ran, strict=True)
                    journal.append([{"token_id": i, template.name: row[run].tolist()} for i, row, run in rows])
                running.advance(len(part))
    return scores


def probabilities_in(row: Mapping[str, object], template: Template) -> list[float]:
    """Probabilities by step under one prompt in a row of a journal; nan where there is no number."""
    return from_jsonable(list[float], row.get(template.name, []))


def _steps(
    model: Model, template: Template, targets: Int[Tensor, " batch"], options: VerifyOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities by row and step and which were run, for one batch; a row that reached `stop_at` is settled."""
    p = np.full((len(targets), options.steps), np.nan)
    ran = np.zeros(p.shape, dtype=bool)
    live = np.ones(len(targets), dtype=bool)
    shared = template.shared if options.share_prefix else 0
    for step, logits in enumerate(greedy_logits(model, template.fill(targets), options.steps, shared=shared)):
        p[live, step], ran[live, step] = target_probabilities(logits, targets).double().numpy()[live], True
        if options.stop_at is not None:
            live &= ~(p[:, step] >= options.stop_at)
        if not live.any():
            break
    p[~np.isfinite(p)] = np.nan
    return p, ran


def greedy_logits(
    model: Model, rows: Int[Tensor, "batch pos"], steps: int, cached: bool = True, *, shared: int = 0
) -> Iterator[Float[Tensor, "batch d_vocab"]]:
    """Last-position logits of prompts of equal length, then after one greedy token, then after two, and so on.

    In fp32, on the model's device; other positions are not unembedded. `cached` computes the prompt once, and then one
    token per row and step; a model that keeps no cache is run again over the whole row. `shared` is the number of
    leading columns in which all rows are equal; they go through the model once, unless an intervention is on, which may
    tell rows apart.

    Raises:
        InvalidInputError: if the model has a table of positions that is too short.
    """
    hf = getattr(model, "hf", None) if cached else None
    if hf is None or not takes_cache(hf):
        yield from _uncached(model, rows, steps)
        return
    model.require_room(rows.shape[1] + steps - 1)
    rows = rows.to(model.device)
    cache = new_cache(hf.config, rows.shape[1] + steps)
    start = 0
    if 0 < shared < rows.shape[1] and len(rows) > 1 and keeps_columns(cache) and not active_plans(hf):
        _last(hf, cache, rows[:1, :shared], 0)
        if not holds(cache, shared):
            yield from _uncached(model, rows, steps)
            return
        select_rows(cache, torch.zeros(len(rows), dtype=torch.long, device=rows.device))
        start = shared
    for step in range(steps):
        logits = _last(hf, cache, rows[:, start:], start)
        yield logits
        if step + 1 == steps:
            return
        rows = torch.cat([rows, logits.argmax(1)[:, None]], dim=1)
        start = rows.shape[1] - 1
        if not holds(cache, start):
            yield from _uncached(model, rows, steps - step - 1)
            return


def _uncached(model: Model, rows: Int[Tensor, "batch pos"], steps: int) -> Iterator[Tensor]:
    for step in range(steps):
        logits = model.logits(TokenBatch.of_rows(rows), keep="last")
        yield logits
        if step + 1 < steps:
            rows = torch.cat([rows, logits.argmax(1)[:, None].to(rows.device)], dim=1)


@torch.no_grad()
def _last(hf: Any, cache: Any, ids: Int[Tensor, "batch new"], start: int) -> Tensor:
    positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand(ids.shape)
    at_end = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    at_end[:, -1] = True
    inputs = {"input_ids": ids, "position_ids": positions, "past_key_values": cache, "use_cache": True}
    # not by logits_to_keep: its strided slice makes torch unembed row by row, at a third of the speed on a CPU
    _, logits = forward(hf, inputs, at_end)
    assert logits is not None
    return logits


def target_probabilities(
    logits: Float[Tensor, "batch d_vocab"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Probability of each row's target, exact: the sum over the vocabulary is taken in fp32.

    >>> target_probabilities(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    tensor([0.5000, 0.5000])
    """
    return token_log_probabilities(logits, targets[:, None].to(logits.device))[:, 0].exp().cpu()
