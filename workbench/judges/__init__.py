"""Judges of explanations and texts: files, servers, log-probabilities of a local model."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
