"""Units of known meaning over the tokens of a store, to test explainers and judges on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.core.errors import DegenerateInputError
from workbench.features.explain.rules import REACH, After, At, Both, InClass, Rule, TokenIn, TokenView
from workbench.features.passes.sampling import MISSING
from workbench.features.passes.store_pass import Chunk
from workbench.features.token_classes import TokenTexts

_CASINGS = ("a capitalised word", "all capitals", "a lower-case word")
FAMILIES = ("token", "token set", "conditional", "position", "casing", "digit")


@dataclass(frozen=True)
class KnownUnit:
    """A unit that is active, at 1, exactly where a rule fires."""

    family: str
    rule: Rule


@dataclass(frozen=True, eq=False)
class KnownUnits:
    """Known units as something that a pass over a store can read."""

    units: tuple[KnownUnit, ...]
    vocabulary: TokenTexts

    @property
    def ids(self) -> Int[Tensor, " n"]:
        """Number of each unit, from 0."""
        return torch.arange(len(self.units))

    def acts(self, chunk: Chunk) -> Float[Tensor, "tokens n"]:
        """1 where the rule fires, else 0."""
        view = view_of(chunk)
        fires = [unit.rule.fires(view, self.vocabulary) for unit in self.units]
        return torch.from_numpy(np.stack(fires, 1)).float()


def view_of(chunk: Chunk) -> TokenView:
    """The kept tokens of a chunk, with the tokens of their document that precede and follow them."""
    row, position = chunk.block.rows - chunk.first_row, chunk.block.positions
    start, end = chunk.documents()
    back = position[:, None] - torch.arange(1, REACH + 1)
    before = chunk.ids[row[:, None], back.clamp_min(0)].masked_fill(back < start[:, None], MISSING)
    after = chunk.ids[row, (position + 1).clamp_max(chunk.ids.shape[1] - 1)].masked_fill(position >= end, MISSING)
    return TokenView(chunk.block.tokens.numpy(), before.numpy(), position.numpy(), after.numpy())


def unit_bank(store: ActivationStore, *, per_family: int = 7, seed: int = 0) -> tuple[KnownUnit, ...]:
    """Units of six families over the tokens of a store's first shard; fewer of a family that the text does not show.

    "token" and "token set" (one of three tokens) take tokens of middling frequency, "conditional" a frequent token
    within eight tokens after another, "position" an interval, "casing" and "digit" a class of tokens.

    Raises:
        DegenerateInputError: if the text has too few different tokens.
    """
    rows = store.packed_rows(0)
    ids, counts = rows.unique(return_counts=True)
    special = torch.isin(ids, torch.tensor(store.manifest.special_ids, dtype=torch.long))
    some = ~special & (counts >= 3)
    order = counts[some].argsort(descending=True, stable=True)
    frequent = ids[some][order].tolist()
    if len(frequent) < 16:
        raise DegenerateInputError(
            f"unit_bank: only {len(frequent)} tokens occur three times in the first shard of {store}. Use more text."
        )
    random = np.random.default_rng(seed)
    middling = random.permutation(frequent[len(frequent) // 4 :]).tolist()
    common = random.permutation(frequent[: max(8, len(frequent) // 4)]).tolist()
    bank = [KnownUnit("token", TokenIn((t,))) for t in middling[:per_family]]
    sets = [tuple(sorted(middling[i : i + 3])) for i in range(0, 3 * per_family, 3)]
    bank += [KnownUnit("token set", TokenIn(s)) for s in sets if len(s) == 3]
    pairs = zip(common[::2], common[1::2], strict=False)
    bank += [KnownUnit("conditional", Both(TokenIn((a,)), After((b,), REACH))) for a, b in list(pairs)[:per_family]]
    edges = [e for e in (1, 2, 4, 8, 16, 32, 64, 128) if e < rows.shape[1]]
    bank += [KnownUnit("position", At(a, b)) for a, b in list(itertools.pairwise(edges))[:per_family]]
    bank += [KnownUnit("casing", InClass(name)) for name in _CASINGS]
    return (*bank, KnownUnit("digit", InClass("digits")))


def families(bank: Sequence[KnownUnit]) -> tuple[str, ...]:
    """The families in a bank, in their usual order."""
    present = {unit.family for unit in bank}
    return tuple(name for name in FAMILIES if name in present)
