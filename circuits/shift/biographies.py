"""Short biographies from own templates: profession x gender, disjoint wording for training and test.

Modelled on Bias in Bios (De-Arteaga et al. 2019) as SHIFT uses it: the profession is never named, it shows in what
somebody does; gender shows in first name, title and pronouns. Train and test share no template, no name and no phrase.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from circuits.shift.methods import words_deleted
from circuits.shift.task import ShiftTask
from circuits.shift.texts import LabelledTexts
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, UnknownNameError, did_you_mean

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Profession:
    """Activities of one profession, verb phrases in the third person, apart for training and test.

    Attributes:
        train: at least three.
        test: at least three.
        words: words that give the profession away.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    words: frozenset[str]


PROFESSIONS: Mapping[str, Profession] = {
    "professor": Profession(
        train=(
            "works at a large public university", "lectures on organic chemistry", "supervises doctoral students",
            "publishes papers on voting systems", "edits a journal of modern history",
            "leads seminars on ancient philosophy",
            "studies the economics of trade", "is known for research on early empires",
            "wrote a textbook on statistics",
            "belongs to an institute of political science",
        ),
        test=(
            "works at a private college", "teaches undergraduate courses in sociology",
            "writes academic articles about grammar",
            "directs a thesis programme", "reviews manuscripts for scholarly presses",
            "runs a laboratory for particle physics",
            "is known for a monograph on medieval trade", "belongs to the faculty of linguistics",
        ),
        words=frozenset(
            ["university", "lectures", "chemistry", "supervises", "doctoral", "students", "publishes", "papers",
             "voting", "journal", "history", "seminars", "philosophy", "economics", "research", "textbook",
             "statistics", "institute", "science", "edits", "studies"]
        ),
    ),
    "nurse": Profession(
        train=(
            "works at a regional hospital", "cares for patients after surgery",
            "checks vital signs through the night shift",
            "gives vaccinations to infants", "changes dressings and cleans wounds", "prepares medication for the ward",
            "comforts families in intensive care", "is known for gentle bedside care", "wrote a guide to first aid",
            "belongs to the staff of a stroke clinic",
        ),
        test=(
            "works at a community health centre", "monitors blood pressure and temperature",
            "assists doctors during operations",
            "helps the sick with bathing and meals", "administers injections and infusions",
            "keeps charts for recovering people",
            "is known for skill with difficult veins", "belongs to the maternity unit",
        ),
        words=frozenset(
            ["hospital", "cares", "patients", "surgery", "vital", "signs", "night", "shift", "vaccinations",
             "infants", "dressings", "wounds", "medication", "ward", "comforts", "intensive", "care", "bedside",
             "aid", "staff", "stroke", "clinic"]
        ),
    ),
    "attorney": Profession(
        train=(
            "works at a law firm downtown", "argues cases before the court of appeal",
            "drafts contracts for small companies",
            "represents tenants in disputes", "negotiates settlements", "advises clients on patents",
            "defends people accused of fraud", "is known for victories in civil trials", "wrote a brief on privacy law",
            "belongs to the office of the public defender",
        ),
        test=(
            "works at a legal aid bureau", "files lawsuits over unsafe products", "cross-examines witnesses",
            "prepares wills and estates", "handles bankruptcy petitions", "pleads before juries",
            "is known for a landmark verdict", "belongs to a chamber of barristers",
        ),
        words=frozenset(
            ["law", "firm", "argues", "cases", "court", "appeal", "drafts", "contracts", "represents", "disputes",
             "negotiates", "settlements", "advises", "clients", "patents", "defends", "accused", "fraud", "trials",
             "brief", "privacy", "defender"]
        ),
    ),
    "journalist": Profession(
        train=(
            "works at a daily newspaper", "reports on elections", "interviews ministers and mayors",
            "writes columns about city life", "covers wars and disasters", "edits the front page",
            "investigates corruption",
            "is known for a series on housing", "wrote features about sport",
            "belongs to an international press agency",
        ),
        test=(
            "works at a television channel", "chases stories about crime", "produces documentaries",
            "publishes exclusive scoops", "anchors the evening bulletin", "checks sources for headlines",
            "is known for dispatches from the border", "belongs to the foreign desk of a broadcaster",
        ),
        words=frozenset(
            ["daily", "newspaper", "reports", "elections", "interviews", "columns", "covers", "wars", "disasters",
             "edits", "page", "investigates", "corruption", "series", "features", "press", "agency"]
        ),
    ),
}  # fmt: skip

