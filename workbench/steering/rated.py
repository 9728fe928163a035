"""Steered texts rated by a judge from 0 to 2: is the concept in them, is the prompt answered, do they read well."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from workbench.errors import DegenerateInputError, InvalidInputError, UnknownNameError
from workbench.features.judge import MOST_FAILED, Rater
from workbench.records import from_jsonable, load_json
from workbench.report import Metric, Report, Section, Table, Text
from workbench.stats import Estimate, paired_difference, wilson
from workbench.steering.arms import OWN_TOKENS
from workbench.steering.intervals import two_level, two_level_difference
from workbench.steering.ratings import harmonic_of_means

KINDS = ("concept", "instruction", "fluency")
SLOTS = {"concept": ("concept", "text"), "instruction": ("instruction", "text"), "fluency": ("text",)}
_SCALE = "Give your reasons in a sentence and end with the number in double brackets, such as Rating: [[0]]\nRating:"
TEMPLATES: Mapping[str, str] = {
    "concept": "Below is a text, and a theme. How much of the theme is in the text?\n\nTheme: {concept}\n\n"
    "Text:\n{text}\n\n0: nothing of it. 1: it is touched on, or forced in. 2: the text is clearly about it. " + _SCALE,
    "instruction": "Below is a request, and a text that was written for it. Does the text do what was asked, whatever "
    "else it talks about?\n\nRequest: {instruction}\n\nText:\n{text}\n\n"
    "0: it has nothing to do with the request. 1: it does so in part. 2: it does. " + _SCALE,
    "fluency": "Below is a text. Judge its language alone, not what it says.\n\nText:\n{text}\n\n"
    "0: it can't be read, or repeats itself over and over. 1: it has clear mistakes or odd repetitions. 2: it reads "
    "like the work of a careful writer. " + _SCALE,
}  # fmt: skip
"""What a judge is asked; the structure of AxBench's three prompts (Wu et al. 2025), the wording is ours."""
GATE_MARGIN = 0.5
"""By how much, of 2, right texts have to be rated above wrong ones, interval included."""

KNOWN = (
    ("bread and baking", "Tell me what you did this morning.",
     "This morning I mixed flour, water and yeast, let the dough rise near the stove, and baked two loaves of bread."),
    ("the sea", "Describe a place that you like.",
     "I like a small bay where the waves come in over flat rocks and fishing boats rest on the sand at low tide."),
    ("chess", "Explain how to begin a game.",
     "Begin by moving a pawn to the centre, bring out the knights and bishops, and castle before you attack the king."),
    ("gardening", "Give me advice for the spring.",
     "Loosen the soil in March, sow peas and lettuce in rows, and cover the young plants when the nights are cold."),
    ("the law", "What happens after an arrest?",
     "A judge hears the charge, the lawyer asks for bail, and the court sets a date on which the trial begins."),
    ("astronomy", "What can I see tonight?",
     "After dusk Jupiter stands in the south, and with a small telescope you can see four of its moons in a line."),
    ("money and banks", "How do I save for a house?",
     "Open a savings account, let the bank move a fixed sum into it each month, and compare the interest once a year."),
    ("music", "What should we do at the party?",
     "Let the band play two slow songs, then the singer can take the guitar and everybody joins in the chorus."),
    ("medicine", "My throat hurts. What should I do?",
     "Drink warm tea and rest; if the fever lasts for three days, see a doctor, who may prescribe an antibiotic."),
    ("trains", "How do I get to the next city?",
     "Take the express from platform four; the train leaves each hour, and the conductor sells tickets on board."),
    ("winter weather", "What was the weekend like?",
     "It snowed for two days, the roads were icy, and on Sunday a cold wind blew the clouds over the frozen lake."),
    ("computers", "Why is my machine so slow?",
     "Too many programs start with the system; close them, update the driver, and check whether the disk is full."),
)  # fmt: skip
"""Theme, request and a text that has both: with these a judge shows that it can tell right from wrong."""


def templates_from(path: str | Path) -> dict[str, str]:
    """Prompts from a JSON file: "concept", "instruction" and "fluency", each with the slots of `SLOTS` in braces.

    Raises:
        MissingFileError: if there is no such file.
        InvalidInputError: if one of the three or one of its slots is missing.
    """
    found = from_jsonable(dict[str, str], load_json(Path(path)))
    for kind, slots in SLOTS.items():
        lacking = [slot for slot in slots if f"{{{slot}}}" not in found.get(kind, "")]
        if lacking:
            raise InvalidInputError(
                f"{path}: the prompt {kind!r} lacks {', '.join(f'{{{slot}}}' for slot in lacking)}. Give "
                f"{', '.join(KINDS)}, each with its slots."
            )
    return {kind: found[kind] for kind in KINDS}


