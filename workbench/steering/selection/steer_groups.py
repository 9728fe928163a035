"""The steering of the study: every feature of every group beside its controls, a few features at a time, on disk."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from workbench.bases.saecode import decoder_rows, sae_fingerprint
from workbench.controls.arms import Sweep
from workbench.controls.directions import random_directions
from workbench.core.progress import Task
from workbench.core.records import to_jsonable, write_atomic
from workbench.features.scores.logit_lens import target_site
from workbench.models.model import Model
from workbench.steering.selection.groups import Depth, StudyOptions
from workbench.steering.sweep.arms import ArmTexts
from workbench.steering.sweep.build import success_key
from workbench.steering.sweep.choose import best_strength, paper_strength
from workbench.steering.sweep.steer import Bench, sizes_of

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
    work = _Work(model, depth, every, options, folder)
    tables = [work.block(start, progress) for start in range(0, len(every), BLOCK)]
    place = {feature: i for i, feature in enumerate(every)}
    by_arm = {arm: _measured(tables, arm, options) for arm in ARMS}
    at = {name: [place[f] for f in group] for name, group in groups.items()}
    return Steered(*({name: by_arm[arm].of(rows) for name, rows in at.items()} for arm in ARMS))


class _Work:
    """The features of one SAE in blocks; the model is touched only for blocks that are not on disk."""

    def __init__(
        self, model: Model, depth: Depth, features: Sequence[int], options: StudyOptions, folder: Path | None
    ) -> None:
        self._features = torch.tensor(features)
        self._vectors = decoder_rows(depth.sae, self._features)
        # Drawn for all at once, so that a feature's random direction does not depend on how blocks are cut.
        self._noise = random_directions(self._vectors, seed=options.seed)
        self._options, self._steering = options, replace(options.steering, table=depth.table)
        self._parts = (model, depth.sae, target_site(model, depth.sae))
        self._bench: Bench | None = None
        self._folder = None if folder is None else folder / f"layer{self._parts[2].layer}-{self._key(model)}"
        self._base: Any = None

    def _key(self, model: Model) -> str:
        """Changes with everything that texts depend on."""
        details = {f.name: getattr(self._steering, f.name) for f in fields(self._steering) if f.name != "table"}
        sizes = sizes_of(self._features, self._steering)
        kept = [model.fingerprint, str(self._parts[2]), sae_fingerprint(self._parts[1]), self._features.tolist(),
                None if sizes is None else sizes.tolist(), self._options.strengths, self._options.prompts, details,
                self._options.seed]  # fmt: skip
        return hashlib.sha256(repr(to_jsonable(kept)).encode()).hexdigest()[:12]

    def block(self, start: int, progress: Task) -> Any:
        """One row per text of the features from `start` on, as a pandas frame."""
        import pandas as pd

        file = None if self._folder is None else self._folder / f"features-{start:04d}.parquet"
        if file is not None and file.is_file():
            known: Any = pd.read_parquet(file)
            progress.advance(int((known["arm"] != "unsteered").sum()))
            return known
        frame = pd.DataFrame([row for arm in self._arms(start, progress) for row in arm.rows(self._options.prompts)])
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            frame.to_parquet(buffer, index=False)
            write_atomic(file, buffer.getvalue())
        return frame

    def _arms(self, start: int, progress: Task) -> list[ArmTexts]:
        if self._bench is None:
            self._bench = Bench(*self._parts, self._options.prompts, self._steering)
            self._base = self._bench.unsteered(progress)
        bench, some = self._bench, slice(start, start + BLOCK)
        owners = self._features[some]
        sweep = Sweep.over(
            self._options.strengths, {"feature": bench.pushes(owners, self._vectors[some])},
            {"random": bench.pushes(owners, self._noise[some])},
        )  # fmt: skip
        names, tokens = tuple(owners.tolist()), bench.lens_of(owners)
        texts = [bench.texts(sweep.of(kind), names, tokens, progress) for kind in sweep.kinds]
        return [*texts, bench.measured(names, tokens, self._base)]


def _measured(tables: Sequence[Any], arm: str, options: StudyOptions) -> Measured:
    """The texts of one arm, each feature at its strength."""
    import pandas as pd

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
