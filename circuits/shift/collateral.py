"""What an ablation costs on text that has nothing to do with the task, against random ablations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.shift.deciders import Node
from circuits.shift.evidence import Reader
from circuits.shift.rows import Collateral
from workbench.core.stats import paired_difference, sample_mean
from workbench.core.tokens import TokenBatch


@torch.no_grad()
def collateral(reader: Reader, text: TokenBatch, chosen: Sequence[Node], draws: Sequence[Sequence[Node]]) -> Collateral:
    """Change of the loss under the ablation and under each random one; zero where nothing is ablated.

    Args:
        reader: model, bases, and the tokens that are edited.
        text: the text.
        chosen: features that are ablated.
        draws: sets of random features.
    """
    plain, edited = [], [[] for _ in range(1 + len(draws))]
    for start in range(0, len(text), reader.batch_size):
        part = text[slice(start, start + reader.batch_size)].to(reader.model.device)
        keep = reader.keep(part, reader.model.capture(part, [reader.probe_site]).flat(reader.probe_site))
        plain.append(_loss(reader, part))
        for losses, nodes in zip(edited, [chosen, *draws], strict=True):
            losses.append(_edited(reader, part, keep, nodes) if nodes else plain[-1])
    base, changed = torch.cat(plain).numpy(), torch.stack([torch.cat(losses) for losses in edited]).numpy()
    random = changed[1:] - base
    return Collateral(
        paired_difference(changed[0], base, unit="rows of text"),
        sample_mean(random.mean(axis=0), unit="rows of text"),
        sample_mean(random.mean(axis=1), unit="random sets"),
    )


def _loss(reader: Reader, part: TokenBatch) -> Float[Tensor, " batch"]:
    return reader.model.loss(part).nanmean(dim=1).double().cpu()


def _edited(reader: Reader, part: TokenBatch, keep: Tensor, nodes: Sequence[Node]) -> Float[Tensor, " batch"]:
    with reader.model.plan(reader.intervention(nodes, keep)):
        return _loss(reader, part)
