"""Kinds of SAE that can be trained, each in its file; `workbench.saes.config.ARCHITECTURES` finds them here."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
