"""Linear probes on pooled activations, and erasers and transports of what they read."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
