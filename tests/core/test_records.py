from __future__ import annotations

import enum
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.core import atomic
from workbench.core.atomic import replacing, write_atomic
from workbench.core.errors import CorruptFileError, InvalidInputError, MissingFileError, UnknownConfigKeyError
from workbench.core.jsontext import content_of, parse_json
from workbench.core.records import from_jsonable, json_lines, load_json, read_text, save_json, to_jsonable


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Circle:
    size: float
    kind: Literal["circle"] = field(default="circle", init=False)


@dataclass(frozen=True)
class Square:
    size: float
    kind: Literal["square"] = field(default="square", init=False)


@dataclass(frozen=True, kw_only=True)
class Config:
    n: int
    inner: Inner = Inner()
    out: Path | None = None
    pair: tuple[int, str] = (1, "a")
    table: dict[int, float] = field(default_factory=dict)
    colour: Colour = Colour.RED
    shapes: tuple[Circle | Square, ...] = ()
    limit: float | None = None
    mixed: float | str | int | Inner | None = None


def _round_trip(cls: type, value: object) -> object:
    return from_jsonable(cls, json.loads(json.dumps(to_jsonable(value), allow_nan=False)))


def test_a_nested_dataclass_comes_back_equal() -> None:
    config = Config(
        n=3,
        inner=Inner(1.0, ("a", "b")),
        out=Path("x/y"),
        pair=(2, "z"),
        table={5: 0.25},
        limit=2.0,
        shapes=(Circle(1.0), Square(1.0)),
        mixed=Inner(),
    )
    assert _round_trip(Config, config) == config


def test_kind_tells_apart_dataclasses_with_the_same_fields() -> None:
    shapes = from_jsonable(tuple[Circle | Square, ...], [{"size": 1.0, "kind": "square"}])
    assert shapes == (Square(1.0),)


@pytest.mark.parametrize("value", [1, 1.0, "1", None])
def test_a_union_keeps_the_type_of_a_number(value: object) -> None:
    back = _round_trip(Config, Config(n=1, mixed=value))
    assert type(back.mixed) is type(value)  # 1 == 1.0, so equality would not see it


def test_long_lists_of_plain_values_are_as_strict_as_short_ones() -> None:
    assert from_jsonable(tuple[float | None, ...], [0.5, None]) == (0.5, None)
    assert [type(x) for x in from_jsonable(list[float], [1, 2.0])] == [float, float]
    for kind, data in ((tuple[int, ...], [1, True]), (tuple[str, ...], ["a", 1]), (tuple[float | None, ...], ["a"])):
        with pytest.raises(InvalidInputError):
            from_jsonable(kind, data)


def test_what_is_not_finite_survives() -> None:
    assert math.isnan(_round_trip(Inner, Inner(float("nan"))).rate)
    assert _round_trip(Inner, Inner(float("-inf"))).rate == -math.inf
    assert _round_trip(Config, Config(n=1, mixed=math.inf)).mixed == math.inf
    assert _round_trip(Config, Config(n=1, mixed="Infinity")).mixed == "Infinity"


def test_unknown_keys_are_refused_with_the_close_name() -> None:
    with pytest.raises(UnknownConfigKeyError, match=r"Config.inner has no key 'rat'. Did you mean rate"):
        from_jsonable(Config, {"n": 1, "inner": {"rat": 1.0}})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "lacks the key 'n'"),
        ({"n": 1.5}, "Config.n: 1.5 is a float; expected int"),
        ({"n": True}, "Config.n: True is a bool"),
        ({"n": 1, "pair": [1]}, "expected a list of 2"),
        ({"n": 1, "colour": "blue"}, "expected 'red'"),
        ({"n": 1, "inner": 3}, "Config.inner: 3"),
        ({"n": 1, "shapes": [{"size": 1.0, "kind": "star"}]}, "star|expected"),
    ],
)
def test_values_of_another_type_are_refused_by_name(data: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        from_jsonable(Config, data)


def test_foreign_numbers_become_plain_ones() -> None:
    value = (np.float32(0.5), np.int64(3), torch.tensor(2.0), np.array([1, 2]), torch.float32, torch.device("cpu"))
    assert to_jsonable(value) == [0.5, 3, 2.0, [1, 2], "torch.float32", "cpu"]


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="object"):
        to_jsonable(object())
    with pytest.raises(InvalidInputError, match="1,000,000 values"):
        to_jsonable(torch.zeros(1000, 1000))
    with pytest.raises(InvalidInputError, match="JSON key"):
        to_jsonable({(1, 2): 3})


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_json(tmp_path / "a.json", {"x": 1})

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="No space left"):
        save_json(file, {"x": 2})
    assert load_json(file) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_half_characters_do_not_stop_a_file_from_being_written(tmp_path: Path) -> None:
    assert load_json(save_json(tmp_path / "a.json", "\udc80x")) == "\udc80x"


