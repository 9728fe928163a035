"""The behaviours that have a name; a new one is one file that registers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from circuits.pairs import PromptPair
from workbench.core.display import OneLine
from workbench.core.registry import Registry

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Behaviour(OneLine):
    """What a model does with prompts of one kind, and all prompts of this kind.

    Attributes:
        about: what is tested, in one sentence.
        candidates: from a split to sets of pairs, each in any order. Not every pair suits every tokenizer: the first
            set is taken that has enough pairs for it. The splits share no content word that the answer depends on.
    """

    about: str
    candidates: Callable[[Split], Sequence[Sequence[PromptPair]]]


BEHAVIOURS: Registry[Behaviour] = Registry("behaviour", "circuits.behaviours.kinds")
"""Behaviours by the name that `circuits.behaviours.pairs` takes.

A file of `circuits/behaviours/kinds` is found by itself; one elsewhere has to be imported.
"""
