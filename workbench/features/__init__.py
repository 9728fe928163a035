"""Features of an SAE: what they read (input score), what they write (output score), where they are active."""

from workbench.features.contexts import ContextOptions, TopContexts, top_contexts
from workbench.features.input_score import input_score
from workbench.features.lens import LensTokens, lens_tokens
from workbench.features.output_score import (
    OutputOptions,
    OutputScores,
    confidence,
    direction_scores,
    output_score,
    output_score_delta,
    output_scores,
    rank_score,
)
from workbench.features.report import FeatureScoreReport
from workbench.features.scores import ScoreOptions, score_features
from workbench.features.table import FeatureTable

__all__ = [
    "ContextOptions",
    "FeatureScoreReport",
    "FeatureTable",
    "LensTokens",
    "OutputOptions",
    "OutputScores",
    "ScoreOptions",
    "TopContexts",
    "confidence",
    "direction_scores",
    "input_score",
    "lens_tokens",
    "output_score",
    "output_score_delta",
    "output_scores",
    "rank_score",
    "score_features",
    "top_contexts",
]
