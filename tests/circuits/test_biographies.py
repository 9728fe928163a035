from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace

import pytest

from circuits.shift.biographies import (
    _FACTS,
    _MORE_TEMPLATES,
    _TEMPLATES,
    NAMES,
    SURNAMES,
    BiographyOptions,
    biographies,
    gender_words,
)
from circuits.shift.professions import PROFESSIONS
from circuits.shift.task import ShiftTask
from circuits.shift.texts import LabelledTexts
from circuits.shift.words import delete_words, word_pattern
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError, UnknownNameError

SMALL = BiographyOptions(n_train=40, n_test=40)


def test_training_is_ambiguous_and_test_is_balanced() -> None:
    task = biographies(SMALL)
    assert task.train.label == task.train.spurious
    for rows, each in ((task.balanced, 10), (task.test, 10)):
        assert rows is not None
        assert set(Counter(rows.groups).values()) == {each}


def test_the_same_seed_gives_the_same_texts_and_another_seed_does_not() -> None:
    assert biographies(SMALL) == biographies(SMALL)
    assert biographies(SMALL).train.texts != biographies(BiographyOptions(n_train=40, n_test=40, seed=1)).train.texts


def test_swapped_texts_differ_in_gendered_words_only() -> None:
    task = biographies(SMALL)
    for text, swapped in zip(task.train.texts, task.swapped or (), strict=True):
        assert text != swapped
        assert delete_words(text, gender_words()) == delete_words(swapped, gender_words())


def test_gender_is_in_the_declared_words_and_profession_is_not() -> None:
    task = biographies(BiographyOptions(n_train=200, n_test=200))
    pattern = word_pattern(task.spurious_words)
    assert all(pattern.search(text) for text in (*task.train.texts, *task.test.texts))
    male = {
        w.lower()
        for rows in (task.train, task.test)
        for t, g in zip(rows.texts, rows.spurious or (), strict=True)
        if g == 0
        for w in pattern.findall(t)
    }
    female = {
        w.lower()
        for rows in (task.train, task.test)
        for t, g in zip(rows.texts, rows.spurious or (), strict=True)
        if g == 1
        for w in pattern.findall(t)
    }
    assert not male & female


def test_train_and_test_share_no_name_template_or_activity() -> None:
    for gender in (0, 1):
        assert not set(NAMES["train"][gender]) & set(NAMES["test"][gender])
    assert not set(SURNAMES["train"]) & set(SURNAMES["test"])
    assert not {t for part in _TEMPLATES["train"] for t in part} & {t for part in _TEMPLATES["test"] for t in part}
    for profession in PROFESSIONS.values():
        assert not set(profession.train) & set(profession.test)


@pytest.mark.parametrize("name", list(PROFESSIONS))
def test_declared_profession_words_occur_and_the_profession_is_never_named(name: str) -> None:
    profession = PROFESSIONS[name]
    spoken = set(re.findall(r"[a-z]+", " ".join(profession.train).lower()))
    assert profession.words <= spoken
    assert name not in " ".join(profession.train + profession.test)
    assert not profession.words & {
        word for other in PROFESSIONS if other != name for word in PROFESSIONS[other].words
    } - {"edits"}


@pytest.mark.parametrize(
    "options",
    [
        BiographyOptions(n_train=240),
        BiographyOptions(style="rich", professions=tuple(PROFESSIONS)[4:], n_train=240, n_test=240),
    ],
    ids=["default", "rich, several professions"],
)
def test_no_line_is_shared_by_splits(options: BiographyOptions) -> None:
    options = replace(options, n_test=240)
    task = biographies(options)
    assert task.balanced is not None and task.swapped is not None

    def lines(*texts: str) -> set[str]:
        return {line.strip() for text in texts for line in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)}

    assert not lines(*task.train.texts, *task.swapped, *task.balanced.texts) & lines(*task.test.texts)
    assert not {*task.train.texts, *task.swapped} & set(task.balanced.texts)
    assert len(set(task.test.texts)) == len(task.test)


def test_rich_biographies_say_more_and_several_professions_alternate() -> None:
    names = tuple(PROFESSIONS)[2:7]
    task = biographies(BiographyOptions(professions=names, style="rich", n_train=20, n_test=20))
    assert task.label_names == names and set(task.train.counts().values()) == {4} and len(task.test.counts()) == 10
    assert all(gender == label % 2 for label, gender in task.train.groups) and task.shortcut() == (0, 1)
    pattern = word_pattern(gender_words())
    assert all(pattern.search(text) for text in task.train.texts)
    for text, swapped in zip(task.train.texts, task.swapped or (), strict=True):
        assert text != swapped and delete_words(text, gender_words()) == delete_words(swapped, gender_words())
    for split in ("train", "test"):
        assert len(set(_FACTS[split])) == 9
        assert not {t for part in _MORE_TEMPLATES[split] for t in part} & {
            t for part in _TEMPLATES[split] for t in part
        }
    plain, rich = biographies(SMALL), biographies(replace(SMALL, style="rich"))
    assert sum(map(len, rich.train.texts)) > 1.2 * sum(map(len, plain.train.texts))


def test_the_default_texts_stay_what_they_are() -> None:
    texts = biographies().train.texts
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "f05483e6c151c6f2"


def test_other_professions_and_wrong_options() -> None:
    assert (
        biographies(BiographyOptions(professions=("attorney", "journalist"), n_train=8, n_test=8)).label_names[0]
        == "attorney"
    )
    with pytest.raises(UnknownNameError, match="nurse"):
        BiographyOptions(professions=("professor", "nures"))
    with pytest.raises(InvalidInputError):
        BiographyOptions(professions=("nurse", "nurse"))
    with pytest.raises(DegenerateInputError, match="multiple of 4"):
        BiographyOptions(n_train=10)


def test_a_task_that_does_not_pair_up_is_refused() -> None:
    task = biographies(SMALL)
    with pytest.raises(ShapeError):
        LabelledTexts(("a",), (0, 1), (0, 1))
    with pytest.raises(InvalidInputError):
        LabelledTexts(("a", "b"), (0, 2), (0, 1))
    with pytest.raises(DegenerateInputError, match=r"\(0, 1\)"):
        ShiftTask(
            name="t",
            label_names=("a", "b"),
            spurious_names=("c", "d"),
            train=task.train,
            swapped=task.swapped,
            balanced=task.train,
            test=task.test,
            spurious_words=frozenset("a"),
            target_words=frozenset("b"),
        )
    with pytest.raises(ShapeError, match="swapped"):
        ShiftTask(
            name="t",
            label_names=("a", "b"),
            spurious_names=("c", "d"),
            train=task.train,
            swapped=(task.swapped or ())[1:],
            balanced=task.balanced,
            test=task.test,
            spurious_words=frozenset("a"),
            target_words=frozenset("b"),
        )
