"""Data for circuits: behaviours that templates make, with words of their own for training and for test."""

from __future__ import annotations

from circuits.behaviours.accuracy import Accuracy, accuracy
from circuits.behaviours.making import frame, names, pairs
from circuits.behaviours.registry import BEHAVIOURS, Behaviour

__all__ = ["BEHAVIOURS", "Accuracy", "Behaviour", "accuracy", "frame", "names", "pairs"]
