"""Steering: features and directions added to the residual stream, beside their controls."""

from workbench.steering.directions import TwoByTwo, difference_of_means, directions_by_position, random_directions
from workbench.steering.measures import TextMeasures, continuation_nll, distinct_2, generation_success, lens_count
from workbench.steering.prompts import NEUTRAL_PROMPTS
from workbench.steering.refusal import RefusalOptions, refusal_study
from workbench.steering.refusal_report import RefusalReport
from workbench.steering.report import SteeringReport, best_strength
from workbench.steering.steer import SteerOptions, steer

__all__ = [
    "NEUTRAL_PROMPTS",
    "RefusalOptions",
    "RefusalReport",
    "SteerOptions",
    "SteeringReport",
    "TextMeasures",
    "TwoByTwo",
    "best_strength",
    "continuation_nll",
    "difference_of_means",
    "directions_by_position",
    "distinct_2",
    "generation_success",
    "lens_count",
    "random_directions",
    "refusal_study",
    "steer",
]
