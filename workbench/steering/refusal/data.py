"""The prompts and given replies of the refusal study: pairs of one form, split without overlap."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model
from workbench.steering.refusal.measures import REFUSAL_PHRASES

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class PromptPair:
    """A request that a careful assistant refuses, and a harmless one of the same form."""

    harmful: str
    harmless: str


@dataclass(frozen=True)
class RefusalData:
    """What the refusal study asks and the replies that it is given.

    Attributes:
        pairs: harmful and harmless requests, matched in form.
        refusals: replies that refuse.
        compliant: openings of replies that comply, fitting any request.
        plain_texts: ordinary prose, for the loss that steering costs.
        phrases: what counts as a refusal in a reply, in lower case.
    """

    pairs: tuple[PromptPair, ...]
    refusals: tuple[str, ...]
    compliant: tuple[str, ...]
    plain_texts: tuple[str, ...]
    phrases: tuple[str, ...] = REFUSAL_PHRASES

    def __post_init__(self) -> None:
        for name in ("pairs", "refusals", "compliant"):
            if not getattr(self, name):
                raise InvalidInputError(f"RefusalData: {name} is empty. Give at least one.")

    def split(self, n_train: int, n_val: int, n_test: int, seed: int = 0) -> Split:
        """Pairs for fitting, choosing and reporting; no pair is in two of them.

        Raises:
            InvalidInputError: if there are not enough pairs, or a part would be empty.
        """
        asked, there = n_train + n_val + n_test, len(self.pairs)
        if min(n_train, n_val, n_test) < 1 or asked > there:
            raise InvalidInputError(
                f"split(train={n_train}, val={n_val}, test={n_test}): there are {there} pairs of prompts. "
                "Ask for at least one each, and no more than that together."
            )
        order = torch.randperm(there, generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [self.pairs[i] for i in order[:asked]]
        return Split(
            tuple(chosen[:n_train]), tuple(chosen[n_train : n_train + n_val]), tuple(chosen[n_train + n_val :])
        )


@dataclass(frozen=True)
class Split:
    """Pairs for fitting directions, for choosing features, and for the numbers that are reported."""

    train: tuple[PromptPair, ...]
    val: tuple[PromptPair, ...]
    test: tuple[PromptPair, ...]


@functools.cache
def refusal_data() -> RefusalData:
    """The prompts that come with the package; written for it, short, without any detail one could act on."""
    source = importlib.resources.files("workbench.steering.refusal").joinpath("refusal_prompts.json")
    raw: Mapping[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    pairs = tuple(PromptPair(pair["harmful"], pair["harmless"]) for pair in raw["pairs"])
    return RefusalData(pairs, tuple(raw["refusals"]), tuple(raw["compliant"]), tuple(raw["plain_texts"]))


def as_chats(requests: Sequence[str]) -> list[Chat]:
    """One user message each; a default system prompt is the chat template's business."""
    return [[{"role": "user", "content": request}] for request in requests]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Prompts with given replies, as tokens.

    Attributes:
        tokens: prompt and reply of each row, left-padded.
        is_reply: True at the tokens of the reply.
    """

    tokens: TokenBatch
    is_reply: Bool[Tensor, "batch pos"]


def exchanges(model: Model, requests: Sequence[str], replies: Sequence[str]) -> Exchange:
    """Each request in the model's chat template, followed by the reply of its index (replies are used in turn)."""
    prompts = model.tokens(as_chats(requests)).rows()
    said = model.tokens([replies[i % len(replies)] for i in range(len(requests))], bos=False).rows()
    rows = [[*prompt.tolist(), *reply.tolist()] for prompt, reply in zip(prompts, said, strict=True)]
    tokens = TokenBatch.pad(rows, pad_id=0, note="chat template with generation prompt, then the given reply").to(
        model.device
    )
    n_reply = torch.tensor([len(reply) for reply in said], device=model.device)
    column = torch.arange(tokens.ids.shape[1], device=model.device)
    return Exchange(tokens, column[None] >= tokens.ids.shape[1] - n_reply[:, None])