def test_missing_and_broken_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nothing.json"):
        load_json(tmp_path / "nothing.json")
    with pytest.raises(CorruptFileError, match="is not JSON"):
        load_json(write_atomic(tmp_path / "a.json", "{"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "nested more than 64"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64"),
        ("9" * 5000, "5000 digits"),
        ("9" * 21, "21 digits"),
        ("1e999", "too large"),
        ("[NaN]", "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("\x00", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_can_not_be_used_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CorruptFileError, match=said) as caught:
        load_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_json_of_other_programs_may_hold_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"limit": [0.0, Infinity], "max": 1000000000000000019884624838656, "max": 1}')
    assert load_json(tmp_path / "a.json", dict, foreign=True) == {"limit": [0.0, float("inf")], "max": 1}
    for text in ("[" * 200_000, "9" * 5000, "{"):
        with pytest.raises(CorruptFileError):
            parse_json(text, "here", foreign=True)


def test_only_json_files_of_the_right_kind_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CorruptFileError, match="utf-8"):
        load_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(CorruptFileError, match="holds a list, not an object"):
        load_json(tmp_path / "a.json", dict)
    with pytest.raises(InvalidInputError, match="is a folder"):
        load_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInputError, match="a pipe"):
        load_json(tmp_path / "pipe")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(CorruptFileError, match=r"1,099,511,627,776 bytes"):
        load_json(tmp_path / "huge.json")


def test_lines_of_json_name_the_wrong_one(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "\u2028"}\n\n{"b": 2}\n{"c"')
    assert list(json_lines(file, only_whole=True)) == [{"a": "\u2028"}, {"b": 2}]
    with pytest.raises(CorruptFileError, match="line 4"):
        list(json_lines(file))
    file.write_text("[]")
    with pytest.raises(CorruptFileError, match="line 1, holds a list"):
        list(json_lines(file))


@pytest.mark.parametrize("data", [{"$float": "x"}, {"$float": [1]}, {"$float": None}, 10**400])
def test_what_is_no_float_is_refused(data: object) -> None:
    with pytest.raises(InvalidInputError):
        from_jsonable(float, data)
    with pytest.raises(InvalidInputError):
        from_jsonable(dict[int, float], {"x": 1.0})


def test_errors_of_a_file_s_content_name_the_file() -> None:
    for wrong in (lambda: {}["a"], lambda: int("x"), lambda: 1 / 0, lambda: None.items(), lambda: [][0]):  # type: ignore
        with (
            pytest.raises(CorruptFileError, match=r"^a\.json can't be read \(\w+: .+\)\. Delete it"),
            content_of("a.json"),
        ):
            wrong()
    with pytest.raises(MissingFileError), content_of("a.json"):
        raise MissingFileError("no")


def test_what_killed_writers_left_is_removed_and_what_live_ones_write_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_swept", set())
    (tmp_path / ".b.json.0123abcd.wb.tmp").write_text("left")
    (tmp_path / ".b.json.0123abcd.tmp").write_text("another program's")
    with replacing(tmp_path / "a.json") as file:
        monkeypatch.setattr(atomic, "_swept", set())
        write_atomic(tmp_path / "b.json", "1")
        assert Path(file.name).exists()
        file.write(b"2")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json", ".b.json.0123abcd.tmp"}
    assert (tmp_path / "a.json").read_text() == "2"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(_json)
def test_json_values_are_their_own_form(value: object) -> None:
    assert to_jsonable(value) == value


def test_text_is_read_without_its_mark_or_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\ufeffä\r\n", encoding="utf-8", newline="")
    assert read_text(file) == "ä\n"
    file.write_text("ä", encoding="latin-1")
    with pytest.raises(CorruptFileError, match=r"a\.txt is not UTF-8"):
        read_text(file)


def test_a_folder_is_not_overwritten_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is a folder and can't be written"):
        write_atomic(tmp_path, "a")
