from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from tests.activations.test_harvest import SITE, SMALL
from tests.tiny import tiny_model, tiny_tokenizer
from workbench.activations import files as files_module
from workbench.activations.files import about_tokens, documents, text_files
from workbench.activations.harvest import harvest
from workbench.activations.packing import packed
from workbench.activations.sources import SelfText, TextFiles, TokenRows
from workbench.core.errors import CorruptFileError, InvalidInputError, MissingFileError
from workbench.models.model import Model

TEXTS = [f"document number {i} of many" for i in range(40)]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _parquet(path: Path, texts: list[Any], column: str = "text", group: int = 7) -> Path:
    table = pyarrow.table({column: texts, "other": [3] * len(texts)})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def _jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return path


def test_parquet_gives_the_rows_that_jsonl_gives(model: Model, tmp_path: Path) -> None:
    same = [
        TextFiles(path, context=16, batch_rows=4)
        for path in (_parquet(tmp_path / "a.parquet", TEXTS), _jsonl(tmp_path / "a.jsonl", TEXTS))
    ]
    rows = [torch.cat([batch.ids for batch in source.batches(model)]) for source in same]
    assert torch.equal(*rows)
    assert len(rows[0]) == sum(len(text) + 1 for text in TEXTS) // 16
    assert torch.equal(torch.cat([b.ids for b in same[0].batches(model, 8)]), rows[0][8:])
    assert same[0].n_rows() is not None
    one = _parquet(tmp_path / "b.parquet", TEXTS, column="body")
    assert list(documents(one, "body")) == TEXTS


def test_files_are_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(*_: Any, **__: Any) -> str:
        raise AssertionError("the whole file was read at once")

    monkeypatch.setattr(Path, "read_text", whole)
    monkeypatch.setattr(Path, "read_bytes", whole)
    file = tmp_path / "a.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        lines.write('{"text": "first"}\n{"broken\n')
    stream = documents(file, "text")
    assert next(stream) == "first"
    with pytest.raises(CorruptFileError, match="line 2"):
        next(stream)
    TextFiles(file).describe()
    monkeypatch.setattr(files_module, "ROWS_AT_ONCE", 2)
    groups = documents(_parquet(tmp_path / "a.parquet", [*TEXTS[:6], None]), "text")
    assert [next(groups) for _ in range(6)] == TEXTS[:6], "the bad row lies in a batch that is not read yet"
    with pytest.raises(InvalidInputError, match=r"a\.parquet row 6 has NoneType"):
        next(groups)


def test_lines_end_only_at_newlines(tmp_path: Path) -> None:
    odd = ["one\u2028two", "three\x85four", "five"]
    assert list(documents(_jsonl(tmp_path / "a.jsonl", odd), "text")) == odd


def test_folders_and_patterns_stand_for_their_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    b = _jsonl(tmp_path / "deep" / "b.jsonl", TEXTS)
    c = _parquet(tmp_path / "c.parquet", TEXTS)
    a = tmp_path / "a.txt"
    a.write_text("text", "utf-8")
    (tmp_path / "readme.md").write_text("not text", "utf-8")
    assert text_files([tmp_path]) == (a, c, b)
    assert text_files([tmp_path / "**" / "*.jsonl", str(tmp_path / "[ac].*")]) == (b, a, c)
    assert TextFiles([c, tmp_path / "*.txt"]).paths == (c, a), "in the order given"
    with pytest.raises(MissingFileError, match=r"nothing-\*"):
        text_files([tmp_path / "nothing-*"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError, match=r"empty.*\.parquet"):
        text_files([tmp_path / "empty"])


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    file = _parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(InvalidInputError, match=r"no column 'txt'.*text"):
        next(documents(file, "txt"))
    assert about_tokens(file, "text") > 10
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CorruptFileError, match=r"a\.parquet is not a readable Parquet"):
        next(documents(file, "text"))


def _with_bos() -> Any:
    tokenizer: Any = tiny_tokenizer()

    class Adds:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

    return Adds()


def test_rows_start_with_bos_where_the_tokenizer_adds_it_and_no_token_is_lost(model: Model) -> None:
    tokenizer = _with_bos()
    rows = list(packed(TEXTS, tokenizer, context=9, batch_rows=4, tokens=None))
    ids, docs = torch.cat([r.ids for r in rows]), torch.cat([r.documents for r in rows])
    assert set(ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert torch.equal(docs[:, 0], docs[:, 1])
    plain = torch.cat([r.ids for r in packed(TEXTS, model.tokenizer, context=8, batch_rows=4, tokens=None)])
    assert torch.equal(ids[:, 1:], plain)


@pytest.mark.parametrize("batch_rows", [1, 3, 50])
def test_a_limit_stops_the_reading(batch_rows: int) -> None:
    read = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    rows = torch.cat([r.ids for r in packed(texts(), tiny_tokenizer(), context=10, batch_rows=batch_rows, tokens=55)])
    assert rows.shape == (6, 10), "rounded up to whole rows"
    assert len(read) == 3, "60 tokens are three documents of 24"


def test_the_manifest_says_how_rows_came_about(model: Model, tmp_path: Path) -> None:
    files = TextFiles(_jsonl(tmp_path / "a.jsonl", TEXTS), context=16, batch_rows=4, tokens=160)
    packing = harvest(model, files, [SITE], tmp_path / "files", options=SMALL).manifest.packing
    assert packing is not None and packing.crosses_documents and "no BOS" in packing.row_start
    assert f"id {tiny_tokenizer().eos_token_id}" in packing.separator
    own = SelfText(tokens=40, context=10, batch_size=4)
    packing = harvest(model, own, [SITE], tmp_path / "own", options=SMALL).manifest.packing
    assert packing is not None and not packing.crosses_documents
    assert f"id {tiny_tokenizer().bos_token_id}" in packing.row_start


def test_repeated_rows_are_counted(model: Model, tmp_path: Path) -> None:
    ids = torch.randint(2, 200, (20, 10), generator=torch.Generator().manual_seed(1))
    ids[15:] = ids[3]
    store = harvest(model, TokenRows(ids, batch_rows=4), [SITE], tmp_path / "s", options=SMALL)
    assert store.manifest.unique_rows == 15
    assert store.manifest.unique_share == pytest.approx(15 / 20)


def test_home_and_byte_order_marks_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\r\n')
    found = text_files(["~/a.txt", "~/b.jsonl"])
    assert found == (tmp_path / "a.txt", tmp_path / "b.jsonl")
    assert [text for file in found for text in documents(file, "text")] == ["plain", "line"]


def test_a_line_that_is_no_object_is_told_from_a_missing_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("null\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="line 1 holds a NoneType"):
        list(documents(tmp_path / "a.jsonl", "text"))
