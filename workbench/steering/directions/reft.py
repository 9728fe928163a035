"""ReFT-r1: a direction that is trained by steering with it; the language model stays frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted
from workbench.core.tokens import TokenBatch
from workbench.hooks.sites import Site
from workbench.models.model import Model


@dataclass(frozen=True, kw_only=True)
class ReftOptions:
    """How ReFT-r1 is trained.

    Attributes:
        epochs: at most so many passes over the texts.
        lr: peak learning rate of Adam, falling to zero over the epochs.
        batch: texts per step.
        top: tokens of a text over whose activations the size of the edit is the mean.
        l1: weight of the activations beyond these, reached at the last step.
        held_out: share of the texts that say when to stop.
        patience: epochs without a better held-out loss after which training ends.
        seed: of the split and the order.
    """

    epochs: int = 12
    lr: float = 0.01
    batch: int = 6
    top: int = 8
    l1: float = 0.005
    held_out: float = 0.25
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.top, self.patience) < 1 or self.lr <= 0 or self.l1 < 0:
            raise InvalidInputError(f"{self}: counts must be at least 1, lr positive, l1 not negative.")
        if not 0 < self.held_out < 1:
            raise InvalidInputError(f"ReftOptions(held_out={self.held_out}): needs a share between 0 and 1.")


@dataclass(frozen=True, eq=False)
class Reft:
    """A trained direction.

    Attributes:
        direction: unit length.
        losses: held-out loss before training and after each epoch, nats per token.
    """

    direction: Float[Tensor, " d"]
    losses: tuple[float, ...]


def reft_edit(
    x: Float[Tensor, "rows pos d"], direction: Float[Tensor, " d"], keep: Bool[Tensor, "rows pos"], top: int
) -> tuple[Float[Tensor, "rows pos d"], Float[Tensor, " rows"]]:
    """`x` with `mean of the top activations * direction` added at the kept tokens, and the other activations per token.

    The activation of a token is `relu(x . direction)`; all kept tokens of a row get the same addition.

    >>> x = torch.tensor([[[3.0, 0.0], [1.0, 0.0]]])
    >>> edited, rest = reft_edit(x, torch.tensor([1.0, 0.0]), torch.tensor([[True, True]]), top=1)
    >>> edited[0, :, 0], rest  # 3 is added to both; 1 is left over, of 2 tokens
    (tensor([6., 4.]), tensor([0.5000]))
    """
    z = (x @ direction).relu() * keep
    best = z.topk(min(top, z.shape[1]), dim=1).values
    counted = keep.sum(1).clamp_max(best.shape[1]).clamp_min(1)
    size = best.sum(1) / counted
    rest = (z.sum(1) - best.sum(1)) / keep.sum(1).clamp_min(1)
    return x + (size[:, None] * keep)[..., None] * direction, rest


def fit_reft(
    model: Model, texts: TokenBatch, site: str | Site, start: Float[Tensor, " d"], options: ReftOptions | None = None
) -> Reft:
    """The direction whose addition makes these texts most likely, by the loss on texts that are held out.

    Departures from the source: the direction is normalised inside the loss, so it is a unit vector at every step; it
    begins at `start`; and the epoch with the best held-out loss is kept.

    Raises:
        DegenerateInputError: for fewer than four texts.
        InvalidInputError: at a site that is not the residual stream between blocks.

    Source: AxBench (Wu et al. 2025, arXiv 2501.17148), ReFT-r1; rank one, trained on the language-model loss.
    """
    options = options or ReftOptions()
    if len(texts) < 4:
        raise DegenerateInputError(
            f"fit_reft: {counted(len(texts), 'texts')}. Give four or more; some of them say when to stop."
        )
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(texts), generator=generator)
    n_held = min(max(1, round(options.held_out * len(texts))), len(texts) - 2)
    held = [_Batch(model, texts[part], site) for part in order[:n_held].split(options.batch)]
    batches = [_Batch(model, texts[part], site) for part in order[n_held:].split(options.batch)]
    v = (start / start.norm()).float().clone().requires_grad_(True)
    adam = torch.optim.Adam([v], lr=options.lr)
    total, step = options.epochs * len(batches), 0
    best, losses, worse = v.detach().clone(), [_mean_loss(held, v, options)], 0
    for _ in range(options.epochs):
        for i in torch.randperm(len(batches), generator=generator).tolist():
            loss, rest = batches[i].loss(v / v.norm(), options.top)
            adam.param_groups[0]["lr"] = options.lr * (1 - step / total)
            (v.grad,) = torch.autograd.grad(loss + options.l1 * (step / total) * rest, [v])
            nn.utils.clip_grad_norm_([v], 1.0)
            adam.step()
            step += 1
        losses.append(_mean_loss(held, v, options))
        worse = 0 if losses[-1] < min(losses[:-1]) else worse + 1
        if not worse:
            best = v.detach().clone()
        if worse >= options.patience or not math.isfinite(losses[-1]):
            break
    return Reft(best / best.norm(), tuple(losses))


def _mean_loss(batches: list[_Batch], v: Tensor, options: ReftOptions) -> float:
    with torch.no_grad():
        found = [(float(b.loss(v / v.norm(), options.top)[0]), b.n) for b in batches]
    return sum(loss * n for loss, n in found) / sum(n for _, n in found)


class _Batch:
    """Some texts, run once up to the site."""

    def __init__(self, model: Model, texts: TokenBatch, site: str | Site) -> None:
        self._model = model
        self._segment = model.segment(texts, site)
        if not self._segment.skips_blocks or model.resolve(site).kind not in ("resid_pre", "resid_post"):
            raise InvalidInputError(
                f"fit_reft: {model.name} can't be continued from {site}. Train at resid_post of a layer of a model "
                "whose blocks are called one after the other, or leave ReFT-r1 out."
            )
        self._target = texts.ids[:, 1:]
        self._real = texts.mask[:, 1:] & texts.mask[:, :-1]
        self._keep = texts.mask & (texts.positions > 0)
        self.n = int(self._real.sum())

    def loss(self, direction: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Mean loss in nats per token under the edit, and the mean activation beyond the top."""
        x = self._segment.x.float()
        edited, rest = reft_edit(x, direction, self._keep, top)
        hidden = self._segment.run(edited).hidden
        logits = self._model.head.all(hidden[:, :-1][self._real])
        return nn.functional.cross_entropy(logits, self._target[self._real]), rest.mean()
