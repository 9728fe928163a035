"""The numbers of SAE evaluation, as pure functions. Sums are taken over all rows before any division."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.errors import DegenerateInputError, ShapeError
from workbench.core.numbers import number
from workbench.core.similarity import assign, cosines, max_cosines

_COLUMNS = 16_384
_CACHED_VALUES, _LEAST_COLUMNS = 2**18, 1024
"""Values of a buffer that stays in a core's cache (1 MiB of fp32), and the columns that it has at least."""

_LEAST_EXPONENT = -80.0
"""exp(-80) adds nothing to a sum that holds a 1; below -87 the results are subnormal, which takes ten times as long."""


def token_log_probabilities(
    logits: Float[Tensor, "rows d_vocab"], ids: Int[Tensor, "rows k"]
) -> Float[Tensor, "rows k"]:
    """Log-probabilities (nats) of some tokens of each row, in fp32, without a copy of all logits.

    The largest logit is taken off and never added again: next to a logit of 200, fp32 has steps of 1.5e-5.

    >>> token_log_probabilities(torch.zeros(1, 4), torch.tensor([[2]])).exp()
    tensor([[0.2500]])
    """
    top = logits.amax(1, keepdim=True).float()
    total = torch.zeros_like(top)
    for block in logits.split(_COLUMNS, dim=1):
        total += (block.float() - top).clamp_(min=_LEAST_EXPONENT).exp_().sum(1, keepdim=True)
    return logits.gather(1, ids).float() - top - total.log()


@dataclass(frozen=True, eq=False)
class Standing:
    """Where a logit stands in each row of logits.

    Attributes:
        top: largest logit of the row.
        log_total: `log sum exp(logit - top)`, so that `log p = logit - top - log_total`, in nats.
        above: number of strictly larger logits.
    """

    top: Float[Tensor, " rows"]
    log_total: Float[Tensor, " rows"]
    above: Int[Tensor, " rows"]


