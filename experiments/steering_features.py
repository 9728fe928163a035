"""Do features with a high output score steer what the model writes, at what price?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from workbench.bases.sae import SAELike
from workbench.cli.base import typed
from workbench.cli.study import Begin, SAEStudy
from workbench.core.errors import InvalidInputError
from workbench.features import FeatureTable
from workbench.models.model import Model
from workbench.steering import SteeringReport, SteerOptions, steer
from workbench.steering.sweep.prompts import NEUTRAL_PROMPTS, neutral_prompts

STRENGTHS = (1.5, 3.0)


def study(
    model: Model,
    sae: SAELike,
    table: FeatureTable,
    n_features: int = 6,
    strengths: Sequence[float] = STRENGTHS,
    prompts: Sequence[str] = NEUTRAL_PROMPTS[:12],
    options: SteerOptions | None = None,
) -> SteeringReport:
    """Steers with the best features of a table, beside as many of the worst ones matched on frequency.

    Args:
        model: the model that the SAE was trained on.
        sae: the SAE.
        table: its feature scores.
        n_features: how many of the features with the highest output scores.
        strengths: factors on the largest activation at each token.
        prompts: neutral texts; half of them choose the strengths.
        options: details.
    """
    features = table.select(n_features)
    options = replace(options or SteerOptions(), table=table)
    return steer(model, sae, features, strengths, prompts, table.worst_matched(features), options)


@dataclass(frozen=True, kw_only=True)
class Steer(SAEStudy[SteeringReport]):
    """Steer neutral prompts with SAE features, beside controls.

    Controls are the unsteered model, random directions of equal norm, and features that should not steer.

    Example: workbench steer sae --n-features 6
    """

    run_name, step = "steer", "steering"

    table: Path | None = None
    """Folder of the feature table that chooses the features and the poor ones; by default the SAE's own."""
    features: tuple[int, ...] = ()
    """Features to steer with, instead of those that the table chooses."""
    n_features: int = 6
    """How many features the table chooses."""
    strengths: tuple[float, ...] = STRENGTHS
    """Factors on the largest feature activation at each token."""
    n_prompts: int = 12
    """How many of the built-in neutral prompts; half of them choose the strengths."""
    prompts: tuple[str, ...] = ()
    """Prompts to use instead of the built-in ones."""
    new_tokens: int = 20
    """Tokens to write."""
    temperature: float = 0.7
    """Sampling temperature."""
    scope: Literal["last+generated", "all"] = "last+generated"
    """Steer the last prompt token and what is generated, or every token."""
    stop: tuple[str, ...] = ()
    """Strings that end a continuation, such as "."."""
    a_max: Literal["token", "dataset"] = "token"
    """What strengths multiply: the largest activation at each token, or each feature's own largest in the table."""

    def measure(self, begin: Begin) -> SteeringReport:
        from workbench.saes.formats.load import load_sae

        own = self.home().table
        place = self.table or (own if own.is_dir() else None)
        if place is None and not self.features:
            raise InvalidInputError(
                "steer: no features to steer with. Give --features 12 34, or score them first: "
                f"{typed('features', 'score', self.sae_path())}"
            )
        sae, table = load_sae(self.sae_path()), None if place is None else FeatureTable.load(place)
        options = SteerOptions(
            new_tokens=self.new_tokens, seed=self.seed, temperature=self.temperature, scope=self.scope, stop=self.stop,
            a_max=self.a_max, table=table,
        )  # fmt: skip
        prompts = self.prompts or neutral_prompts(self.n_prompts)
        model = self.load_model()
        run = begin(model)
        if self.features or table is None:
            poor = () if table is None else table.worst_matched(self.features)
            report = steer(model, sae, self.features, self.strengths, prompts, poor, options=options)
        else:
            report = study(model, sae, table, self.n_features, self.strengths, prompts, options)
        report.frame().to_parquet(run.artifacts / "texts.parquet", index=False)
        return report

    def title(self, report: SteeringReport) -> str:
        return f"Steering with features of {self.sae.name}"

    def summary(self, report: SteeringReport, folder: Path) -> Mapping[str, object]:
        return report.to_json()

    def following(self, report: SteeringReport, folder: Path) -> str:
        return typed("features", "cards", self.sae_path())

    def details(self, report: SteeringReport, folder: Path) -> Iterator[str]:
        yield report.example_title
        for prompt, unsteered, steered in report.examples:
            yield f"{prompt}\n    unsteered: {unsteered!r}\n    steered:   {steered!r}"


if __name__ == "__main__":
    tyro.cli(Steer).run()
