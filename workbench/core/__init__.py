"""What everything else stands on: errors, records, statistics, progress, tokens. Knows no model."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
