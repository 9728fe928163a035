"""Steering: features and directions added to the residual stream, beside their controls."""

from workbench.steering.measures import TextMeasures, continuation_nll, distinct_2, generation_success, lens_count
from workbench.steering.prompts import NEUTRAL_PROMPTS
from workbench.steering.report import SteeringReport, best_strength
from workbench.steering.steer import SteerOptions, steer

__all__ = [
    "NEUTRAL_PROMPTS", "SteerOptions", "SteeringReport", "TextMeasures", "best_strength", "continuation_nll", "distinct_2",
    "generation_success", "lens_count", "steer",
]  # fmt: skip