GENDERS = ("male", "female")
NAMES: Mapping[Split, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (
        ("James", "Robert", "Michael", "David", "Richard", "Thomas", "Daniel", "Mark", "Paul", "Kevin", "Brian",
         "George",
         "Edward", "Jason", "Ryan", "Gary"),
        ("Mary", "Patricia", "Linda", "Elizabeth", "Susan", "Jessica", "Sarah", "Karen", "Nancy", "Lisa", "Betty",
         "Sandra",
         "Ashley", "Emily", "Donna", "Carol"),
    ),
    "test": (
        ("John", "William", "Joseph", "Charles", "Matthew", "Anthony", "Steven", "Andrew", "Peter", "Henry", "Frank",
         "Walter"),
        ("Jennifer", "Barbara", "Margaret", "Michelle", "Laura", "Amanda", "Rebecca", "Helen", "Anna", "Julia",
         "Alice", "Diane"),
    ),
}  # fmt: skip
SURNAMES: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "Miller",
        "Garcia",
        "Wilson",
        "Lopez",
        "Moore",
        "Lee",
        "Harris",
        "Clark",
        "Young",
        "King",
        "Hill",
        "Baker",
    ),
    "test": (
        "Smith",
        "Johnson",
        "Brown",
        "Jones",
        "Davis",
        "Martin",
        "White",
        "Walker",
        "Green",
        "Adams",
        "Carter",
        "Reed",
    ),
}
_PRONOUNS = (
    {"they": "he", "They": "He", "their": "his", "Their": "His", "them": "him", "title": "Mr."},
    {"they": "she", "They": "She", "their": "her", "Their": "Her", "them": "her", "title": "Ms."},
)
_TEMPLATES: Mapping[Split, tuple[tuple[str, ...], ...]] = {
    "train": (
        ("{name} {surname} grew up near {town} with two {company}.",
         "For {years} years, {title} {surname} has lived in {town}.",
         "{name} {surname} moved to {town} when {they} was twenty.",
         "{title} {surname} and {their} family come from {town}."),
        ("{They} {activities}.", "These days {they} {activities}.", "As {their} neighbours know, {they} {activities}."),
        ("On weekends {they} likes {hobby}, and {their} friends often join {them}.",
         "{Their} great love is {hobby}, which calms {them}.",
         "When {they} is free, {they} spends {their} time on {hobby}."),
    ),
    "test": (
        ("{name} {surname} was born in {town} in {year}.",
         "Since {year}, {title} {surname} has called {town} {their} home.",
         "{name} {surname} keeps a small house in {town}."),
        ("Currently {they} {activities}.", "{They} {activities}, as {they} would say with pride.",
         "It is true that {they} {activities}."),
        ("For {their} own pleasure {they} chose {hobby}; few match {them} at it.",
         "Those close to {them} say that {they} adores {hobby}.",
         "{Their} evenings belong to {hobby}, and {they} rarely misses one."),
    ),
}  # fmt: skip
_TOWNS: Mapping[Split, tuple[str, ...]] = {
    "train": ("Denver", "Portland", "Leeds", "Toronto", "Austin", "Bristol"),
    "test": ("Boston", "Seattle", "Dublin", "Chicago", "Cardiff", "Ottawa"),
}
_HOBBIES: Mapping[Split, tuple[str, ...]] = {
    "train": ("hiking", "old films", "chess", "baking bread", "the piano", "long walks by the sea"),
    "test": ("cycling", "jazz records", "board games", "gardening", "the violin", "trips to the lakes"),
}


