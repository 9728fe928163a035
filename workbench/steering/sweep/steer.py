"""Steering with SAE features, beside everything else that might have done the same."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.saecode import decoder_rows, writing
from workbench.controls.directions import random_directions
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.progress import Task, task
from workbench.core.tokens import TokenBatch
from workbench.features.scores.logit_lens import feature_ids, lens_tokens, target_site
from workbench.features.scores.table import FeatureTable
from workbench.features.token_classes import TokenTexts
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.steering.sweep.arms import Arm, EditSummary
from workbench.steering.sweep.build import build_report
from workbench.steering.sweep.options import SCOPES, SteerOptions
from workbench.steering.sweep.prompts import INSTRUCTION, NEUTRAL_PROMPTS
from workbench.steering.sweep.rows import Harm, Pushes, Sweep, Written
from workbench.steering.sweep.steering_report import SteeringReport

PLAIN_LENGTH = 64
INSTRUCTION_WORDS = 6
NEAREST = 20
"""A match is drawn among at most so many features, and among no more than a twentieth of all."""
ALIKE = 1.5


@checked
def steer(
    model: Model,
    sae: Any,
    features: Sequence[int],
    strengths: Sequence[float] = (1.5, 3.0),
    prompts: Sequence[str] = NEUTRAL_PROMPTS,
    control_features: Sequence[int] = (),
    options: SteerOptions | None = None,
) -> SteeringReport:
    """Continues every prompt with every feature at every strength and with the controls, under the same randomness.

    The edit is `x + strength * a_max * W_dec[f]`, a_max being the largest feature activation at the token. Controls,
    always: the unsteered model; for each feature a random direction of the norm of `W_dec[f]`, the same feature
    subtracted, and its lens tokens asked for in words; random features of like frequency; and, if given,
    `control_features`, such as those with the lowest output scores. Each feature's strength is chosen on every other
    prompt, and the results are from the prompts that had no say in it; beside it stands what the paper's rule chooses.

    Args:
        model: the model that the SAE was trained on.
        sae: an SAE in the sae_lens form.
        features: which features to steer with.
        strengths: factors on a_max.
        prompts: neutral texts.
        control_features: features that are expected not to steer.
        options: details, such as a feature table that says how frequent the features are.

    Raises:
        InvalidInputError: for unknown features, fewer than four prompts, or strengths that are not positive.
        EditError: if an edit did not happen.

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063), equation 6 with the error kept.
    """
    options = options or SteerOptions()
    _check(features, strengths, prompts, control_features)
    if options.table is not None:
        options.table.check(model, sae)
    chosen = feature_ids(sae, features)
    matched, by_frequency = matched_features(sae, chosen.tolist(), control_features, options)
    sets = {"feature": chosen}
    sets |= {"matched": torch.tensor(matched)} if matched else {}
    sets |= {"control": feature_ids(sae, control_features)} if len(control_features) else {}
    bench = Bench(model, sae, target_site(model, sae, options.site), prompts, options)
    bench.require_room(bench.lens_of(chosen))
    directions = decoder_rows(sae, chosen)
    planned = [("feature", chosen, directions), ("negated", chosen, -directions)]
    planned.append(("random", chosen, random_directions(directions, seed=options.seed)))
    planned += [(name, ids, decoder_rows(sae, ids)) for name, ids in sets.items() if name != "feature"]
    edits = len(strengths) * sum(len(ids) for _, ids, _ in planned)
    with task(total=len(prompts) * (1 + edits + len(chosen)), description="steering", unit="texts") as progress:
        base = bench.sweep.unsteered(progress)
        arms = [
            bench.arm(name, PushSet(ids, vectors, sizes_of(ids, options)), strengths, progress)
            for name, ids, vectors in planned
        ]
        arms.append(bench.prompted(chosen, progress))
    bases = {name: bench.unsteered(ids, base) for name, ids in sets.items()}
    settings = {
        "model": model.name, "site": str(bench.sweep.site), "scope": str(SCOPES[options.scope]),
        "strengths": list(strengths), "new_tokens": options.new_tokens, "temperature": options.temperature,
        "seed": options.seed, "k": options.k, "a_max": options.a_max, "stop": list(options.stop),
        "features": chosen.tolist(), "control_features": [int(f) for f in control_features],
        "matched_features": matched, "matched_on_frequency": by_frequency,
        "matched_ratio": frequency_ratio(options.table, chosen.tolist(), matched),
        "shared_prefix": bench.sweep.shares_prefix,
    }  # fmt: skip
    return build_report(settings, tuple(prompts), bench.words(chosen), arms, bases)


def _check(
    features: Sequence[int], strengths: Sequence[float], prompts: Sequence[str], control_features: Sequence[int]
) -> None:
    check_prompts(prompts, strengths, "steer")
    both = set(map(int, features)) & set(map(int, control_features))
    if both:
        raise DegenerateInputError(
            f"steer: features {sorted(both)} are steered and controls at once. Remove them from one."
        )


def check_prompts(prompts: Sequence[str], strengths: Sequence[float], caller: str) -> None:
    """Raises InvalidInputError for prompts or strengths that a strength can't be chosen with."""
    if isinstance(prompts, str) or len(prompts) < 4 or len(set(prompts)) != len(prompts):
        raise InvalidInputError(
            f"{caller}: got {1 if isinstance(prompts, str) else len(prompts)} prompts. Give at least four different "
            "ones: half of them choose the strength, the others measure."
        )
    if not len(strengths) or not all(0 < s < math.inf for s in strengths) or len(set(strengths)) != len(strengths):
        raise InvalidInputError(
            f"{caller}(strengths={list(strengths)}): give different positive, finite factors; the unsteered model "
            "always runs."
        )


