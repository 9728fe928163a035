"""Steered texts rated by a judge from 0 to 2: is the concept in them, is the prompt answered, do they read well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, UnknownNameError
from workbench.core.jsontext import Record
from workbench.core.stats import ANY, Estimate, paired_difference, sample_mean, wilson
from workbench.judges.files import FileJudge
from workbench.judges.gate import JudgeGate, Trial, trial
from workbench.judges.protocol import MAX_FAILED_SHARE, Judge, ask
from workbench.steering.rating.questions import KINDS, KNOWN, TEMPLATES, known_prompts, rating_prompts, rating_questions
from workbench.steering.rating.rating_report import RatedArm, RatingReport
from workbench.steering.rating.ratings import harmonic, harmonic_of_means
from workbench.steering.sweep.arms import OWN_TOKENS
from workbench.steering.sweep.steer import check_prompts

if TYPE_CHECKING:
    import pandas as pd

MIN_RATING_MARGIN = 0.5
"""By how much, of 2, right texts have to be rated above wrong ones, interval included."""
COLUMNS, BASE = ("arm", "feature", "strength", "prompt", "text"), "unsteered"


@checked
def rating_gate(judge: Judge, templates: Mapping[str, str] = TEMPLATES, seed: int = 0) -> JudgeGate:
    """Tries a judge on twelve texts with their own theme and request, and with those of another one.

    For fluency the wrong text has the same words in random order. All prompts are asked at once.
    """
    answers = ask(judge, rating_questions(known_prompts(templates, seed)))
    right, wrong = answers.values.reshape(2, len(KNOWN), len(KINDS))

    def tried(k: int) -> Trial:
        def margin(read: np.ndarray) -> Estimate:
            return paired_difference(right[read, k], wrong[read, k], unit="known texts", seed=seed)

        return trial(KINDS[k], right[:, k], wrong[:, k], margin, needed_margin=MIN_RATING_MARGIN)

    return JudgeGate(judge.name, tuple(map(tried, range(len(KINDS)))), answers.cost)


@checked
def rate_texts(
    judge: Judge,
    frame: pd.DataFrame,
    concepts: Mapping[Any, str],
    *,
    templates: Mapping[str, str] = TEMPLATES,
    seed: int = 0,
) -> RatingReport:
    """Has the texts of a steering run rated, and chooses strengths on the first half of the prompts.

    The judge is first tried on known texts (`rating_gate`). With a `FileJudge` call it again when the replies are
    there: until then the report says that there are no scores.

    Args:
        judge: who rates.
        frame: `report.frame()` of `steer` or `steer_concepts`: columns arm, feature, strength, prompt, text.
        concepts: what each feature stands for, in words, by the values of the column feature. Arms of other features
            than those that are steered (`matched`, `control`) are left out where theirs are not among them.
        templates: what is asked.
        seed: of the resamples.

    Raises:
        InvalidInputError: if a column, a text or the arm "unsteered" is missing, or there are fewer than four prompts.
        UnknownNameError: for a feature without a concept.

    Source: AxBench (Wu et al. 2025, arXiv 2501.17148): three ratings from 0 to 2, unreadable ones count as 0, strengths
    chosen on half of the instructions. Departs from it by the gate, the intervals and the limit on unreadable replies.
    """
    prompts = _prompts(frame)
    arms, left_out = _arms(frame, concepts, prompts)
    gate = rating_gate(judge, templates, seed)
    tested = prompts[len(prompts) // 2 :]
    # who answers in a file is asked everything at once
    refusal = gate.refusal()
    asked = arms if not refusal or isinstance(judge, FileJudge) else []
    texts = [prompt for arm in asked for prompt in arm.prompts(concepts, prompts, templates)]
    answers = ask(judge, rating_questions(texts))
    ratings = answers.values.reshape(-1, len(KINDS)) if texts else np.full((1, len(KINDS)), np.nan)
    failed = wilson(int(np.isnan(ratings).sum()), ratings.size, unit="ratings")
    every = rating_questions([*known_prompts(templates, seed), *texts])
    waiting = judge.open_prompts(every) if isinstance(judge, FileJudge) else 0
    report = RatingReport(
        judge=judge.name, gate=gate, arms=(), failed=failed, prompts=tested, left_out=left_out, waiting=waiting,
        cost=answers.cost,
    )  # fmt: skip
    if waiting or refusal or failed.value > MAX_FAILED_SHARE:
        return report
    parts = np.split(np.nan_to_num(ratings), np.cumsum([arm.size for arm in arms])[:-1])
    rated = {arm.name: _Rated(arm, part.reshape(*arm.shape, len(KINDS))) for arm, part in zip(arms, parts, strict=True)}
    base = rated[BASE]
    return replace(report, arms=tuple(each.result(None if each is base else base, seed) for each in rated.values()))


def _prompts(frame: Any) -> tuple[str, ...]:
    lacking = [name for name in COLUMNS if name not in frame.columns]
    if lacking or BASE not in set(frame["arm"]):
        raise InvalidInputError(
            f"rate_texts: the table lacks {', '.join(lacking) or f'an arm named {BASE}'}. Give report.frame() of steer "
            "or steer_concepts."
        )
    prompts = tuple(dict.fromkeys(frame["prompt"]))
    check_prompts(prompts, [1.0], "rate_texts")
    return prompts


@dataclass(frozen=True, eq=False)
class _Texts:
    """The texts of one arm, `[feature][strength][prompt]`."""

    name: str
    features: tuple[Any, ...]
    strengths: tuple[float, ...]
    texts: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.texts.shape

    @property
    def size(self) -> int:
        return self.texts.size

    def prompts(
        self, concepts: Mapping[Any, str], prompts: Sequence[str], templates: Mapping[str, str]
    ) -> list[tuple[str, str, str]]:
        return [
            rating_prompts(concepts[feature], prompt, text, templates)
            for feature, by_strength in zip(self.features, self.texts, strict=True)
            for by_prompt in by_strength
            for prompt, text in zip(prompts, by_prompt, strict=True)
        ]


def _arms(frame: Any, concepts: Mapping[Any, str], prompts: Sequence[str]) -> tuple[list[_Texts], tuple[str, ...]]:
    """The texts of the arms that can be rated, and the names of those that are left out."""
    rows = frame[list(COLUMNS)].drop_duplicates().to_dict("records")
    by_arm: dict[str, list[Record]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    nameless = {name: sorted({str(r["feature"]) for r in own if r["feature"] not in concepts})
                for name, own in by_arm.items()}  # fmt: skip
    left_out = tuple(name for name in by_arm if nameless[name] and name in OWN_TOKENS)
    bad = next((features for name, features in nameless.items() if features and name not in (BASE, *OWN_TOKENS)), [])
    if bad:
        raise UnknownNameError(
            f"rate_texts: no concept is given for feature {', '.join(bad[:5])}. Describe every feature."
        )
    steered = {row["feature"] for name, own in by_arm.items() if name not in (BASE, *left_out) for row in own}
    # unsteered texts stand there once more for the features of each arm that has its own
    by_arm[BASE] = [row for row in by_arm[BASE] if row["feature"] in steered]
    arms = [_table(name, own, prompts) for name, own in by_arm.items() if name not in left_out]
    lacking = steered - set(next(arm.features for arm in arms if arm.name == BASE))
    if lacking:
        raise InvalidInputError(f"rate_texts: feature {lacking.pop()} has no unsteered texts. Give the whole table.")
    return arms, left_out


def _table(name: str, rows: Sequence[Record], prompts: Sequence[str]) -> _Texts:
    features = tuple(dict.fromkeys(row["feature"] for row in rows))
    strengths = tuple(dict.fromkeys(row["strength"] for row in rows))
    texts = np.full((len(features), len(strengths), len(prompts)), None, dtype=object)
    for row in rows:
        place = features.index(row["feature"]), strengths.index(row["strength"]), prompts.index(row["prompt"])
        texts[place] = str(row["text"])
    if any(text is None for text in texts.flat) or len(rows) != texts.size:
        raise InvalidInputError(
            f"rate_texts: arm {name!r} has {len(rows)} texts for {len(features)} features x {len(strengths)} strengths "
            f"x {len(prompts)} prompts. Give every text once, with different prompts."
        )
    return _Texts(name, features, strengths, texts)


@dataclass(frozen=True, eq=False)
class _Rated:
    """Ratings of one arm, `[features, strengths, prompts, kinds]`."""

    of: _Texts
    values: np.ndarray

    @property
    def combined(self) -> np.ndarray:
        return harmonic(torch.from_numpy(self.values)).numpy()

    @property
    def chosen(self) -> np.ndarray:
        """Index of each feature's best strength on the first half of the prompts; of equals the first."""
        return self.combined[:, :, : self._half].mean(2).argmax(1)

    @property
    def _half(self) -> int:
        return self.values.shape[2] // 2

    def tested(self, values: np.ndarray) -> np.ndarray:
        """`[features, prompts, ...]` at the chosen strengths, on the other prompts."""
        return values[np.arange(len(values)), self.chosen, self._half :]

    def result(self, base: _Rated | None, seed: int) -> RatedArm:
        def over_prompts(values: np.ndarray, within: tuple[float, float] = (0.0, 2.0)) -> Estimate:
            unit = f"prompts, means over {len(values)} features"
            return sample_mean(values.mean(0), unit=unit, seed=seed, within=within)

        ratings, combined = self.tested(self.values), self.tested(self.combined)
        above = None
        if base is not None:
            own = [base.of.features.index(feature) for feature in self.of.features]
            above = over_prompts(combined - base.tested(base.combined)[own], ANY)
        strengths = {str(f): self.of.strengths[s] for f, s in zip(self.of.features, self.chosen, strict=True)}
        return RatedArm(
            self.of.name, {kind: over_prompts(ratings[:, :, k]) for k, kind in enumerate(KINDS)},
            over_prompts(combined), above, harmonic_of_means(torch.from_numpy(ratings)), strengths,
        )  # fmt: skip
