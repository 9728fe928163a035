from __future__ import annotations

from pathlib import Path

import pytest

from workbench.core.errors import CorruptFileError, InvalidInputError, MismatchError
from workbench.engine.log import Log

KEY = {"model": "abc", "prompts": "def", "dtype": "float32"}


def test_what_was_appended_is_there_after_opening_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "tokens.jsonl"
    first = Log(file, KEY)
    assert first.done() == {}
    first.append([{"token_id": 3, "p": 0.1 + 0.2}, {"token_id": 1, "p": float("nan")}])
    first.append([{"token_id": 3, "q": [1.0, 2.0]}])
    expected = {3: {"token_id": 3, "p": 0.1 + 0.2, "q": [1.0, 2.0]}, 1: {"token_id": 1, "p": None}}
    assert first.done() == expected == Log(file, KEY).done()
    first.done()[3]["p"] = 0.0
    assert first.done() == expected


def test_a_line_that_a_kill_cut_off_is_dropped_at_every_length(tmp_path: Path) -> None:
    file = tmp_path / "tokens.jsonl"
    log = Log(file, KEY)
    log.append([{"token_id": 1, "p": 0.5}])
    kept = file.read_bytes()
    log.append([{"token_id": 2, "p": 0.25}])
    whole = file.read_bytes()
    for size in range(len(kept), len(whole)):
        file.write_bytes(whole[:size])
        again = Log(file, KEY)
        assert set(again.done()) == {1}
        again.append([{"token_id": 2, "p": 0.25}])
        assert file.read_bytes() == whole
    for size in range(len(kept.split(b"\n")[0]) + 1):
        file.write_bytes(whole[:size])
        assert Log(file, KEY).done() == {}


def test_results_of_something_else_are_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "tokens.jsonl"
    Log(file, KEY).append([{"token_id": 1}])
    before = file.read_bytes()
    with pytest.raises(MismatchError, match="dtype: file float32, now bfloat16"):
        Log(file, KEY | {"dtype": "bfloat16"})
    with pytest.raises(MismatchError, match="steps: file nothing, now 3"):
        Log(file, KEY | {"steps": "3"})
    assert file.read_bytes() == before


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tokens.jsonl"
    Log(file, KEY).append([{"token_id": 1}, {"token_id": 2}])
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], '{"token_id": \n', lines[2]]))
    with pytest.raises(CorruptFileError, match="line 2"):
        Log(file, KEY)
    file.write_text(lines[1])
    with pytest.raises(CorruptFileError, match="no log"):
        Log(file, KEY)


def test_a_row_without_a_token_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    file = tmp_path / "tokens.jsonl"
    log = Log(file, KEY)
    before = file.read_bytes()
    with pytest.raises(InvalidInputError, match="token_id"):
        log.append([{"token_id": 1}, {"p": 0.5}])
    assert file.read_bytes() == before and log.done() == {}
