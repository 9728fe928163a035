"""Short biographies from own templates: profession x gender, disjoint wording for training and test.

Modelled on Bias in Bios (De-Arteaga et al. 2019) as SHIFT uses it: the profession is never named, it shows in what
somebody does; gender shows in first name, title and pronouns. Train and test share no template, no name and no phrase.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from circuits.shift.methods import words_deleted
from circuits.shift.professions import PROFESSIONS, Profession
from circuits.shift.task import ShiftTask
from circuits.shift.texts import LabelledTexts
from workbench.core.arguments import checked
from workbench.core.display import OneLine, first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, UnknownNameError, did_you_mean

Split = Literal["train", "test"]
Style = Literal["plain", "rich"]


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
_MORE_TEMPLATES: Mapping[Split, tuple[tuple[str, ...], ...]] = {
    "train": (
        ("{town} is where {name} {surname} spent {their} early years.",
         "Few in {town} do not know {title} {surname}.",
         "{name} {surname} came to {town} with {years} letters in {their} bag."),
        ("Most days {they} {activities}.", "Ask about {them}, and people answer that {they} {activities}.",
         "By all accounts {they} {activities}."),
        ("In {their} spare hours there is {hobby}.", "{They} would give up much, but not {hobby}.",
         "Nothing cheers {them} like {hobby}."),
    ),
    "test": (
        ("It was in {year} that {title} {surname} settled in {town}.",
         "Neighbours in {town} speak well of {name} {surname}.",
         "The home of {name} {surname} stands at the edge of {town}."),
        ("At present {they} {activities}.", "Whoever meets {them} learns that {they} {activities}.",
         "For some time now {they} {activities}."),
        ("Holidays mean {hobby} for {them}.", "{They} found {hobby} late, and keeps to it.",
         "Of all pastimes {they} values {hobby}."),
    ),
}  # fmt: skip
"""Used in rich biographies beside the others."""
_FACTS: Mapping[Split, tuple[str, ...]] = {
    "train": (
        "{They} speaks Spanish at home.", "A cousin taught {them} to swim.", "{They} reads the paper on the tram.",
        "{Their} first flat had no heating.", "{They} keeps a cat called Pepper.", "{They} walks to every appointment.",
        "{Their} sister lives next door.", "{They} never learned to drive.", "A neighbour minds {their} plants.",
    ),
    "test": (
        "{They} grew up without a television.", "Friends call {them} early in the day.", "{They} owns a red bicycle.",
        "{Their} grandfather built ships.", "{They} spent a winter in Norway.", "{They} sleeps little and talks fast.",
        "{Their} desk faces the garden.", "{They} prefers trains to planes.",
        "A photo of the coast is on {their} wall.",
    ),
}  # fmt: skip
"""Sentences of rich biographies that tell neither profession nor anything else but gender."""
N_FACTS = 2
_TOWNS: Mapping[Split, tuple[str, ...]] = {
    "train": ("Denver", "Portland", "Leeds", "Toronto", "Austin", "Bristol"),
    "test": ("Boston", "Seattle", "Dublin", "Chicago", "Cardiff", "Ottawa"),
}
_HOBBIES: Mapping[Split, tuple[str, ...]] = {
    "train": ("hiking", "old films", "chess", "baking bread", "the piano", "long walks by the sea"),
    "test": ("cycling", "jazz records", "board games", "gardening", "the violin", "trips to the lakes"),
}


def biography(
    split: Split, profession: Profession, gender: int, seed: str, evidence: int = 1, style: Style = "plain"
) -> str:
    """One biography; with the same seed, only the gendered words differ between genders.

    Args:
        split: which templates, names and phrases.
        profession: whose activities.
        gender: 0 male, 1 female.
        seed: decides everything else.
        evidence: how many activities it names.
        style: "rich" has more templates, and facts that do not tell the profession.
    """
    rng = random.Random(seed)
    activities = profession.train if split == "train" else profession.test
    slots = {
        "name": rng.choice(tuple(zip(*NAMES[split], strict=True)))[gender], "surname": rng.choice(SURNAMES[split]),
        "town": rng.choice(_TOWNS[split]), "years": str(rng.randint(3, 30)), "year": str(rng.randint(1970, 1999)),
        "hobby": rng.choice(_HOBBIES[split]), "company": rng.choice(("cousins", "dogs")),
        "activities": " and ".join(rng.sample(activities, evidence)),
    }  # fmt: skip
    templates = _TEMPLATES[split]
    facts: list[str] = []
    if style == "rich":
        templates = tuple((*few, *more) for few, more in zip(templates, _MORE_TEMPLATES[split], strict=True))
        facts = rng.sample(_FACTS[split], N_FACTS)
    chosen = [*(rng.choice(part) for part in templates), *facts]
    return " ".join(template.format(**slots, **_PRONOUNS[gender]) for template in chosen)


def gender_words() -> frozenset[str]:
    """The declared lexicon of gender: pronouns, titles, and the first names of both splits."""
    pronouns = {word.lower() for forms in _PRONOUNS for word in forms.values()}
    return frozenset(pronouns | {name.lower() for split in NAMES.values() for names in split for name in names})


@checked
@dataclass(frozen=True, kw_only=True)
class BiographyOptions(OneLine):
    """Which biographies to make.

    Attributes:
        professions: label 0, label 1, ...; names in `PROFESSIONS`.
        evidence: activities per biography. One, the default, leaves the profession harder to read than the gender, as
            in Bias in Bios: with more, a probe reads the profession alone and there is no shortcut to remove.
        n_train: rows of the ambiguous set, and of the balanced training set that oracles use.
        n_test: rows of the balanced test set.
        seed: decides every row.
        style: "rich" biographies have more templates, and facts that do not tell the profession.
    """

    professions: tuple[str, ...] = ("professor", "nurse")
    evidence: int = 1
    n_train: int = 240
    n_test: int = 400
    seed: int = 0
    style: Style = "plain"

    def __post_init__(self) -> None:
        for name in self.professions:
            if name not in PROFESSIONS:
                raise UnknownNameError(f"There is no profession {name!r}. {did_you_mean(name, PROFESSIONS)}")
        if len(set(self.professions)) < max(len(self.professions), 2):
            raise InvalidInputError(
                f"BiographyOptions: the professions are {first_few(self.professions)}; choose two or more, each once."
            )
        if not 1 <= self.evidence <= 3:
            raise InvalidInputError(f"BiographyOptions(evidence={self.evidence}): a biography names 1 to 3 activities.")
        for name, n in (("n_train", self.n_train), ("n_test", self.n_test)):
            groups = 2 * len(self.professions)
            if n < 2 * groups or n % groups:
                raise DegenerateInputError(
                    f"BiographyOptions({name}={n}): give a multiple of {groups}, at least {2 * groups}."
                )


@checked
def biographies(options: BiographyOptions | None = None) -> ShiftTask:
    """The biography task: label = profession, spurious attribute = gender.

    In the ambiguous training set the professions are in turn always male and always female. The same options give the
    same texts.
    """
    options = options or BiographyOptions()
    of_label = tuple(PROFESSIONS[name] for name in options.professions)
    k, seed = len(of_label), options.seed

    def text(split: Split, label: int, gender: int, tag: str) -> str:
        return biography(split, of_label[label], gender, f"{seed}/{tag}", options.evidence, options.style)

    def rows(split: Split, tag: str, groups: Sequence[tuple[int, int]], each: int) -> LabelledTexts:
        made = [
            (text(split, y, gender, f"{tag}/{y}{gender}/{i}"), y, gender)
            for i in range(each) for y, gender in groups
        ]  # fmt: skip
        texts, label, gender = zip(*made, strict=True)
        return LabelledTexts(texts, label, gender)

    every_group = [(y, gender) for y in range(k) for gender in (0, 1)]
    ambiguous = [(y, y % 2) for y in range(k)]
    swapped = tuple(
        text("train", y, 1 - gender, f"ambiguous/{y}{gender}/{i}")
        for i in range(options.n_train // k) for y, gender in ambiguous
    )  # fmt: skip
    return ShiftTask(
        name="biographies: " + " against ".join(options.professions),
        label_names=options.professions, spurious_names=GENDERS, swapped=swapped,
        train=rows("train", "ambiguous", ambiguous, options.n_train // k),
        balanced=rows("train", "balanced", every_group, options.n_train // (2 * k)),
        test=rows("test", "test", every_group, options.n_test // (2 * k)),
        spurious_words=gender_words(), target_words=frozenset().union(*(one.words for one in of_label)),
        methods=(words_deleted("gendered words deleted", gender_words()),),
        notes=("Test texts have wording and names that training texts do not have.",),
    )  # fmt: skip
