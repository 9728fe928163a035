"""Steering: features and directions added to the residual stream, beside their controls."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
