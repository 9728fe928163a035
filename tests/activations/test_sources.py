from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import prefixed_tokenizer, tiny_model, tiny_tokenizer
from workbench.activations.harvest import harvest
from workbench.activations.packing import packing_of
from workbench.activations.sources import HubDataset, SelfText, TextFiles, TokenRows
from workbench.core.errors import CorruptFileError, DegenerateInputError, InvalidInputError, MissingFileError
from workbench.models import tiny
from workbench.models.loading import load_model, load_tokenizer
from workbench.models.model import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _all(source: SelfText | TextFiles | TokenRows | HubDataset, model: Model, start: int = 0) -> torch.Tensor:
    return torch.cat([batch.ids for batch in source.batches(model, start)])


def test_self_text_starts_with_bos_and_does_not_depend_on_where_it_is_resumed(model: Model) -> None:
    source = SelfText(tokens=100, context=12, batch_size=4)
    rows = _all(source, model)
    assert rows.shape == (9, 12), "rounded up to whole rows"
    assert set(rows[:, 0].tolist()) == {tiny_tokenizer().bos_token_id}
    assert torch.equal(_all(source, model, 4), rows[4:])
    assert len({tuple(row) for row in rows.tolist()}) == 9
    assert not torch.equal(_all(SelfText(tokens=100, context=12, batch_size=4, seed=1), model), rows)


def test_text_files_are_packed_without_padding_and_less_than_a_row_is_lost(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij", encoding="utf-8")
    lines = [json.dumps({"text": "klm"}), "", json.dumps({"text": "nopqrs"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = TextFiles([tmp_path / "a.txt", tmp_path / "b.jsonl"], context=5, batch_rows=2)
    batches = list(source.batches(model))
    ids = torch.cat([batch.ids for batch in batches])
    documents = torch.cat([batch.documents for batch in batches])
    tokenizer, end = tiny_tokenizer(), tiny_tokenizer().eos_token_id
    expected = []
    for text in ("abcdefghij", "klm", "nopqrs"):
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
    assert ids.flatten().tolist() == expected[: 5 * 4], "22 tokens: four rows, two lost"
    assert documents.flatten().tolist() == ([0] * 11 + [1] * 4 + [2] * 7)[:20]
    assert torch.equal(_all(source, model, 2), ids[2:])


def test_tokens_limits_the_rows(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghij" * 20, encoding="utf-8")
    assert _all(TextFiles(tmp_path / "a.txt", tokens=12, context=5), model).shape == (3, 5)


def test_bad_files_are_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere.txt"):
        TextFiles(tmp_path / "nowhere.txt")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text"', encoding="utf-8")
    with pytest.raises(CorruptFileError, match=r"bad.jsonl line 2"):
        _all(TextFiles(bad), model)
    bad.write_text('{"content": "fine"}', encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"content"):
        _all(TextFiles(bad), model)
    short = tmp_path / "short.txt"
    short.write_text("ab", encoding="utf-8")
    with pytest.raises(DegenerateInputError, match="one row needs 128"):
        _all(TextFiles(short), model)
    short.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CorruptFileError, match="UTF-8"):
        _all(TextFiles(short), model)


def test_token_rows_must_be_long_rows() -> None:
    with pytest.raises(InvalidInputError, match="int64"):
        TokenRows(torch.zeros(3, 1, dtype=torch.long))


def test_a_local_dataset_is_streamed(model: Model, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"body": "word " * 9}) for _ in range(3)), "utf-8")
    source = HubDataset(str(tmp_path), column="body", tokens=60, context=20)
    assert _all(source, model).shape == (3, 20)
    with pytest.raises(InvalidInputError, match="body"):
        _all(HubDataset(str(tmp_path), tokens=60, context=20), model)


def test_a_dataset_that_can_t_be_read_is_named_with_the_reason(model: Model, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_dict({"text": ["word " * 9] * 3}).save_to_disk(str(tmp_path / "one"))
    DatasetDict({"dev": Dataset.from_dict({"text": ["word " * 9] * 3})}).save_to_disk(str(tmp_path / "more"))
    for name, split in (("one", "train"), ("more", "dev")):
        assert _all(HubDataset(str(tmp_path / name), split, tokens=60, context=20), model).shape == (3, 20)
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in ("word " * 9, None)), "utf-8")
    for source, why in (
        (HubDataset(str(tmp_path / "more"), "nope", tokens=60, context=20), "split='nope'.*KeyError"),
        (HubDataset(str(rows), "nope", tokens=60, context=20), "split='nope'"),
        (HubDataset(str(rows), tokens=600, context=20), "row 1 of 'train', has NoneType in 'text'"),
        (HubDataset(str(rows), column="n", tokens=60, context=20), "row 0 of 'train', has int in 'n'"),
        (HubDataset(str(tmp_path / "nothing"), tokens=60, context=20), "can't be read"),
    ):
        with pytest.raises(InvalidInputError, match=why):
            _all(source, model)


