"""Cues that texts carry, such as their length, and tasks in which such a cue goes with the label."""

from __future__ import annotations

from circuits.cues.kinds import (
    Casing,
    Cluster,
    Cue,
    FirstNoun,
    FirstVerb,
    Length,
    Punctuation,
    Token,
)
from circuits.cues.known import known_cue
from circuits.cues.making import mcc, with_cues
from circuits.cues.named import cue_named

__all__ = [
    "Casing",
    "Cluster",
    "Cue",
    "FirstNoun",
    "FirstVerb",
    "Length",
    "Punctuation",
    "Token",
    "cue_named",
    "known_cue",
    "mcc",
    "with_cues",
]
