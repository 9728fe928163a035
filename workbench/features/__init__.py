"""Features of an SAE: what they read (input score), what they write (output score), where they are active."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
