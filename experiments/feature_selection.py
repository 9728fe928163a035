"""Do output features lie deep, and does selecting them make steering work?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro

from workbench.activations.harvest import harvest
from workbench.activations.sources import SelfText
from workbench.cli.study import Begin, Study
from workbench.cli.training import TrainingOptions
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted
from workbench.core.progress import clock
from workbench.features import ContextOptions, FeatureTable, ScoreOptions, score_features
from workbench.models.model import Model
from workbench.saes.config import SAEConfig
from workbench.saes.training.train import train_saes
from workbench.steering import SteerOptions
from workbench.steering.selection.groups import GROUPS, Depth, StudyOptions
from workbench.steering.selection.selection_report import SelectionReport
from workbench.steering.selection.study import selection_study
from workbench.steering.sweep.prompts import neutral_prompts

DEPTHS = (1 / 6, 1 / 2, 5 / 6)
"""Where the study reads by default, as shares of the blocks."""
TRAINING_COST = 4.0
"""A training step of a TopK SAE beside the encoder's matrix product alone."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the study that trains its own SAEs.

    Attributes:
        layers: where the SAEs read; () takes three depths.
        tokens: tokens that the model writes.
        context: tokens per row of its text.
        sae: the SAEs and their training; the site is set per layer.
        scores: details of the feature scores.
        study: groups, strengths and prompts.
    """

    layers: tuple[int, ...] = ()
    tokens: int = 65_536
    context: int = SelfText.context
    sae: SAEConfig = field(default_factory=SAEConfig)
    scores: ScoreOptions = field(default_factory=ScoreOptions)
    study: StudyOptions = field(default_factory=StudyOptions)

    def layers_of(self, model: Model) -> tuple[int, ...]:
        """Where the SAEs read in this model."""
        return self.layers or tuple(dict.fromkeys(int(depth * model.n_layers) for depth in DEPTHS))


@dataclass(frozen=True)
class StudyTime:
    """About how long the study takes from nothing, in seconds per part.

    Attributes:
        writing: the text and its activations.
        training: all SAEs.
        scoring: all features.
        steering: all groups, at most.
        texts: steered texts, at most.
    """

    writing: float
    training: float
    scoring: float
    steering: float
    texts: int

    def __str__(self) -> str:
        """One line.

        >>> str(StudyTime(60.0, 60.0, 60.0, 120.0, 1000))
        'about 5 min 0 s: writing 1 min 0 s, training 1 min 0 s, scoring 1 min 0 s, 1000 texts 2 min 0 s'
        """
        parts = {"writing": self.writing, "training": self.training, "scoring": self.scoring,
                 f"{counted(self.texts, 'texts')}": self.steering}  # fmt: skip
        each = ", ".join(f"{name} {clock(seconds)}" for name, seconds in parts.items())
        return f"about {clock(sum(parts.values()))}: {each}"


@torch.no_grad()
def study_time(model: Model, sizes: Sizes) -> StudyTime:
    """Measures the speed of generation and of an encoder for a few seconds, and multiplies."""
    depths, study = len(sizes.layers_of(model)), sizes.study
    rows = [study.prompts[i % 4] for i in range(study.steering.batch_size)]
    start = time.perf_counter()
    model.generate(rows, 8, seed=study.seed, batch_size=len(rows))
    per_token = (time.perf_counter() - start) / (8 * len(rows))
    x, encoder = torch.zeros(sizes.sae.batch, model.d_model), torch.zeros(model.d_model, sizes.sae.d_sae)
    products = []
    for _ in range(4):  # the first one is slower; of the others the least disturbed counts
        start = time.perf_counter()
        torch.mm(x, encoder)
        products.append(time.perf_counter() - start)
    per_step = TRAINING_COST * min(products)
    features = len(GROUPS) * study.n_features * depths
    texts = len(study.prompts) * (depths + 2 * features * len(study.strengths))
    return StudyTime(
        writing=sizes.tokens * per_token, training=depths * sizes.sae.tokens / sizes.sae.batch * per_step,
        scoring=depths * sizes.sae.d_sae * per_token, steering=texts * study.steering.new_tokens * per_token,
        texts=texts,
    )  # fmt: skip


def selection(model: Model, folder: Path, sizes: Sizes | None = None) -> SelectionReport:
    """Own text, SAEs at several depths in one pass, their scores, and the study of selection; resumed in its folder.

    Args:
        model: the model.
        folder: gets the store, the SAEs and the feature tables.
        sizes: how much of everything.
    """
    from workbench.saes.formats.load import load_sae

    sizes = sizes or Sizes()
    sites = [str(model.resolve(f"resid_post.{layer}")) for layer in sizes.layers_of(model)]
    source = SelfText(tokens=sizes.tokens, context=sizes.context, seed=sizes.study.seed)
    store = harvest(model, source, sites, folder / "store")
    runs = train_saes(store, [replace(sizes.sae, site=site) for site in sites], folder / "saes")
    depths = []
    for run in runs:
        sae, place = load_sae(run.path), folder / "features" / run.path.name
        if not (place / "features.parquet").is_file():
            score_features(model, sae, store, options=sizes.scores).save(place)
        depths.append(Depth(sae, FeatureTable.load(place)))
    return selection_study(model, depths, sizes.study, folder / "texts")


@dataclass(frozen=True, kw_only=True)
class SteeringStudy(TrainingOptions, Study[SelectionReport]):
    """Test which features steer, with SAEs at several depths.

    The model writes text, SAEs are trained on it in one pass, all features are scored, and groups of features selected
    in different ways are steered with. Three published claims get a verdict each, with intervals and controls.

    Example: workbench features study --estimate
    """

    run_name, step = "steering-study", "selection"

    saes: tuple[Path, ...] = ()
    """Folders of SAEs at different layers, instead of training some; each needs a table."""
    tables: tuple[Path, ...] = ()
    """Folders of their feature tables, in the same order, from `workbench features score`."""
    layers: tuple[int, ...] = ()
    """Layers of the SAEs that are trained; by default at a sixth, a half and five sixths of the depth."""
    tokens: int = Sizes.tokens
    """Tokens of its own text that the model writes."""
    max_tokens: int = Sizes.tokens
    """Stored tokens that are read for contexts."""
    n_features: int = 20
    """Features per group and layer."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Factors on the largest feature activation at each token."""
    n_prompts: int = 12
    """How many of the built-in neutral prompts; half of them choose the strengths."""
    new_tokens: int = 20
    """Tokens to write."""
    threshold: float = 0.01
    """Output score from which a feature counts as an output feature."""
    estimate: bool = field(default=False, metadata={"config": False})
    """Say how long the study takes here, and do nothing."""

    def options(self) -> StudyOptions:
        """What the library is called with."""
        steering = SteerOptions(new_tokens=self.new_tokens, seed=self.seed, plain_texts=())
        return StudyOptions(
            n_features=self.n_features, strengths=self.strengths, threshold=self.threshold,
            prompts=neutral_prompts(self.n_prompts), steering=steering, seed=self.seed,
        )  # fmt: skip

    def sizes(self, model: Model) -> Sizes:
        """The same for a study that trains its own SAEs."""
        sae = self.sae_config(model.d_model, self.seed)
        scores = ScoreOptions(contexts=ContextOptions(max_tokens=self.max_tokens), seed=self.seed)
        return Sizes(layers=self.layers, tokens=self.tokens, sae=sae, scores=scores, study=self.options())

    def measure(self, begin: Begin) -> SelectionReport | None:
        from workbench.saes.formats.load import load_sae

        if len(self.saes) != len(self.tables):
            raise InvalidInputError(
                f"{len(self.saes)} SAEs and {len(self.tables)} tables: give each SAE of --saes its table in --tables."
            )
        model = self.load_model()
        sizes = self.sizes(model)
        expected = None if self.saes else study_time(model, sizes)
        if self.estimate:
            if expected is None:
                raise InvalidInputError("--estimate is for the whole study. Leave out --saes and --tables.")
            self.emit({"seconds": expected}, [f"{expected}."])
            return None
        if expected is not None and not self.json:
            self.emit({}, [f"From nothing {expected}. It can be stopped at any time; the same command continues."])
        run = begin(model)
        if not self.saes:
            return selection(model, run.artifacts, sizes)
        pairs = zip(self.saes, self.tables, strict=True)
        depths = [Depth(load_sae(folder), FeatureTable.load(table)) for folder, table in pairs]
        return selection_study(model, depths, self.options(), run.artifacts / "texts")

    def title(self, report: SelectionReport) -> str:
        return "Which features steer"

    def summary(self, report: SelectionReport, folder: Path) -> Mapping[str, object]:
        return report.to_json()


if __name__ == "__main__":
    tyro.cli(SteeringStudy).run()