def rating_prompts(
    concept: str, instruction: str, text: str, templates: Mapping[str, str] = TEMPLATES
) -> tuple[str, str, str]:
    """What a judge is asked about one text: concept, instruction, fluency.

    Slots are filled once, so braces in a text stay what they are.
    """
    values = {"concept": concept, "instruction": instruction, "text": text}
    fill = re.compile("|".join(rf"\{{{name}\}}" for name in values))
    made = (fill.sub(lambda found: values[found[0][1:-1]], templates[kind]) for kind in KINDS)
    concept_prompt, instruction_prompt, fluency_prompt = made
    return concept_prompt, instruction_prompt, fluency_prompt


@dataclass(frozen=True)
class RatingGate:
    """Whether a judge rates right texts above wrong ones.

    Attributes:
        judge: its name.
        margins: by kind, rating of the right text less that of the wrong one, over known texts; None if more than a
            tenth of the replies could not be read.
        failed: share of the replies that could not be read.
    """

    judge: str
    margins: dict[str, Estimate | None]
    failed: Estimate

    @property
    def refusal(self) -> str:
        """Why the judge gets no scores; "" if it does."""
        wrong = [f"{k} ({m})" for k, m in self.margins.items() if m is None or not m.low > GATE_MARGIN]
        needed = f"right texts must be rated above wrong ones by more than {GATE_MARGIN} of 2"
        return f"{self.judge} is not competent at {', '.join(wrong)}: {needed}" if wrong else ""