def test_half_a_character_in_a_document_is_named(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "not \\ud800 fine"}\n', "utf-8")
    with pytest.raises(InvalidInputError, match=r"Document 1 \(from 0\) holds half a character, .ud800 at 4"):
        _all(TextFiles(tmp_path / "a.jsonl", context=4), model)


def test_rows_start_with_all_that_the_tokenizer_puts_in_front(tmp_path: Path) -> None:
    tokenizer = prefixed_tokenizer()
    model = Model(tiny.tiny_hf("llama", len(tokenizer)), tokenizer)
    start = tokenizer("")["input_ids"]
    assert len(start) == 2
    (tmp_path / "a.txt").write_text("abcdefghij" * 3, "utf-8")
    for source, first in ((TextFiles(tmp_path / "a.txt", context=8), [tmp_path / "a.txt"]), (SelfText(16, 8), [16])):
        rows = _all(source, model)
        assert rows[:, :2].tolist() == [start] * len(rows) and rows.shape[1] == 8
        packing = packing_of(source, tokenizer)
        assert f"[gMASK]<sop> (ids {start})" in packing.row_start and packing.starts_with_bos
        with pytest.raises(InvalidInputError, match=r"context=2.*Raise context"):
            _all(type(source)(*first, context=2), model)
    store = harvest(model, SelfText(tokens=64, context=8), ["resid_post.0"], tmp_path / "s")
    assert set(start) <= set(store.manifest.special_ids)
    assert not torch.isin(store.token_rows("all")[:, 2:], torch.tensor(start)).all()


def test_a_line_whose_text_is_no_text_says_so(tmp_path: Path, model: Model) -> None:
    (tmp_path / "n.jsonl").write_text('{"text": null, "body": "a"}\n', "utf-8")
    with pytest.raises(
        InvalidInputError, match=r"line 1 has None in 'text', not a text; set column= to one of \['body'\]"
    ):
        _all(TextFiles(tmp_path / "n.jsonl", context=4), model)
    with pytest.raises(InvalidInputError, match=r"line 1 has no 'txt'. Did you mean text"):
        _all(TextFiles(tmp_path / "n.jsonl", context=4, column="txt"), model)


def test_rows_of_ids_need_no_tokenizer(tmp_path: Path) -> None:
    model = Model(tiny.tiny_hf("llama", 60), None)
    ids = torch.arange(2, 50).view(6, 8)
    store = harvest(model, TokenRows(ids), ["resid_post.1"], tmp_path / "s")
    assert torch.equal(store.token_rows("all"), ids) and store.manifest.tokenizer_sha256 is None
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        harvest(model, SelfText(tokens=16, context=8), ["resid_post.1"], tmp_path / "t")
    model.hf.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m", dtype="float32")
    assert torch.equal(loaded.logits(ids), model.logits(ids)) and "no tokenizer" in repr(loaded)
    with pytest.raises(MissingFileError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "m")