def matched_features(
    sae: Any, features: Sequence[int], control_features: Sequence[int], options: SteerOptions
) -> tuple[list[int], bool]:
    """For each feature another one drawn at random among the nearest in frequency, and whether frequencies were known.

    It is drawn among the `NEAREST` that are at most `ALIKE` times as frequent or rare; the very nearest where none is.
    Without frequencies it is drawn from all. Features that are steered, or controls, are not drawn; where too few
    others are there, there are as many as can be had.
    """
    taken = {int(f) for f in (*features, *control_features)}
    frequency = frequencies(options.table, int(sae.W_dec.shape[0]))
    known = bool(np.isfinite(frequency).any())
    writes = writing(sae).tolist()
    pool = [f for f in range(len(frequency)) if f not in taken and writes[f] and (not known or frequency[f] > 0)]
    random = np.random.default_rng(options.seed)
    found: list[int] = []
    for feature in features:
        if not pool:
            break
        target = frequency[int(feature)]
        if known and np.isfinite(target):
            far = np.abs(np.log(frequency[pool] + 1e-12) - np.log(target + 1e-12))
            order = np.argsort(far, kind="stable")[: min(NEAREST, max(1, len(pool) // 20))]
            near = [pool[i] for i in order if far[i] <= max(np.log(ALIKE), far[order[0]])]
        else:
            near = pool
        found.append(int(random.choice(near)))
        pool.remove(found[-1])
    return found, known


def frequencies(table: FeatureTable | None, d_sae: int) -> Float[np.ndarray, " d_sae"]:
    """How often each feature is active, from a table; nan where it does not say."""
    found = np.full(d_sae, np.nan)
    if table is not None:
        found[table.df["feature"].to_numpy()] = table.df["frequency"].to_numpy(dtype=float)
    return found


def frequency_ratio(table: FeatureTable | None, features: Sequence[int], matched: Sequence[int]) -> float | None:
    """How far apart features and their matches are: geometric mean of the larger frequency over the smaller.

    None where a frequency is not known.
    """
    if table is None or not matched:
        return None
    known = table.df.set_index("feature")["frequency"]
    pairs = [(known.get(a), known.get(b)) for a, b in zip(features, matched, strict=False)]
    logs = [abs(np.log(a / b)) for a, b in pairs if a and b and np.isfinite(a) and np.isfinite(b)]
    return float(np.exp(np.mean(logs))) if logs else None


def sizes_of(features: Int[Tensor, " features"], options: SteerOptions) -> Float[Tensor, " features"] | None:
    """What the strength of each feature multiplies, or None for the largest activation at each token.

    Raises:
        DegenerateInputError: if the table does not know the largest activation of a feature.
    """
    if options.a_max == "token" or options.table is None:
        return None
    sizes = [float(options.table.row(f)["max_act"]) for f in features.tolist()]
    unknown = [f for f, size in zip(features.tolist(), sizes, strict=True) if not size > 0]
    if unknown:
        raise DegenerateInputError(
            f"SteerOptions(a_max='dataset'): the table has no largest activation of features {unknown[:5]}. Score them "
            "with a store in which they are active, or use a_max='token'."
        )
    return torch.tensor(sizes)


@dataclass(frozen=True, eq=False)
class PushSet:
    """Directions of one arm.

    Attributes:
        owners: the feature whose lens tokens are counted under each.
        vectors: the directions.
        sizes: factor of each; None takes the largest feature activation at each token.
    """

    owners: Int[Tensor, " features"]
    vectors: Float[Tensor, "features d"]
    sizes: Float[Tensor, " features"] | None = None


class Bench:
    """Turns directions into arms: texts, their measures and the harm done to plain text."""

    def __init__(self, model: Model, sae: Any, site: Site, prompts: Sequence[str], options: SteerOptions) -> None:
        self.model, self.sae, self.prompts, self.options = model, sae, tuple(prompts), options
        self.sweep = Sweep(model, sae, site, model.tokens(list(prompts)), options)
        self.harm = Harm(model, sae, site, plain_batch(model, options)) if options.plain_texts else None

    def lens_of(self, features: Int[Tensor, " features"]) -> Int[Tensor, "features k"]:
        """Lens tokens of features."""
        if zero := features[~writing(self.sae).cpu()[features]].tolist():
            raise DegenerateInputError(f"steer: the decoder rows of features {zero} are zero, so they write nothing.")
        return lens_tokens(self.model, decoder_rows(self.sae, features), self.options.k).ids.cpu()

    def words(self, features: Int[Tensor, " features"]) -> tuple[str, ...]:
        """The first lens tokens of each feature, as text."""
        text = TokenTexts.of(self.model.tokenizer).padded(self.model.d_vocab).text
        return tuple(" · ".join(repr(text(t))[1:-1] for t in row[:6]) for row in self.lens_of(features).tolist())

    def arm(self, name: str, pushes: PushSet, strengths: Sequence[float], progress: Task) -> Arm:
        """Continuations of all prompts with each direction at each strength."""
        lens = self.lens_of(pushes.owners)
        return self.arm_of(
            name, tuple(pushes.owners.tolist()), lens, (pushes.vectors, pushes.sizes), strengths, progress
        )

    def arm_of(
        self,
        name: str,
        owners: tuple[int | str, ...],
        tokens: Int[Tensor, "features k"],
        pushed: tuple[Float[Tensor, "features d"], Float[Tensor, " features"] | None],
        strengths: Sequence[float],
        progress: Task,
    ) -> Arm:
        """The arm of some directions (with their sizes), each with the tokens that are counted under it."""
        vectors, sizes = pushed
        vectors = vectors.to(self.model.device)
        each = [Pushes(vectors, float(strength), sizes) for strength in strengths]
        written = [self.sweep.write(pushes, tokens, progress) for pushes in each]
        harm = None if self.harm is None else np.stack([self.harm.of(pushes) for pushes in each], axis=1)
        edits = tuple(EditSummary.of(p.strength, w.edits) for p, w in zip(each, written, strict=True))
        return self._arm(name, owners, tuple(map(float, strengths)), tokens, written, (harm, edits))

    def unsteered(self, features: Int[Tensor, " features"], base: Written) -> Arm:
        """The unsteered texts, measured with the lens tokens of each feature."""
        return self.unsteered_of(tuple(features.tolist()), self.lens_of(features), base)

    def unsteered_of(self, owners: tuple[int | str, ...], tokens: Int[Tensor, "features k"], base: Written) -> Arm:
        """The unsteered texts, measured with some tokens."""
        n = len(owners)
        whole = Written(
            base.ids * n, base.texts * n, base.nll.repeat(n), base.log_odds.repeat(n) * 0, base.kl.repeat(n) * 0
        )
        return self._arm("unsteered", owners, (0.0,), tokens, [whole], (None, ()))

    def require_room(self, tokens: Int[Tensor, "features k"]) -> None:
        """Refuses instructions to use some tokens that leave too few positions for texts, before any is written."""
        longest = int(self._instructed(tokens).lengths.max())
        self.model.require_room(longest + self.options.new_tokens)

    def _instructed(self, tokens: Int[Tensor, "features k"]) -> TokenBatch:
        """Every prompt after an instruction to use some tokens."""
        return self.model.tokens([self.instruction(row) + prompt for row in tokens.tolist() for prompt in self.prompts])

    def prompted(self, features: Int[Tensor, " features"], progress: Task) -> Arm:
        """Continuations of every prompt after an instruction to use the feature's lens tokens, without an edit."""
        lens = self.lens_of(features)
        return self.prompted_of(tuple(features.tolist()), lens, progress)

    def prompted_of(self, owners: tuple[int | str, ...], tokens: Int[Tensor, "features k"], progress: Task) -> Arm:
        """Continuations of every prompt after an instruction to use some tokens, without an edit."""
        written = self.sweep.instructed(self._instructed(tokens), tokens, progress)
        return self._arm("prompt", owners, (0.0,), tokens, [written], (None, ()))

    def instruction(self, tokens: Sequence[int]) -> str:
        """A sentence that asks for words; those with letters where there are any."""
        words = dict.fromkeys(self.model.tokenizer.decode([t]).strip() for t in tokens)
        spelt = [word for word in words if re.search(r"[^\W\d_]{2}", word)] or [word for word in words if word]
        return INSTRUCTION.format(words=", ".join(spelt[:INSTRUCTION_WORDS]) or "…")

    def _arm(
        self,
        name: str,
        owners: tuple[int | str, ...],
        strengths: tuple[float, ...],
        tokens: Tensor,
        written: Sequence[Written],
        done: tuple[np.ndarray | None, tuple[EditSummary, ...]],
    ) -> Arm:
        by_strength = [w.values(tokens, self.options.ks) for w in written]
        values = {key: np.stack([v[key] for v in by_strength], axis=1) for key in by_strength[0]}
        n = len(self.prompts)
        texts = tuple(tuple(w.texts[f * n : (f + 1) * n] for w in written) for f in range(len(owners)))
        return Arm(name, owners, strengths, values, texts, *done)


def plain_batch(model: Model, options: SteerOptions) -> TokenBatch:
    """The plain texts as rows, cut to the same modest length."""
    batch = model.tokens(list(options.plain_texts))
    rows = [row[:PLAIN_LENGTH].tolist() for row in batch.rows()]
    return TokenBatch.pad(rows, model.tokenizer.pad_token_id or 0).to(model.device)
