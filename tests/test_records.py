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

from workbench.errors import CorruptFileError, InvalidInputError, MissingFileError, UnknownConfigKeyError
from workbench.records import from_jsonable, load_json, read_text, save_json, to_jsonable, write_atomic


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
