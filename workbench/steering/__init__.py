"""Steering: features and directions added to the residual stream, beside their controls."""

from workbench.features.judge import parse_rating
from workbench.steering.baselines import METHODS, Concept, DirectionOptions, concept_directions
from workbench.steering.choose import best_strength, paper_strength, pareto_front
from workbench.steering.concepts import ConceptReport, steer_concepts
from workbench.steering.directions import TwoByTwo, difference_of_means, directions_by_position, random_directions
from workbench.steering.intervals import two_level
from workbench.steering.measures import (
    continuation_nll,
    distinct_2,
    distinct_n,
    generation_success,
    kl_divergence,
    lens_count,
    lens_log_odds,
    repeated,
)
from workbench.steering.options import SteerOptions
from workbench.steering.prompts import NEUTRAL_PROMPTS, PLAIN_TEXTS
from workbench.steering.rated import rate_texts, rating_gate
from workbench.steering.rating_questions import rating_prompts, templates_from
from workbench.steering.rating_report import RatingReport
from workbench.steering.ratings import harmonic_of_means, mean_of_harmonics
from workbench.steering.refusal import RefusalOptions, refusal_study
from workbench.steering.refusal_report import RefusalReport
from workbench.steering.report import SteeringReport
from workbench.steering.steer import steer
from workbench.steering.study import selection_study
from workbench.steering.study_groups import Depth, StudyOptions
from workbench.steering.study_report import SelectionReport

__all__ = [
    "METHODS",
    "NEUTRAL_PROMPTS",
    "PLAIN_TEXTS",
    "Concept",
    "ConceptReport",
    "Depth",
    "DirectionOptions",
    "RatingReport",
    "RefusalOptions",
    "RefusalReport",
    "SelectionReport",
    "SteerOptions",
    "SteeringReport",
    "StudyOptions",
    "TwoByTwo",
    "best_strength",
    "concept_directions",
    "continuation_nll",
    "difference_of_means",
    "directions_by_position",
    "distinct_2",
    "distinct_n",
    "generation_success",
    "harmonic_of_means",
    "kl_divergence",
    "lens_count",
    "lens_log_odds",
    "mean_of_harmonics",
    "paper_strength",
    "pareto_front",
    "parse_rating",
    "random_directions",
    "rate_texts",
    "rating_gate",
    "rating_prompts",
    "refusal_study",
    "repeated",
    "selection_study",
    "steer",
    "steer_concepts",
    "templates_from",
    "two_level",
]