def rating_gate(judge: Rater, templates: Mapping[str, str] = TEMPLATES, seed: int = 0) -> RatingGate:
    """Tries a judge on twelve texts with their own theme and request, and with those of another one.

    For fluency the wrong text has the same words in random order. All prompts are asked at once.
    """
    random = np.random.default_rng(seed)
    shifted = [KNOWN[(k + len(KNOWN) // 2) % len(KNOWN)] for k in range(len(KNOWN))]
    right = [rating_prompts(*known, templates) for known in KNOWN]
    mixed = [" ".join(random.permutation(text.split()).tolist()) for _, _, text in KNOWN]
    wrong = [
        (*rating_prompts(other[0], other[1], text, templates)[:2], rating_prompts("", "", words, templates)[2])
        for (_, _, text), other, words in zip(KNOWN, shifted, mixed, strict=True)
    ]
    own, other = _asked(judge, [*right, *wrong]).reshape(2, len(KNOWN), len(KINDS))
    unread = np.isnan(own) | np.isnan(other)
    margins = {
        kind: None if unread[:, k].mean() > MOST_FAILED else paired_difference(
            own[~unread[:, k], k], other[~unread[:, k], k], unit="known texts", seed=seed
        )
        for k, kind in enumerate(KINDS)
    }  # fmt: skip
    return RatingGate(judge.name, margins, wilson(int(unread.sum()), unread.size, unit="pairs of replies"))


@dataclass(frozen=True)
class RatedArm:
    """Ratings of one arm's texts, at the strength chosen on half of the prompts, measured on the other half.

    Attributes:
        name: of the arm.
        ratings: mean rating by kind, 0 to 2.
        mean_of_harmonics: AxBench's aggregate; interval over features and prompts.
        above_unsteered: that aggregate less the unsteered texts'; None for themselves.
        harmonic_of_means: the aggregate of Arad, Mueller and Belinkov 2025, mean over features; no interval.
        strengths: chosen for each feature.
    """

    name: str
    ratings: dict[str, Estimate | None]
    mean_of_harmonics: Estimate | None
    above_unsteered: Estimate | None
    harmonic_of_means: float
    strengths: dict[str, float]


@dataclass(frozen=True, repr=False)
class RatingReport(Report):
    """Ratings of steered texts beside those of their controls.

    Attributes:
        judge: who rated.
        gate: what it can do.
        arms: by arm; empty if the judge is refused or too many replies are missing.
        failed: share of ratings that could not be read; they count as 0, as in AxBench.
        prompts: evaluation prompts.
        left_out: arms of other features, for which no concept was given.
    """

    judge: str
    gate: RatingGate
    arms: tuple[RatedArm, ...]
    failed: Estimate
    prompts: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def findings(self) -> tuple[str, ...]:
        """Whether the judge is believed, and how the arms compare with unsteered texts."""
        if self.gate.refusal:
            return (f"NO SCORES. {self.gate.refusal}.",)
        if not self.arms:
            return (f"NO SCORES. Ratings that could not be read: {self.failed}; at most {MOST_FAILED:.0%} may be.",)
        said = [f"{self.judge} rates, with {self.failed} of its replies unreadable (counted as 0)."]
        for arm in self.arms:
            if arm.above_unsteered is not None:
                d = arm.above_unsteered
                word = "higher" if d.low > 0 else "lower" if d.high < 0 else "not clearly different"
                said.append(f"{arm.name}: mean of harmonics {arm.mean_of_harmonics}, {word} than unsteered ({d}).")
        if self.left_out:
            said.append(f"Not rated, since their features have no concept: {', '.join(self.left_out)}.")
        return tuple(said)

    def section(self) -> Section:
        """One row per arm, and what the judge can do."""
        rows = tuple(
            (arm.name, *(arm.ratings[kind] for kind in KINDS), arm.mean_of_harmonics, arm.harmonic_of_means,
             arm.above_unsteered)
            for arm in self.arms
        )  # fmt: skip
        columns = ("arm", *KINDS, "mean of harmonics (AxBench)", "harmonic of means", "less unsteered")
        caption = f"Ratings from 0 to 2 on {len(self.prompts)} prompts that chose no strength"
        gate = Table(
            ("kind", "right less wrong"), tuple(self.gate.margins.items()), f"What {self.judge} can tell, of 2 points"
        )
        how = Text(
            "Mean of harmonics: of each text's three ratings, 0 if one is 0, then the mean over texts. Harmonic of "
            "means: of the three mean ratings of a feature. They don't compare with each other."
        )
        blocks = (Table(columns, rows, caption), how, gate) if rows else (gate,)
        return Section(f"Ratings by {self.judge}", blocks, self.findings(), self.metrics())

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers."""
        found: dict[str, Metric] = {"failed": self.failed}
        for arm in self.arms:
            found[f"{arm.name}.harmonic_of_means"] = arm.harmonic_of_means
            if arm.mean_of_harmonics is not None:
                found[f"{arm.name}.mean_of_harmonics"] = arm.mean_of_harmonics
        return found


def rate_texts(
    judge: Rater,
    frame: Any,
    concepts: Mapping[Any, str],
    *,
    templates: Mapping[str, str] = TEMPLATES,
    seed: int = 0,
) -> RatingReport:
    """Has the texts of a steering run rated, and chooses strengths on the first half of the prompts.

    The judge is first tried on known texts (`rating_gate`). With a `FileJudge` call it again when the replies are
    there: until then the report says that there are no scores.

    Args:
        judge: `HTTPJudge`, `FileJudge`, `LogProbJudge`, or anything with `name` and `rate`.
        frame: `report.frame()` of `steer` or `steer_concepts`: columns arm, feature, strength, prompt, text.
        concepts: what each feature stands for, in words, by the values of the column feature. Arms of other features
            than those that are steered (`matched`, `control`) are left out where theirs are not among them.
        templates: what is asked.
        seed: of the resamples.

    Raises:
        InvalidInputError: if a column or an arm "unsteered" is missing.
        UnknownNameError: for a feature without a concept.
        DegenerateInputError: for fewer than two prompts.

    Source: AxBench (Wu et al. 2025, arXiv 2501.17148): three ratings from 0 to 2, unreadable ones count as 0, strengths
    chosen on half of the instructions. Departs from it by the gate, the intervals and the limit on unreadable replies.
    """
    rows, left_out = _rows(frame, concepts)
    prompts = tuple(dict.fromkeys(row["prompt"] for row in rows))
    if len(prompts) < 2:
        raise DegenerateInputError(f"rate_texts: {len(prompts)} prompt; two are needed, to choose and to test.")
    _tables(rows, np.zeros((len(rows), len(KINDS))), prompts)
    gate = rating_gate(judge, templates, seed)
    asked = [rating_prompts(concepts[row["feature"]], row["prompt"], row["text"], templates) for row in rows]
    found = _asked(judge, asked) if not gate.refusal or _waiting(judge) else np.full((len(rows), len(KINDS)), np.nan)
    failed = wilson(int(np.isnan(found).sum()), found.size, unit="ratings")
    tested = prompts[len(prompts) // 2 :]
    if gate.refusal or failed.value > MOST_FAILED:
        return RatingReport(judge.name, gate, (), failed, tested, left_out)
    tables = _tables(rows, np.nan_to_num(found), prompts)
    base = next(table for table in tables if table.name == "unsteered").evaluated()
    arms = tuple(table.result(base, seed) for table in tables)
    return RatingReport(judge.name, gate, arms, failed, tested, left_out)


def _waiting(judge: Rater) -> bool:
    """Whether replies come later, so that all prompts have to be asked now."""
    return hasattr(judge, "open_prompts")


def _rows(frame: Any, concepts: Mapping[Any, str]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The texts, and the arms that are left out."""
    needed = ("arm", "feature", "strength", "prompt", "text")
    lacking = [name for name in needed if name not in frame.columns]
    if lacking or "unsteered" not in set(frame["arm"]):
        raise InvalidInputError(
            f"rate_texts: the table lacks {', '.join(lacking) or 'an arm named unsteered'}. Give report.frame() of "
            "steer or steer_concepts."
        )
    rows = frame[list(needed)].to_dict("records")
    lacking = {(row["arm"], str(row["feature"])) for row in rows if row["feature"] not in concepts}
    left_out = tuple(sorted({arm for arm, _ in lacking if arm in OWN_TOKENS}))
    nameless = sorted({feature for arm, feature in lacking if arm not in OWN_TOKENS})
    if nameless:
        raise UnknownNameError(
            f"rate_texts: no concept is given for feature {', '.join(nameless[:5])}. Describe every feature."
        )
    return [row for row in rows if row["arm"] not in left_out], left_out


def _asked(judge: Rater, prompts: Sequence[tuple[str, str, str]]) -> Float[np.ndarray, "texts kinds"]:
    replies = judge.rate([prompt for three in prompts for prompt in three])
    return np.array([np.nan if r is None else r for r in replies], dtype=float).reshape(-1, len(KINDS))


@dataclass(frozen=True, eq=False)
class _ArmTable:
    """Ratings of one arm, `[features, strengths, prompts, kinds]`."""

    name: str
    features: tuple[Any, ...]
    strengths: tuple[float, ...]
    values: np.ndarray

    @property
    def _chosen(self) -> np.ndarray:
        """Index of each feature's best strength on the first half of the prompts; of equals the first."""
        half = self.values.shape[2] // 2
        return harmonic(self.values[:, :, :half]).mean(2).argmax(1)

    def evaluated(self) -> np.ndarray:
        """`[features, prompts, kinds]` at the chosen strengths, on the other prompts."""
        half = self.values.shape[2] // 2
        return self.values[np.arange(len(self.features)), self._chosen, half:]

    def result(self, base: np.ndarray, seed: int) -> RatedArm:
        found = self.evaluated()
        combined = harmonic(found)
        above = None if self.name == "unsteered" else two_level_difference(combined, harmonic(base), seed=seed)
        return RatedArm(
            self.name, {kind: two_level(found[:, :, k], seed=seed) for k, kind in enumerate(KINDS)},
            two_level(combined, seed=seed), above, harmonic_of_means(torch.from_numpy(found)),
            {str(f): self.strengths[s] for f, s in zip(self.features, self._chosen, strict=True)},
        )  # fmt: skip


def harmonic(ratings: Float[np.ndarray, "*n kinds"]) -> Float[np.ndarray, "*n"]:
    """Harmonic mean of the three ratings, 0 if one is 0.

    >>> harmonic(np.array([[2.0, 2.0, 2.0], [0.0, 2.0, 2.0], [1.0, 1.0, 2.0]])).tolist()
    [2.0, 0.0, 1.2]
    """
    safe = np.maximum(ratings, 1e-12)
    return np.where((ratings > 0).all(-1), ratings.shape[-1] / (1 / safe).sum(-1), 0.0)


def _tables(rows: Sequence[dict[str, Any]], found: np.ndarray, prompts: Sequence[str]) -> list[_ArmTable]:
    tables = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        mine = [(row, values) for row, values in zip(rows, found, strict=True) if row["arm"] == name]
        features = tuple(dict.fromkeys(row["feature"] for row, _ in mine))
        strengths = tuple(dict.fromkeys(row["strength"] for row, _ in mine))
        places = [
            (features.index(row["feature"]), strengths.index(row["strength"]), prompts.index(row["prompt"]))
            for row, _ in mine
        ]
        shape = (len(features), len(strengths), len(prompts), len(KINDS))
        values = np.full(shape, np.nan)
        for place, (_, rated) in zip(places, mine, strict=True):
            values[place] = rated
        if np.isnan(values).any() or len(set(places)) < len(places):
            raise InvalidInputError(
                f"rate_texts: arm {name!r} has {len(places)} texts for {len(features)} features x {len(strengths)} "
                f"strengths x {len(prompts)} prompts. Give every text once, with different prompts."
            )
        tables.append(_ArmTable(str(name), features, strengths, values))
    return tables
