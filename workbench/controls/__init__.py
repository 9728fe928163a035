"""What every result is compared with: matched features, random directions; which tokens count, arms, methods."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
