"""Refusal: how often a model refuses, the direction that decides it, and the edits that this makes."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
