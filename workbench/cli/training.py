"""The options of a study that trains SAEs itself."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.saes.config import SAEConfig


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Sizes of the SAEs and of their training."""

    expansion: int = 8
    """Features of each SAE, as a multiple of the width of its site."""
    k: int = 32
    """Features that may be active on one token."""
    training_tokens: int = SAEConfig.tokens
    """Token-steps of training of each SAE."""

    def sae_config(self, width: int, seed: int = 0) -> SAEConfig:
        """The configuration for a site of this width."""
        return SAEConfig(d_sae=self.expansion * width, k=self.k, tokens=self.training_tokens, seed=seed)
