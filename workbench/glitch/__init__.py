"""Glitch tokens: tokenizer analysis, a ranking from the weights alone, tests beside controls, census, lint, repair."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
