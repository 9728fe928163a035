"""Tasks from tables: groups counted, splits without leaks, and one clear line on a bad table."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import circuits
from circuits import ShiftTask, SplitOptions
from workbench.core.errors import (
    CorruptFileError,
    DegenerateInputError,
    InvalidInputError,
    MissingFileError,
    UnknownNameError,
)

COLUMNS: dict[str, Any] = {"text": "bio", "label": "job", "attribute": "gender"}


def _frame(sizes: dict[tuple[str, str], int], split: str | None = None) -> pd.DataFrame:
    """Different texts of each (label, attribute)."""
    rows = [
        {"bio": f"{split} {job} {gender} number {i}", "job": job, "gender": gender, "part": split}
        for (job, gender), n in sizes.items() for i in range(n)
    ]  # fmt: skip
    return pd.DataFrame(rows)


SIZES = {
    ("nurse", "f"): 40,
    ("nurse", "m"): 10,
    ("poet", "f"): 20,
    ("poet", "m"): 30,
    ("chef", "f"): 7,
    ("chef", "m"): 8,
}
FRAME = _frame(SIZES)


def _counts(task: ShiftTask, name: str) -> dict[str, int]:
    return {task.group_name(*group): n for group, n in task.sets()[name].counts().items()}


def test_groups_are_found_and_the_split_has_the_share_of_each() -> None:
    options = SplitOptions(test_share=0.2, balance_test=False)
    task = ShiftTask.from_frame(FRAME, **COLUMNS, options=options)
    assert (task.label_names, task.spurious_names) == (("chef", "nurse", "poet"), ("f", "m"))
    held = {"f nurse": 8, "m nurse": 2, "f poet": 4, "m poet": 6, "f chef": 1, "m chef": 2}
    assert _counts(task, "test") == held
    assert {name: n + held[name] for name, n in _counts(task, "train").items()} == {
        f"{gender} {job}": n for (job, gender), n in SIZES.items()
    }
    assert not set(task.train.texts) & set(task.test.texts)
    assert set(_counts(task, "balanced").values()) == {6} and set(task.balanced.texts) <= set(task.train.texts)  # type: ignore[union-attr]
    equal = ShiftTask.from_frame(FRAME, **COLUMNS, options=SplitOptions(test_share=0.2))
    assert set(_counts(equal, "test").values()) == {1} and set(equal.test.texts) < set(task.test.texts)
    assert "Test rows were left out until all groups were equally large, 1 of each." in equal.notes
    other = ShiftTask.from_frame(FRAME, **COLUMNS, options=SplitOptions(test_share=0.2, balance_test=False, seed=1))
    assert other.test != task.test == ShiftTask.from_frame(FRAME, **COLUMNS, options=options).test


def test_classes_are_chosen_named_and_ordered_and_the_attribute_may_be_absent() -> None:
    task = ShiftTask.from_frame(FRAME, text="bio", label="job", classes={"poet": "writer", "nurse": "carer"})
    assert task.label_names == ("writer", "carer") and task.spurious_names == () and task.balanced is None
    assert all(("poet" in text) == (label == 0) for text, label in zip(task.train.texts, task.train.label, strict=True))
    assert len(task.train) + len(task.test) == 100
    numbers = FRAME.assign(job=[{"nurse": 13.0, "poet": 2.0, "chef": 101.0}[job] for job in FRAME["job"]])
    assert ShiftTask.from_frame(numbers, **COLUMNS).label_names == ("2", "13", "101"), "in the order of the numbers"
    assert ShiftTask.from_frame(numbers, **COLUMNS, classes=[13, 2]).label_names == ("13", "2")


def test_rho_is_reached_exactly_on_the_side_that_the_table_leans_to() -> None:
    big = _frame({("nurse", "f"): 100, ("nurse", "m"): 10, ("poet", "f"): 9, ("poet", "m"): 70})
    task = ShiftTask.from_frame(big, **COLUMNS, options=SplitOptions(rho=0.9, test_share=0.1))
    # for training there are 90, 9, 8 and 63 of the groups: 63 are nine tenths of 70
    assert _counts(task, "train") == {"f nurse": 63, "m nurse": 7, "f poet": 7, "m poet": 63}
    assert "Of 170 training rows 140 are used, so that attribute and label agree in a share of 0.9." in task.notes
    turned = ShiftTask.from_frame(big, **COLUMNS, attributes=["m", "f"], options=SplitOptions(rho=0.9, test_share=0.1))
    assert _counts(turned, "train") == _counts(task, "train") and turned.shortcut() == (1, 0)
    ambiguous = ShiftTask.from_frame(big, **COLUMNS, options=SplitOptions(rho=1.0, test_share=0.1))
    assert _counts(ambiguous, "train") == {"f nurse": 63, "m poet": 63}
    with pytest.raises(DegenerateInputError, match="rho=0.99 needs at least 99 training rows of m poet; there are 49"):
        ShiftTask.from_frame(big, **COLUMNS, options=SplitOptions(rho=0.99))
    with pytest.raises(InvalidInputError, match="two values and two labels"):
        ShiftTask.from_frame(FRAME, **COLUMNS, options=SplitOptions(rho=0.9))


def test_duplicates_and_twins_are_never_in_two_splits_that_are_made_here() -> None:
    frame = _frame({("a", "f"): 12, ("a", "m"): 12, ("b", "f"): 12, ("b", "m"): 12})
    frame["twin"] = (
        frame["bio"].str.replace(" f ", " swapped ").str.replace(" m ", " f ").str.replace(" swapped ", " m ")
    )
    again = frame.iloc[:9].assign(bio=frame["bio"].iloc[:9].str.upper() + "  ")
    frame = pd.concat([frame, again], ignore_index=True)
    notes = ()
    for seed in range(5):
        options = SplitOptions(seed=seed, balance_test=False)
        task = ShiftTask.from_frame(frame, **COLUMNS, twin="twin", options=options)
        assert task.swapped is not None and len(task.test) > 8
        training = {text.lower().strip() for text in (*task.train.texts, *task.swapped)}
        assert not training & {text.lower().strip() for text in task.test.texts}
        pairs = dict(zip(frame["bio"], frame["twin"], strict=True))
        assert list(task.swapped) == [pairs[text] for text in task.train.texts]
        notes = task.notes
    assert "33 duplicates or twins of other rows are in the split of these." in notes[0]


def test_a_leak_of_the_table_s_own_splits_is_refused_or_left_out() -> None:
    sizes = {("a", "f"): 4, ("a", "m"): 4, ("b", "f"): 4, ("b", "m"): 4}
    frame = pd.concat([_frame(sizes, "train"), _frame(sizes, "test"), _frame(sizes, "dev")], ignore_index=True)
    clean = ShiftTask.from_frame(frame, **COLUMNS, split="part")
    assert all(text.startswith("train") for text in clean.train.texts) and len(clean.test) == 16
    assert clean.balanced is not None and all(text.startswith("dev") for text in clean.balanced.texts)
    frame.loc[20, "bio"] = frame.loc[3, "bio"].upper()  # type: ignore[union-attr]
    with pytest.raises(InvalidInputError, match="1 test row of the table .* such as row 20 of row 3, counted from 0"):
        ShiftTask.from_frame(frame, **COLUMNS, split="part")
    left = ShiftTask.from_frame(frame, **COLUMNS, split="part", options=SplitOptions(leaks="leave out"))
    assert set(_counts(left, "test").values()) == {3} and frame.loc[20, "bio"] not in left.test.texts
    assert any("1 test row that duplicate" in note for note in left.notes)
    twins = frame.drop(20).assign(twin=lambda df: df["bio"] + " swapped")
    twins.loc[2, "twin"] = twins.loc[18, "bio"]
    with pytest.raises(InvalidInputError, match="duplicates or twins"):
        ShiftTask.from_frame(twins, **COLUMNS, split="part", twin="twin")


def _spoiled(column: str, value: object, *rows: int) -> pd.DataFrame:
    frame = FRAME.astype(object).copy()
    frame.loc[list(rows), column] = value
    return frame


@pytest.mark.parametrize(
    ("frame", "columns", "error", "line"),
    [
        (FRAME, {"text": "boi"}, UnknownNameError, r"no column 'boi' \(text=\). Did you mean bio\?"),
        (FRAME, {"twin": "swap"}, UnknownNameError, r"no column 'swap' \(twin=\). Known: bio, job, gender, part."),
        (FRAME, {"classes": ["nurse", "pote"]}, UnknownNameError, "'job' has no value 'pote'. Did you mean poet"),
        (FRAME, {"classes": ["nurse"]}, DegenerateInputError, "'job' has one value, 'nurse'; needs two"),
        (FRAME.assign(job="x"), {}, DegenerateInputError, "'job' has one value, 'x'; needs two"),
        (FRAME.iloc[:50], {"classes": ["nurse", "poet"]}, UnknownNameError, "no value 'poet'"),
        (FRAME.iloc[:0], {}, DegenerateInputError, "no rows"),
        (FRAME.iloc[10:], {"classes": ["nurse", "poet"], "attributes": ["f", "x"]}, UnknownNameError, "no value 'x'"),
        (FRAME.iloc[[*range(40), *range(50, 100)]], {}, DegenerateInputError, "0 rows of m nurse; needs at least 2"),
        (_spoiled("bio", "  ", 5), {}, InvalidInputError, "'bio' has an empty text in row 5, counted from 0"),
        (_spoiled("bio", None, 5, 9), {}, InvalidInputError, r"'bio' has no text in 2 rows \(5, 9\)"),
        (_spoiled("bio", 3, 5), {}, InvalidInputError, "'bio' has something that is not text in row 5"),
        (_spoiled("job", float("nan"), 7), {}, InvalidInputError, "'job' has no value in row 7"),
        (_spoiled("gender", pd.NA, 7), {}, InvalidInputError, "'gender' has no value in row 7"),
        (FRAME, {"split": "part"}, InvalidInputError, r"'part' has no value in 115 rows \(0, 1, 2, 3, 4, …\)"),
        (FRAME.assign(part="tset"), {"split": "part"}, UnknownNameError, "the split 'tset'. Did you mean test"),
        (FRAME.assign(part="Train"), {"split": "part"}, DegenerateInputError, "no rows of the split 'test'"),
        (FRAME.assign(part=["train"] * 50 + ["test"] * 65), {"split": "part"}, DegenerateInputError,
         "split 'train' has no row of the label 'chef'"),
        (FRAME.assign(part=(["train"] * 9 + ["test"]) * 4 + ["train"] * 10 + (["train"] + ["test"]) * 32 + ["test"]),
         {"split": "part"}, DegenerateInputError, "test has no row .*give rows of m nurse"),
        (FRAME.assign(twin=""), {"twin": "twin"}, InvalidInputError, r"training rows have no twin \(rows "),
        (FRAME.assign(twin=FRAME["bio"]), {"twin": "twin"}, InvalidInputError, "training rows equal their twin"),
        (pd.concat([FRAME, FRAME[["bio"]]], axis=1), {}, InvalidInputError, "the column 'bio' twice"),
    ],
)  # fmt: skip
def test_a_bad_table_gets_one_line(frame: pd.DataFrame, columns: Any, error: type[Exception], line: str) -> None:
    with pytest.raises(error, match=line) as raised:
        ShiftTask.from_frame(frame, **{**COLUMNS, **columns})
    assert type(raised.value) is error and "\n" not in str(raised.value)


def _csv(path: Path, *lines: str) -> Path:
    path.write_text("\ufeffbio,job,gender\r\n" + "\r\n".join(lines), encoding="utf-8", newline="")
    return path


def test_a_csv_keeps_quotes_commas_line_ends_and_words_that_look_like_nothing(tmp_path: Path) -> None:
    texts = ['He said ""no"", twice.', "two\nlines", "NA", "null", "0012", "é, ü"]
    lines = [f'"{text}","{"nurse" if i % 2 else "po,et"}",{"fm"[i // 2 % 2]}' for i, text in enumerate(texts)]
    lines += [f"filler {i},{'nurse' if i % 2 else chr(34) + 'po,et' + chr(34)},{'fm'[i // 2 % 2]}" for i in range(12)]
    task = ShiftTask.from_csv(_csv(tmp_path / "a.csv", *lines), **COLUMNS, options=SplitOptions(balance_test=False))
    assert task.name == "a.csv" and task.label_names == ("nurse", "po,et")
    read = {*task.train.texts, *task.test.texts}
    assert read >= {'He said "no", twice.', "two\nlines", "NA", "null", "0012", "é, ü"}
    for lines, line in (
        (["a,nurse,f", '"open,nurse,f'], "unexpected end of data"),
        (["a,nurse,f,more"], "line 2 has more than the 3 values of the header"),
    ):
        with pytest.raises(CorruptFileError, match=line):
            ShiftTask.from_csv(_csv(tmp_path / "b.csv", *lines), **COLUMNS)
    with pytest.raises(InvalidInputError, match="'gender' has no value in row 1"):
        ShiftTask.from_csv(_csv(tmp_path / "b.csv", "a,nurse,f", "b,poet"), **COLUMNS)
    with pytest.raises(MissingFileError, match="c.csv"):
        ShiftTask.from_csv(tmp_path / "c.csv", **COLUMNS)
    (tmp_path / "d.tsv").write_text("bio\tjob\n" + "".join(f"x, {i}\t{'ab'[i % 2]}\n" for i in range(8)), "utf-8")
    assert len(ShiftTask.from_csv(tmp_path / "d.tsv", text="bio", label="job").train) == 6


def test_a_jsonl_with_missing_fields_names_the_rows(tmp_path: Path) -> None:
    rows = [{"bio": f"text {i}", "job": i % 2, "gender": i // 2 % 2, "note": [1]} for i in range(16)]
    file = tmp_path / "a.jsonl"

    def task() -> ShiftTask:
        file.write_text("\n".join(map(json.dumps, rows)) + "\n\n", "utf-8")
        return ShiftTask.from_jsonl(file, **COLUMNS)

    assert task().label_names == ("0", "1") and len(task().train) == 12
    del rows[3]["gender"], rows[6]["gender"]
    with pytest.raises(InvalidInputError, match=r"'gender' has no value in 2 rows \(3, 6\)"):
        task()
    assert len(ShiftTask.from_jsonl(file, text="bio", label="job").train) > 9, "a column that is not used may have gaps"
    file.write_text('{"bio": "a"}\n[1]\n', "utf-8")
    with pytest.raises(CorruptFileError, match="line 2"):
        ShiftTask.from_jsonl(file, **COLUMNS)


def test_bias_in_bios_is_read_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "LabHC" / "bias_in_bios"
    folder.mkdir(parents=True)
    professions = {21: 6, 13: 6, 4: 3}
    for split in ("train", "test"):
        rows = [
            {"hard_text": f"{split} {job} {gender} {i}", "profession": job, "gender": gender}
            for job, n in professions.items() for gender in (0, 1) for i in range(n)
        ]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    task = ShiftTask.from_hub(str(folder), options=SplitOptions(rho=1.0))
    assert (task.label_names, task.spurious_names) == (("professor", "nurse"), ("male", "female"))
    assert Counter(text[:-2] for text in task.train.texts) == {"train 21 0": 6, "train 13 1": 6}
    assert set(Counter(text[:-2] for text in task.test.texts)) == {
        f"test {job} {g}" for job in (21, 13) for g in (0, 1)
    }
    assert all((label == 0) == (" 21 " in text) for text, label in zip(task.test.texts, task.test.label, strict=True))
    few = ShiftTask.from_hub(str(folder), limit=18, attribute=None, options=SplitOptions(seed=1))
    assert len(few.train) == 18 and few.spurious_names == ()
    with pytest.raises(InvalidInputError, match="can't be read"):
        ShiftTask.from_hub(str(folder), splits=("train", "nope"))
    with pytest.raises(InvalidInputError, match="no folder here"):
        circuits.ShiftTask.from_hub("nobody/nothing-of-this-name", text="a", label="b")
