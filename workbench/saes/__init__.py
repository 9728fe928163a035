"""Sparse autoencoders: training, saving in the format of sae_lens, evaluation."""

from workbench.core.surface import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
