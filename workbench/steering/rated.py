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

from workbench.errors import InvalidInputError, UnknownNameError
from workbench.features.judge import MOST_FAILED, Rater
from workbench.records import from_jsonable, load_json
from workbench.report import Metric, Report, Section, Table, Text
from workbench.stats import Estimate, paired_difference, sample_mean, wilson
from workbench.steering.arms import OWN_TOKENS
from workbench.steering.ratings import harmonic, harmonic_of_means
from workbench.steering.steer import check_prompts

KINDS = ("concept", "instruction", "fluency")
SLOTS = {"concept": ("concept", "text"), "instruction": ("instruction", "text"), "fluency": ("text",)}
_SCALE = "Reply with the number alone.\nRating:"
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
COLUMNS, BASE = ("arm", "feature", "strength", "prompt", "text"), "unsteered"
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
    own, other = _rated(judge, _known_questions(templates, seed)).reshape(2, len(KNOWN), len(KINDS))
    unread = np.isnan(own) | np.isnan(other)
    margins = {
        kind: None if unread[:, k].mean() > MOST_FAILED else paired_difference(
            own[~unread[:, k], k], other[~unread[:, k], k], unit="known texts", seed=seed
        )
        for k, kind in enumerate(KINDS)
    }  # fmt: skip
    return RatingGate(judge.name, margins, wilson(int(unread.sum()), unread.size, unit="pairs of replies"))


def _known_questions(templates: Mapping[str, str], seed: int) -> list[tuple[str, str, str]]:
    """The questions about known texts: with what belongs to them, then with what does not."""
    random = np.random.default_rng(seed)
    shifted = [KNOWN[(k + len(KNOWN) // 2) % len(KNOWN)] for k in range(len(KNOWN))]
    right = [rating_prompts(*known, templates) for known in KNOWN]
    mixed = [" ".join(random.permutation(text.split()).tolist()) for _, _, text in KNOWN]
    wrong = [
        (*rating_prompts(other[0], other[1], text, templates)[:2], rating_prompts(theme, request, words, templates)[2])
        for (theme, request, text), other, words in zip(KNOWN, shifted, mixed, strict=True)
    ]
    return [*right, *wrong]


@dataclass(frozen=True)
class RatedArm:
    """Ratings of one arm's texts, at the strength chosen on half of the prompts, measured on the other half.

    Intervals are over prompts, for these very features.

    Attributes:
        name: of the arm.
        ratings: mean rating by kind, 0 to 2.
        mean_of_harmonics: AxBench's aggregate.
        above_unsteered: that aggregate less the one of unsteered texts for the same concepts; None for themselves.
        harmonic_of_means: the aggregate of Arad, Mueller and Belinkov 2025, mean over features; no interval.
        strengths: chosen for each feature.
    """

    name: str
    ratings: dict[str, Estimate]
    mean_of_harmonics: Estimate
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
        waiting: questions in files that have no reply yet.
    """

    judge: str
    gate: RatingGate
    arms: tuple[RatedArm, ...]
    failed: Estimate
    prompts: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    waiting: int = 0

    def findings(self) -> tuple[str, ...]:
        """Whether the judge is believed, and how the arms compare with unsteered texts."""
        if self.waiting:
            return (f"NO SCORES YET. {self.waiting} questions have no reply; call this again when they have.",)
        if self.gate.refusal:
            return (f"NO SCORES. {self.gate.refusal}.",)
        if not self.arms:
            return (f"NO SCORES. Ratings that could not be read: {self.failed}; at most {MOST_FAILED:.0%} may be.",)
        said = [f"{self.judge} rates, with {self.failed} of its replies unreadable (counted as 0)."]
        for arm in self.arms:
            if arm.above_unsteered is not None:
                d = arm.above_unsteered
                word = "higher than" if d.low > 0 else "lower than" if d.high < 0 else "not clearly different from"
                said.append(f"{arm.name}: mean of harmonics {arm.mean_of_harmonics}, {word} unsteered ({d}).")
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
        InvalidInputError: if a column, a text or the arm "unsteered" is missing, or there are fewer than four prompts.
        UnknownNameError: for a feature without a concept.

    Source: AxBench (Wu et al. 2025, arXiv 2501.17148): three ratings from 0 to 2, unreadable ones count as 0, strengths
    chosen on half of the instructions. Departs from it by the gate, the intervals and the limit on unreadable replies.
    """
    prompts = _prompts(frame)
    arms, left_out = _arms(frame, concepts, prompts)
    gate = rating_gate(judge, templates, seed)
    tested = prompts[len(prompts) // 2 :]
    later = getattr(judge, "open_prompts", None)  # of a judge whose replies come later, who is asked everything now
    asked = [] if gate.refusal and later is None else arms
    texts = [prompt for arm in asked for prompt in arm.questions(concepts, prompts, templates)]
    found = _rated(judge, texts) if texts else np.full((1, len(KINDS)), np.nan)
    failed = wilson(int(np.isnan(found).sum()), found.size, unit="ratings")
    every = [question for three in [*_known_questions(templates, seed), *texts] for question in three]
    waiting = later(every) if later else 0
    if waiting or gate.refusal or failed.value > MOST_FAILED:
        return RatingReport(judge.name, gate, (), failed, tested, left_out, waiting)
    parts = np.split(np.nan_to_num(found), np.cumsum([arm.size for arm in arms])[:-1])
    rated = {arm.name: _Rated(arm, part.reshape(*arm.shape, len(KINDS))) for arm, part in zip(arms, parts, strict=True)}
    base = rated[BASE]
    results = tuple(each.result(None if each is base else base, seed) for each in rated.values())
    return RatingReport(judge.name, gate, results, failed, tested, left_out)


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

    def questions(
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
    by_arm: dict[str, list[dict[str, Any]]] = {}
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


def _table(name: str, rows: Sequence[dict[str, Any]], prompts: Sequence[str]) -> _Texts:
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


def _rated(judge: Rater, questions: Sequence[tuple[str, str, str]]) -> Float[np.ndarray, "texts kinds"]:
    replies = judge.rate([question for three in questions for question in three])
    return np.array([np.nan if r is None else r for r in replies], dtype=float).reshape(-1, len(KINDS))


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
        def over_prompts(values: np.ndarray) -> Estimate:
            return sample_mean(values.mean(0), unit=f"prompts, means over {len(values)} features", seed=seed)

        ratings, combined = self.tested(self.values), self.tested(self.combined)
        above = None
        if base is not None:
            own = [base.of.features.index(feature) for feature in self.of.features]
            above = over_prompts(combined - base.tested(base.combined)[own])
        strengths = {str(f): self.of.strengths[s] for f, s in zip(self.of.features, self.chosen, strict=True)}
        return RatedArm(
            self.of.name, {kind: over_prompts(ratings[:, :, k]) for k, kind in enumerate(KINDS)},
            over_prompts(combined), above, harmonic_of_means(torch.from_numpy(ratings)), strengths,
        )  # fmt: skip
