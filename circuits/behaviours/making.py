"""Pairs of a behaviour that suit the tokenizer of a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuits.behaviours.registry import BEHAVIOURS, SPLITS, Split
from circuits.pairs import Answered, Pairs, PromptPair, assembled, usable
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd


@checked
def pairs(name: str, model: Model, split: Split = "train", n: int = 100, seed: int = 0) -> Pairs:
    """Pairs of a behaviour: both prompts have as many tokens, both answers are one token for this tokenizer.

    They have one length if there are enough of one; otherwise as many as possible have. The same arguments give the
    same pairs. The splits share no noun, name or year that the answer depends on.

    Args:
        name: the behaviour, one of `names()`.
        model: whose tokenizer reads them.
        split: the words that the prompts are made of.
        n: how many.
        seed: which, and in what order.

    Raises:
        UnknownNameError: if there is no such behaviour.
        DegenerateInputError: if the tokenizer allows fewer; it says how many.
        InvalidInputError: if `n` is below 1.
    """
    if n < 1:
        raise InvalidInputError(f"pairs({name!r}, n={n}): give at least 1.")
    possible, why = 0, ""
    for candidates in BEHAVIOURS[name].candidates(split):
        rows = list(candidates)
        random.Random(f"{name}/{split}/{seed}").shuffle(rows)
        answered, reasons = _of_few_lengths(model, rows, n)
        if len(answered) == n:
            return assembled(model, rows, answered, f"{name}, {split} split, seed {seed}")
        possible, why = max(possible, len(answered)), next(iter(reasons.values()), why)
    because = f" Of the others, one: {why}" if why else ""
    todo = f"Ask for at most n={possible}, or for another behaviour." if possible else "Choose another behaviour."
    raise DegenerateInputError(
        f"pairs({name!r}, split={split!r}, n={n}): with the tokenizer of {model.name} "
        f"{counted(possible, 'pairs')} are possible.{because} {todo}"
    )


def _of_few_lengths(model: Model, rows: Sequence[PromptPair], n: int) -> tuple[dict[int, Answered], dict[int, str]]:
    """The first `n` usable rows of one length; the most of the commonest lengths where no length has so many."""
    by_length: dict[int, dict[int, Answered]] = {}
    reasons: dict[int, str] = {}
    step = max(64, n)
    for start in range(0, len(rows), step):
        found, unusable = usable(model, rows[start : start + step])
        reasons |= {start + i: why for i, why in unusable.items()}
        for i, answered in found.items():
            of_length = by_length.setdefault(answered.length, {})
            of_length[start + i] = answered
            if len(of_length) == n:
                return of_length, reasons
    commonest = sorted(by_length, key=lambda length: (-len(by_length[length]), length))
    every = [item for length in commonest for item in by_length[length].items()]
    return dict(every[:n]), reasons


def names() -> tuple[str, ...]:
    """The behaviours there are."""
    return tuple(BEHAVIOURS)


def frame() -> pd.DataFrame:
    """One row per behaviour: what it tests, an example, how many pairs each split has before a tokenizer reads them."""
    import pandas as pd

    rows = []
    for name, behaviour in BEHAVIOURS.items():
        sets = {split: behaviour.candidates(split) for split in SPLITS}
        example = sets["train"][0][0]
        sizes = {split: max(map(len, sets[split])) for split in SPLITS}
        rows.append(
            {
                "behaviour": name, "about": behaviour.about, "clean_prefix": example.clean,
                "patch_prefix": example.patch, "clean_answer": example.clean_answer,
                "patch_answer": example.patch_answer, **sizes,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
