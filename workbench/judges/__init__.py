"""Judges: whoever answers questions with numbers (a model, a server, a file, a person), and which are believed."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
