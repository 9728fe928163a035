"""Gradient search: walk to the token whose neighbourhood makes the model least sure what comes next."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.core.errors import DegenerateInputError, InvalidInputError, require
from workbench.core.progress import task
from workbench.glitch.searching.oracle import Asker, Found, Oracle
from workbench.glitch.verification.prompts import Template
from workbench.models.model import Model


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """How far and how wide the walk goes.

    Attributes:
        iterations: steps of the walk; each tests one batch.
        batch_size: tokens tested per step.
        neighbours: nearest untested tokens that are scored at each step.
    """

    iterations: int = 125
    batch_size: int = 8
    neighbours: int = 32

    def __post_init__(self) -> None:
        is_valid = min(self.iterations, self.batch_size) >= 1 and self.neighbours >= self.batch_size
        require(is_valid, self, "iterations and batch_size are at least 1, neighbours at least batch_size.")


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """How unsure the model is of the next token, and what would make it less sure.

    Attributes:
        entropy: of the next token, in nats.
        gradient: of the entropy with respect to the token's input embedding, summed over its places in the prompt.
    """

    entropy: Float[Tensor, " batch"]
    gradient: Float[Tensor, "batch d_model"]


def uncertainty(model: Model, template: Template, tokens: Int[Tensor, " batch"]) -> Uncertainty:
    """Entropy of the token that follows the prompt, and its gradient; fp32, on the CPU.

    Raises:
        InvalidInputError: for a model that does not take input embeddings.
    """
    hf = model.hf
    if "inputs_embeds" not in inspect.signature(hf.forward).parameters:
        raise InvalidInputError(
            f"{type(hf).__name__} takes no input embeddings, so no gradient reaches them. Use another search."
        )
    with torch.enable_grad():
        x = hf.get_input_embeddings()(template.fill(tokens).to(model.device)).detach().requires_grad_()
        out = hf(inputs_embeds=x, use_cache=False, logits_to_keep=1)
        logp = nn.functional.log_softmax(out.logits[:, -1].float(), dim=-1)
        entropy = -(logp.exp() * logp).sum(1)
        (gradient,) = torch.autograd.grad(entropy.sum(), x)
    slots = gradient[:, template.slots.to(gradient.device)].float().sum(1)
    return Uncertainty(entropy.detach().cpu(), slots.cpu())


def climb(
    model: Model, template: Template, ids: np.ndarray, oracle: Oracle, options: GradientOptions | None = None
) -> Found:
    """Tests tokens where the entropy of the answer to a copying prompt should be highest, to first order.

    From the present token `t`, the nearest untested tokens `c` (distance of unit-norm embeddings) are scored by
    `H(t) + (e_c - e_t) . dH/de_t`; those with the highest score are tested, and the walk continues from the one of them
    with the highest entropy. It begins at the token with the smallest norm, and draws nothing at random.

    Raises:
        DegenerateInputError: if there are no tokens.
        InvalidInputError: for a model that does not take input embeddings.

    Source: GlitchMiner (arXiv 2410.15052), with the oracle of this package in place of its own test.
    """
    options = options or GradientOptions()
    if not len(ids):
        raise DegenerateInputError("climb: there are no tokens to search. Give ids of ordinary tokens.")
    places = torch.from_numpy(np.unique(np.asarray(ids, dtype=np.int64)))
    with torch.no_grad():
        rows = model.hf.get_input_embeddings()(places.to(model.device)).float().cpu()
    norm = rows.norm(dim=1)
    unit = rows / norm.clamp_min(1e-12)[:, None]
    asker, at = Asker(oracle), int(norm.argmin())
    untested = torch.ones(len(places), dtype=torch.bool)
    here = uncertainty(model, template, places[at : at + 1])
    entropy, gradient, passes = here.entropy[0], here.gradient[0], 1
    with task(total=options.iterations, description="gradient search", unit="steps") as running:
        for step in range(options.iterations):
            left = int(untested.sum())
            if not left:
                break
            near = (unit @ unit[at]).masked_fill(~untested, -torch.inf).topk(min(options.neighbours, left)).indices
            score = entropy + (rows[near] - rows[at]) @ gradient
            batch = near[score.topk(min(options.batch_size, len(near))).indices]
            if step == 0 and untested[at]:
                batch = torch.cat([torch.tensor([at]), batch[batch != at]])[: options.batch_size]
            asker(places[batch].numpy())
            untested[batch] = False
            there = uncertainty(model, template, places[batch])
            passes += len(batch)
            best = int(there.entropy.argmax())
            at, entropy, gradient = int(batch[best]), there.entropy[best], there.gradient[best]
            running.advance()
    return asker.found("gradient", passes)