@torch.no_grad()
def standing(logits: Float[Tensor, "rows d_vocab"], of: Float[Tensor, " rows"]) -> Standing:
    """Where the values `of` stand among each row's logits, in fp32, with one exponential per logit.

    Blocks of columns go through one buffer that fits into a core's cache: a comparison or a difference that is written
    to a new tensor costs more than the exponential.

    >>> found = standing(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([1.0]))
    >>> found.above.item(), found.top.item()
    (2, 3.0)
    """
    top, of = logits.amax(1, keepdim=True).float(), of[:, None]
    total, above = torch.zeros_like(top), torch.zeros_like(top, dtype=torch.long)
    columns = max(_LEAST_COLUMNS, _CACHED_VALUES // max(1, len(logits)))
    buffer = torch.empty(len(logits), min(columns, logits.shape[1]), dtype=torch.float32, device=logits.device)
    for block in logits.split(columns, dim=1):
        part = buffer[:, : block.shape[1]]
        # ones and zeros as floats: sums of truth values are ten times slower; exact, a block being far below 2**24
        above += torch.gt(block, of, out=part).sum(1, keepdim=True).long()
        total += torch.sub(block, top, out=part).clamp_(min=_LEAST_EXPONENT).exp_().sum(1, keepdim=True)
    return Standing(top[:, 0], total.log()[:, 0], above[:, 0])


def squared_error(x: Float[Tensor, "rows d_in"], x_hat: Float[Tensor, "rows_hat d_hat"]) -> Float[Tensor, " rows"]:
    """Squared distance of each row from its reconstruction, in fp64.

    Raises:
        ShapeError: if the shapes differ.

    >>> squared_error(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))  # 9 + 16
    tensor([25.], dtype=torch.float64)
    """
    if x.shape != x_hat.shape:
        raise ShapeError(f"x has shape {tuple(x.shape)}, its reconstruction {tuple(x_hat.shape)}; they must be equal.")
    return (x.double() - x_hat.double()).square().sum(-1)


def fvu(x: Float[Tensor, "rows d_in"], x_hat: Float[Tensor, "rows_hat d_hat"]) -> float:
    """Fraction of variance unexplained: 0 is perfect, 1 is no better than the mean of these rows.

    Sums are taken over all rows before dividing, so the result does not depend on how the data were batched.
    Accumulated in fp64. Leave attention sinks out: one row of norm 25 000 outweighs ten thousand others.

    Raises:
        ShapeError: if the shapes differ.
        DegenerateInputError: if every row of `x` is the same, which leaves no variance to explain.

    >>> fvu(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))  # (0 + 1) / (1 + 1)
    0.5
    """
    error = float(squared_error(x, x_hat).sum())
    variance = float(squared_error(x, x.double().mean(0).expand(x.shape)).sum())
    if variance == 0:
        raise DegenerateInputError(f"fvu: all {len(x)} rows are the same, so there is no variance to explain.")
    return error / variance


def l0(feature_acts: Float[Tensor, "rows d_sae"]) -> float:
    """Mean number of features above zero per token; leave BOS and padding out of the rows.

    >>> l0(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]))  # (2 + 1) / 2
    1.5
    """
    if len(feature_acts) == 0:
        raise DegenerateInputError("l0: there are no rows.")
    return float((feature_acts > 0).sum(-1).double().mean())


def ce_loss_recovered(ce_clean: float, ce_spliced: float, ce_ablated: float) -> float:
    """Share of the loss that ablation costs and the SAE keeps: 1 is the clean model, 0 the ablated one.

    All three are nats per token. The ablation belongs to the number: name it wherever this is printed.

    Raises:
        DegenerateInputError: if the ablation does not change the loss.

    >>> ce_loss_recovered(ce_clean=3.0, ce_spliced=3.5, ce_ablated=8.0)  # (8 - 3.5) / (8 - 3)
    0.9
    """
    if ce_ablated == ce_clean:
        raise DegenerateInputError(
            f"ce_loss_recovered: ablation leaves the loss at {number(ce_clean)}; nothing to recover."
        )
    return (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)


def dead_share(fired: Bool[Tensor, " d_sae"]) -> float:
    """Share of features that never fired; say over how many tokens.

    >>> dead_share(torch.tensor([True, False, False, True]))
    0.5
    """
    if fired.numel() == 0:
        raise DegenerateInputError("dead_share: there are no features.")
    return float((~fired).double().mean())


def kl_divergence(
    logits_p: Float[Tensor, "*rows d_vocab"], logits_q: Float[Tensor, "*rows d_vocab"]
) -> Float[Tensor, "*rows"]:
    """KL(p || q) of next-token distributions in nats, computed in the dtype of the logits; never below 0.

    A token that p rules out (a logit of -inf) counts nothing; one that q alone rules out makes it infinite.

    >>> kl_divergence(torch.zeros(2), torch.tensor([0.0, torch.log(torch.tensor(3.0))])).round(decimals=4)
    tensor(0.1438)
    """
    log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1).clamp_min(0)


@torch.no_grad()
def mean_max_cosine(directions: Float[Tensor, "n_true d_in"], dictionary: Float[Tensor, "d_sae d_in"]) -> float:
    """Mean over the true directions of the largest signed cosine with a dictionary row (MMCS); 1 is full recovery.

    >>> mean_max_cosine(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, -1.0]]))  # (1 + 0) / 2
    0.5
    """
    return float(max_cosines(directions, dictionary).values.mean())


def decoder_norm_summary(W_dec: Float[Tensor, "d_sae d_out"]) -> dict[str, float]:
    """Smallest, median and largest norm of the decoder rows; far apart, activations of features can't be compared.

    >>> decoder_norm_summary(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))  # norms 5 and 1; the lower median
    {'min': 1.0, 'median': 1.0, 'max': 5.0}
    """
    norms = W_dec.detach().float().norm(dim=1)
    return {"min": float(norms.min()), "median": float(norms.median()), "max": float(norms.max())}


@torch.no_grad()
def matched_cosine(directions: Float[Tensor, "n_true d_in"], dictionary: Float[Tensor, "d_sae d_in"]) -> float:
    """Mean signed cosine under the best one-to-one matching of true directions and dictionary rows (MCC).

    Unlike `mean_max_cosine`, one row can't stand for two directions. True directions beyond the number of rows count
    as cosine 0.

    >>> two = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> round(matched_cosine(two, torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), 4)  # (1 - 0.6) / 2; MMCS is (1 + 0.6) / 2
    0.2
    """
    return assign(cosines(directions, dictionary)).total / len(directions)
