"""Features of an SAE: what they read (input score), what they write (output score), where they are active."""

from workbench.features.cardmaking import CardOptions, feature_cards
from workbench.features.cards import Explanation, FeatureCard, LensToken, Neighbour, SteeringExample, Window
from workbench.features.cardset import CardSet
from workbench.features.contexts import ContextOptions, TopContexts, top_contexts
from workbench.features.examples import ExampleOptions, examples_of
from workbench.features.explain import explain_by_rules, score_rules
from workbench.features.input_score import input_score
from workbench.features.judge import Gate, GateOptions, Judge, judge_explanations, judge_gate
from workbench.features.judges import FileJudge, HTTPJudge, LogProbJudge
from workbench.features.lens import LensEnds, LensTokens, lens_ends, lens_tokens
from workbench.features.neighbours import NeighbourOptions, activation_neighbours, decoder_neighbours
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
from workbench.features.passes import SAEFeatures
from workbench.features.profile import DepthScores, depth_scores
from workbench.features.report import FeatureScoreReport
from workbench.features.scores import ScoreOptions, score_features
from workbench.features.similar import IntruderScore, intruder_score
from workbench.features.table import FeatureTable
from workbench.features.windows import FeatureWindows, WindowOptions, collect_windows

__all__ = [
    "CardOptions",
    "CardSet",
    "ContextOptions",
    "DepthScores",
    "ExampleOptions",
    "Explanation",
    "FeatureCard",
    "FeatureScoreReport",
    "FeatureTable",
    "FeatureWindows",
    "FileJudge",
    "Gate",
    "GateOptions",
    "HTTPJudge",
    "IntruderScore",
    "Judge",
    "LensEnds",
    "LensToken",
    "LensTokens",
    "LogProbJudge",
    "Neighbour",
    "NeighbourOptions",
    "OutputOptions",
    "OutputScores",
    "SAEFeatures",
    "ScoreOptions",
    "SteeringExample",
    "TopContexts",
    "Window",
    "WindowOptions",
    "activation_neighbours",
    "collect_windows",
    "confidence",
    "decoder_neighbours",
    "depth_scores",
    "direction_scores",
    "examples_of",
    "explain_by_rules",
    "feature_cards",
    "input_score",
    "intruder_score",
    "judge_explanations",
    "judge_gate",
    "lens_ends",
    "lens_tokens",
    "output_score",
    "output_score_delta",
    "output_scores",
    "rank_score",
    "score_features",
    "score_rules",
    "top_contexts",
]