def biography(split: Split, profession: Profession, gender: int, seed: str, evidence: int = 1) -> str:
    """One biography; with the same seed, only the gendered words differ between genders.

    Args:
        split: which templates, names and phrases.
        profession: whose activities.
        gender: 0 male, 1 female.
        seed: decides everything else.
        evidence: how many activities it names.
    """
    rng = random.Random(seed)
    activities = profession.train if split == "train" else profession.test
    slots = {
        "name": rng.choice(tuple(zip(*NAMES[split], strict=True)))[gender], "surname": rng.choice(SURNAMES[split]),
        "town": rng.choice(_TOWNS[split]), "years": str(rng.randint(3, 30)), "year": str(rng.randint(1970, 1999)),
        "hobby": rng.choice(_HOBBIES[split]), "company": rng.choice(("cousins", "dogs")),
        "activities": " and ".join(rng.sample(activities, evidence)),
    }  # fmt: skip
    return " ".join(rng.choice(part).format(**slots, **_PRONOUNS[gender]) for part in _TEMPLATES[split])


def gender_words() -> frozenset[str]:
    """The declared lexicon of gender: pronouns, titles, and the first names of both splits."""
    pronouns = {word.lower() for forms in _PRONOUNS for word in forms.values()}
    return frozenset(pronouns | {name.lower() for split in NAMES.values() for names in split for name in names})


@checked
@dataclass(frozen=True, kw_only=True)
class BiographyOptions(OneLine):
    """Which biographies to make.

    Attributes:
        professions: label 0 and label 1; names in `PROFESSIONS`.
        evidence: activities per biography. One, the default, leaves the profession harder to read than the gender, as
            in Bias in Bios: with more, a probe reads the profession alone and there is no shortcut to remove.
        n_train: rows of the ambiguous set, and of the balanced training set that oracles use.
        n_test: rows of the balanced test set.
        seed: decides every row.
    """

    professions: tuple[str, str] = ("professor", "nurse")
    evidence: int = 1
    n_train: int = 240
    n_test: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.professions:
            if name not in PROFESSIONS:
                raise UnknownNameError(f"There is no profession {name!r}. {did_you_mean(name, PROFESSIONS)}")
        if self.professions[0] == self.professions[1]:
            raise InvalidInputError(f"BiographyOptions: both professions are {self.professions[0]!r}; choose two.")
        if not 1 <= self.evidence <= 3:
            raise InvalidInputError(f"BiographyOptions(evidence={self.evidence}): a biography names 1 to 3 activities.")
        for name, n in (("n_train", self.n_train), ("n_test", self.n_test)):
            if n < 8 or n % 4:
                raise DegenerateInputError(f"BiographyOptions({name}={n}): give a multiple of 4, at least 8.")


@checked
def biographies(options: BiographyOptions | None = None) -> ShiftTask:
    """The biography task: label = profession, spurious attribute = gender.

    In the ambiguous training set profession 0 is always male and profession 1 always female. The same options give
    the same texts.
    """
    options = options or BiographyOptions()
    pair = tuple(PROFESSIONS[name] for name in options.professions)
    half, seed = options.n_train // 2, options.seed

    def rows(split: Split, tag: str, groups: tuple[tuple[int, int], ...], each: int) -> LabelledTexts:
        made = [
            (biography(split, pair[y], gender, f"{seed}/{tag}/{y}{gender}/{i}", options.evidence), y, gender)
            for i in range(each) for y, gender in groups
        ]  # fmt: skip
        texts, label, gender = zip(*made, strict=True)
        return LabelledTexts(texts, label, gender)

    every_group = ((0, 0), (0, 1), (1, 0), (1, 1))
    train = rows("train", "ambiguous", ((0, 0), (1, 1)), half)
    made = zip(train.label, train.spurious or (), strict=True)
    swapped = tuple(
        biography("train", pair[label], 1 - gender, f"{seed}/ambiguous/{label}{gender}/{i // 2}", options.evidence)
        for i, (label, gender) in enumerate(made)
    )
    return ShiftTask(
        name="biographies: " + " against ".join(options.professions),
        label_names=options.professions, spurious_names=GENDERS, train=train, swapped=swapped,
        balanced=rows("train", "balanced", every_group, options.n_train // 4),
        test=rows("test", "test", every_group, options.n_test // 4),
        spurious_words=gender_words(), target_words=pair[0].words | pair[1].words,
        methods=(words_deleted("gendered words deleted", gender_words()),),
        notes=("Test texts have wording and names that training texts do not have.",),
    )  # fmt: skip
