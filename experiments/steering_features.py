"""Do features with a high output score steer what the model writes, and at what price?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from workbench.cli.base import Command
from workbench.errors import InvalidInputError
from workbench.features import FeatureTable
from workbench.models.model import Model
from workbench.steering import NEUTRAL_PROMPTS, SteeringReport, SteerOptions, steer

STRENGTHS = (1.5, 3.0)


def study(
    model: Model,
    sae: Any,
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
    return steer(model, sae, features, strengths, prompts, table.worst_matched(features), options=options)


@dataclass(frozen=True, kw_only=True)
class Steer(Command):
    """Steer neutral prompts with SAE features, beside their controls.

    Controls are the unsteered model, random directions of equal norm, and features that should not steer.
    """

    sae: tyro.conf.Positional[Path]
    """Folder of the SAE."""
    table: Path | None = None
    """Folder of a feature table, from `workbench features score`; it chooses the features and the poor ones."""
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

    def run(self) -> None:
        """Steer, save the run folder, and say what was found."""
        from workbench.models.loading import load_model
        from workbench.saes.io import load_sae

        if self.table is None and not self.features:
            raise InvalidInputError("steer: no features to steer with. Give --table FOLDER, or --features 12 34.")
        sae, table = load_sae(self.sae), None if self.table is None else FeatureTable.load(self.table)
        options = SteerOptions(
            new_tokens=self.new_tokens, seed=self.seed, temperature=self.temperature, scope=self.scope
        )
        prompts = self.prompts or NEUTRAL_PROMPTS[: self.n_prompts]
        model = load_model(self.model)
        with self.start("steer") as run:
            run.note_model(model)
            if self.features or table is None:
                poor = () if table is None else table.worst_matched(self.features)
                report = steer(model, sae, self.features, self.strengths, prompts, poor, options=options)
            else:
                report = study(model, sae, table, self.n_features, self.strengths, prompts, options)
            run.save_step("steering", report.section())
            html = run.finish(f"Steering with features of {self.sae.name}")
        self.emit(report.to_json() | {"run": run.path, "report": html}, self._lines(report, html))

    def _lines(self, report: SteeringReport, html: Path) -> Iterator[str]:
        yield from (f"- {finding}" for finding in report.findings())
        yield report.example_title
        for prompt, unsteered, steered in report.examples:
            yield f"{prompt}\n    unsteered: {unsteered!r}\n    steered:   {steered!r}"
        yield f"Report: {html}"


if __name__ == "__main__":
    tyro.cli(Steer).run()
