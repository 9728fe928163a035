"""The steering of the study: every feature of every group beside its controls, a few features at a time, on disk."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from workbench.bases.sae import as_basis
from workbench.controls.arms import Sweep
from workbench.controls.directions import random_directions
from workbench.core.errors import InvalidInputError
from workbench.core.progress import Task
from workbench.core.records import to_jsonable
from workbench.engine.job import Made, Shard, Work, job_to_json, register_job
from workbench.engine.keeper import Keeper
from workbench.engine.shards import map_shards
from workbench.features.scores.logit_lens import target_site
from workbench.models.model import Model
from workbench.steering.selection.groups import Depth, StudyOptions
from workbench.steering.sweep.build import success_key
from workbench.steering.sweep.choose import best_strength, paper_strength
from workbench.steering.sweep.steer import Bench, sizes_of

if TYPE_CHECKING:
    import pandas as pd

TEXTS = "parquet"
ARMS = ("feature", "random", "unsteered")
BLOCK = 8
"""Features that are steered before their texts are written to disk."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Lens tokens and log-likelihood of texts, each feature at the strength chosen for it.

    Attributes:
        success: lens tokens per text, on the prompts that did not choose the strength.
        nll: nats per token of the same texts under the unsteered model.
        by_paper: lens tokens per text at the strength that the paper's rule chooses, on all prompts.
    """

    success: Float[np.ndarray, "features prompts"]
    nll: Float[np.ndarray, "features prompts"]
    by_paper: Float[np.ndarray, "features every"]

    def of(self, rows: Sequence[int]) -> Measured:
        """Some of the features."""
        at = list(rows)
        return Measured(self.success[at], self.nll[at], self.by_paper[at])


@dataclass(frozen=True, eq=False)
class Steered:
    """What the features of each group did at one depth, beside the controls with the same features' tokens.

    Attributes:
        feature: by group, under the features.
        random: under a random direction of the feature's norm, at strengths of its own.
        unsteered: without an edit.
    """

    feature: Mapping[str, Measured]
    random: Mapping[str, Measured]
    unsteered: Mapping[str, Measured]


def n_texts(groups: Mapping[str, Sequence[int]], options: StudyOptions) -> int:
    """Texts that are written for the groups of one depth."""
    features = len({f for group in groups.values() for f in group})
    return len(options.prompts) * (1 + 2 * features * len(options.strengths))


def steer_groups(
    model: Model,
    depth: Depth,
    groups: Mapping[str, Sequence[int]],
    options: StudyOptions,
    folder: Path | None,
    progress: Task,
) -> Steered:
    """Steers with every feature of the groups; texts that lie in the folder from an interrupted study are not redone.

    Args:
        model: the model.
        depth: the SAE and its scores.
        groups: features by group.
        options: strengths, prompts and details.
        folder: gets a Parquet file per eight features, one row per text; None keeps nothing.
        progress: advanced by texts.
    """
    every = sorted({f for group in groups.values() for f in group})
    job = SteerFeatures.of(model, depth, every, options, progress)
    with contextlib.ExitStack() as until_read:
        place = folder or Path(until_read.enter_context(tempfile.TemporaryDirectory()))
        keep = Keeper.of_key(place / f"layer{target_site(model, depth.sae).layer}", job_to_json(job))
        for receipt in keep.done().values():
            progress.skip(receipt.units)
        shards = [Shard(f"features-{start:04d}", start) for start in range(0, len(every), BLOCK)]
        # the bar is advanced text by text, not shard by shard
        parts = list(map_shards(job, shards, keep, progress=Task()))
        tables = [_table(keep, receipt.name) for receipt in parts]
    row_of = {feature: i for i, feature in enumerate(every)}
    by_arm = {arm: _measured(tables, arm, options) for arm in ARMS}
    rows = {name: [row_of[f] for f in group] for name, group in groups.items()}
    return Steered(*({name: by_arm[arm].of(at) for name, at in rows.items()} for arm in ARMS))


@dataclass(frozen=True, eq=False)
class _Loaded:
    """What a job of this process has at hand."""

    model: Model
    depth: Depth
    options: StudyOptions
    progress: Task


@register_job("steer-features")
@dataclass(frozen=True, kw_only=True)
class SteerFeatures:
    """Steers with the features of one SAE, a block of them per shard; the fields are all that texts depend on.

    Attributes:
        model: fingerprint.
        dtype: precision of the model, which the fingerprint leaves open.
        sae: fingerprint.
        site: where the model is steered.
        features: the features, of which a shard names the first.
        sizes: what strengths multiply; None takes the largest activation at each token.
        strengths: factors.
        prompts: texts to continue.
        details: further options of the steering.
        seed: of the random directions.
        loaded: the model and the SAE themselves.
    """

    model: str
    dtype: str
    sae: str
    site: str
    features: list[int]
    sizes: list[float] | None
    strengths: tuple[float, ...]
    prompts: tuple[str, ...]
    details: dict[str, object]
    seed: int
    loaded: _Loaded | None = field(default=None, metadata={"config": False}, compare=False)

    @classmethod
    def of(
        cls, model: Model, depth: Depth, features: Sequence[int], options: StudyOptions, progress: Task
    ) -> SteerFeatures:
        """The job for a model and an SAE that are loaded."""
        steering = replace(options.steering, table=depth.table)
        sizes = sizes_of(torch.tensor(features), steering)
        return cls(
            model=model.fingerprint,
            dtype=str(model.dtype),
            sae=as_basis(depth.sae).fingerprint,
            site=str(target_site(model, depth.sae)),
            features=list(features),
            sizes=None if sizes is None else sizes.tolist(),
            strengths=tuple(options.strengths),
            prompts=tuple(options.prompts),
            details={f.name: to_jsonable(getattr(steering, f.name)) for f in fields(steering) if f.name != "table"},
            seed=options.seed,
            loaded=_Loaded(model, depth, replace(options, steering=steering), progress),
        )

    def open(self) -> Work:
        """Writes the unsteered texts, with which those of every shard are compared."""
        if self.loaded is None:
            raise InvalidInputError(
                "SteerFeatures: its model and SAE are those of another process. Start the job there."
            )
        loaded, features = self.loaded, torch.tensor(self.features)
        vectors = as_basis(loaded.depth.sae).rows(features)
        # Drawn for all at once, so that a feature's random direction does not depend on how blocks are cut.
        noise = random_directions(vectors, seed=self.seed)
        site = target_site(loaded.model, loaded.depth.sae)
        bench = Bench(loaded.model, loaded.depth.sae, site, self.prompts, loaded.options.steering)
        base = bench.unsteered(loaded.progress)

        def work(shard: Shard) -> Made:
            import pandas as pd

            assert isinstance(shard.spec, int)
            some = slice(shard.spec, shard.spec + BLOCK)
            owners = features[some]
            names, tokens = tuple(owners.tolist()), bench.lens_of(owners)
            arms = Sweep.over(
                self.strengths, {"feature": bench.pushes(owners, vectors[some])},
                {"random": bench.pushes(owners, noise[some])},
            )  # fmt: skip
            texts = [bench.texts(arms.of(kind), names, tokens, loaded.progress) for kind in arms.kinds]
            frame = pd.DataFrame(
                [row for arm in (*texts, bench.measured(names, tokens, base)) for row in arm.rows(self.prompts)]
            )
            raw = io.BytesIO()
            frame.to_parquet(raw, index=False)
            return Made(
                files={TEXTS: [raw.getvalue()]}, units=2 * len(owners) * len(self.strengths) * len(self.prompts)
            )

        return work


def _table(keep: Keeper, part: str) -> pd.DataFrame:
    """The kept texts of a block, one row each."""
    import pandas as pd

    return pd.read_parquet(io.BytesIO(keep.file(part, TEXTS)))


def _measured(tables: Sequence[pd.DataFrame], arm: str, options: StudyOptions) -> Measured:
    """The texts of one arm, each feature at its strength."""
    import pandas as pd

    # pandas' own types don't tell a column from a table
    frame: Any = pd.concat([table[table["arm"] == arm] for table in tables])
    prompts = len(options.prompts)
    strengths = frame["strength"].nunique()
    count, nll = (
        frame[name].to_numpy(dtype=np.float64).reshape(-1, strengths, prompts)
        for name in (success_key(options.steering.k), "nll")
    )
    held_in, held_out = slice(0, None, 2), slice(1, None, 2)
    at = np.arange(len(count))
    best = [best_strength(c[:, held_in], p[:, held_in])[0] for c, p in zip(count, nll, strict=True)]
    paper = [paper_strength(c, p)[0] for c, p in zip(count, nll, strict=True)]
    return Measured(count[at, best][:, held_out], nll[at, best][:, held_out], count[at, paper])
