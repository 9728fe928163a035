"""SAE features that tell refusals from compliance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE, as_basis
from workbench.controls.area import auroc
from workbench.core.tokens import TokenBatch
from workbench.interventions.intervention import Intervention
from workbench.interventions.saes import SAEClamp
from workbench.interventions.scopes import All, Pos
from workbench.models.model import Model
from workbench.steering.directions.contrast import cosine
from workbench.steering.refusal.data import Exchange
from workbench.steering.refusal.measures import refusal_log_odds

ROWS_PER_PASS = 32
EVERY_TOKEN_BUT_THE_FIRST = All() & ~Pos(0)
"""The first token is an attention sink: its huge activations would make a clamp a change of another kind."""


@dataclass(frozen=True, kw_only=True)
class FeatureRow:
    """How one feature differs between refusals and compliant replies to the same prompts.

    Attributes:
        feature: its index in the SAE.
        mean_difference: mean contribution (`Basis.contributions`) over reply tokens, refusals minus compliant replies.
        auroc: how well its mean contribution over a reply tells refusals (1) from compliance (0).
        cosine: of its decoder row with the refusal direction.
        frequency: share of reply tokens on which it is active.
        max_act: largest activation on a reply token, in the SAE's units.
        reply_tokens: most tokens of one refusal on which it is active.
        screened: change of the refusal log-odds when it is clamped on harmful prompts of the validation part.
    """

    feature: int
    mean_difference: float
    auroc: float
    cosine: float
    frequency: float
    max_act: float
    reply_tokens: int
    screened: float | None = None


@dataclass(frozen=True, eq=False)
class FeatureContrast:
    """The contrast of all features.

    Attributes:
        candidates: features that refusals use more, best first by mean difference times decoder norm.
        frequency: share of reply tokens on which each feature is active.
        max_act: largest activation of each feature on a reply token.
        decoder_norm: length of what one unit of each feature's contribution adds.
    """

    candidates: tuple[FeatureRow, ...]
    frequency: Float[Tensor, " d_sae"]
    max_act: Float[Tensor, " d_sae"]
    decoder_norm: Float[Tensor, " d_sae"]


@dataclass(frozen=True, eq=False)
class _Side:
    means: Float[Tensor, "rows d_sae"]
    counts: Float[Tensor, "rows d_sae"]
    peak: Float[Tensor, " d_sae"]
    n_tokens: int


def _encode_replies(model: Model, basis: Basis, site: str, exchange: Exchange) -> _Side:
    means, counts, peaks = [], [], []
    for start in range(0, len(exchange.tokens), ROWS_PER_PASS):
        part = exchange.tokens[slice(start, start + ROWS_PER_PASS)]
        x = model.capture(part, [site]).flat(site)
        is_reply = exchange.is_reply[start : start + ROWS_PER_PASS, -part.ids.shape[1] :]
        for row, chosen in zip(x, is_reply.to(x.device), strict=True):
            read = row[chosen]
            acts = basis.encode(read)
            means.append(basis.rescaled(acts, read).mean(0).cpu())
            counts.append((acts > 0).float().sum(0).cpu())
            peaks.append(acts.amax(0).cpu())
    return _Side(torch.stack(means), torch.stack(counts), torch.stack(peaks).amax(0), int(exchange.is_reply.sum()))


def find_refusal_features(
    model: Model,
    sae: AnySAE,
    site: str,
    refusals: Exchange,
    compliant: Exchange,
    direction: Float[Tensor, " d"],
    min_tokens: int = 2,
) -> FeatureContrast:
    """Features that are more active in refusals than in compliant replies, over reply tokens only.

    A candidate is active on at least `min_tokens` tokens of one refusal, and more active in refusals overall. There
    may be none: the tuple is then empty.

    Source: O'Brien et al. 2024, "Steering language model refusal with sparse autoencoders" (active on two tokens of a
    refusal); ranked here by contrast instead of by clamping every one of them.
    """
    basis = as_basis(sae)
    yes, no = (_encode_replies(model, basis, site, side) for side in (refusals, compliant))
    decoder = basis.rows().cpu()
    difference = yes.means.mean(0) - no.means.mean(0)
    labels = torch.cat([torch.ones(len(yes.means)), torch.zeros(len(no.means))]).bool()
    norm = decoder.norm(dim=1)
    frequency = (yes.counts.sum(0) + no.counts.sum(0)) / (yes.n_tokens + no.n_tokens)
    reply_tokens, peak = yes.counts.amax(0), torch.maximum(yes.peak, no.peak)
    allowed = (reply_tokens >= min_tokens) & (difference > 0)
    order = (difference * norm).masked_fill(~allowed, float("-inf")).argsort(descending=True)[: int(allowed.sum())]
    area = auroc(torch.cat([yes.means, no.means])[:, order], labels) if len(order) else torch.zeros(0)
    alike = cosine(decoder[order], direction.cpu())
    rows = tuple(
        FeatureRow(
            feature=f,
            mean_difference=float(difference[f]),
            auroc=float(area[i]),
            cosine=float(alike[i]),
            frequency=float(frequency[f]),
            max_act=float(peak[f]),
            reply_tokens=int(reply_tokens[f]),
        )
        for i, f in enumerate(order.tolist())
    )
    return FeatureContrast(rows, frequency, peak, norm)


def screen_features(
    model: Model,
    sae: AnySAE,
    site: str,
    rows: Sequence[FeatureRow],
    prompts: TokenBatch,
    refusal_tokens: Sequence[int],
    multiple: float,
) -> tuple[FeatureRow, ...]:
    """The rows with what clamping each alone to `multiple` times its maximum does to the log-odds; best first."""
    base = refusal_log_odds(model.logits(prompts), refusal_tokens)
    done = []
    for row in rows:
        op = SAEClamp(sae, [row.feature], multiple * row.max_act)
        with model.plan(Intervention.at(site, op, EVERY_TOKEN_BUT_THE_FIRST)):
            change = refusal_log_odds(model.logits(prompts), refusal_tokens) - base
        done.append(FeatureRow(**{**vars(row), "screened": float(change.mean())}))
    return tuple(sorted(done, key=lambda row: -(row.screened or 0.0)))
