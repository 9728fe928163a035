from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from tests.glitch.tiny_more import HOSTILE, scan_with, unigram, wordpiece
from tests.glitch.tiny_vocab import EMBED, SPECIAL, byte_level, folder, matrix, sentencepiece
from workbench.cli import main
from workbench.core.codec import FastCodec
from workbench.core.errors import InvalidInputError, MismatchError, MissingFileError, UnknownNameError
from workbench.glitch.text import spans
from workbench.glitch.text.linter import KINDS, Linter, fragments, linter_for
from workbench.glitch.text.spans import encode_spans, windows


@pytest.fixture(autouse=True)
def _no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def _linter(tokenizer: Tokenizer, grades: dict[str, str], **options: object) -> Linter:
    return Linter.of(*scan_with(tokenizer, grades), **options)  # type: ignore[arg-type]


def _places(linter: Linter, text: str) -> list[tuple[str, int, int, str]]:
    return [(f.kind, f.line, f.column, f.text) for f in linter.text(text).places]


def test_places_are_exact_and_lines_and_columns_count_from_one() -> None:
    linter = _linter(byte_level(), {"ember": "verified", "Ġharbor": "candidate", "delta": "rejected"})
    text = "alpha\nxx ember harbor\n\nember delta\ndelta"
    report = linter.text(text)
    found = [(f.kind, f.line, f.column, text[f.start : f.end]) for f in report.places]
    # " ember" with its space is another token than "ember", and is not flagged
    assert found == [("candidate", 2, 9, " harbor"), ("verified", 4, 1, "ember")]
    assert all(f.text == text[f.start : f.end] for f in report.places)
    assert report.by_kind["verified"] == 1 and report.n_findings == 2
    assert [(row.text, row.kind, row.count, row.documents) for row in report.counts] == [
        ("ember", "verified", 1, 1), (" harbor", "candidate", 1, 1),
    ]  # fmt: skip
    assert report.guard == tuple(sorted(row.token_id for row in report.counts))


def test_lost_bytes_halves_and_specials_are_found_where_they_stand() -> None:
    linter = _linter(byte_level(missing=("Ą",)), {})
    text = f"ab\x04c \ud800 {SPECIAL} é"
    assert _places(linter, text) == [
        ("lost", 1, 3, "\x04"), ("not_utf8", 1, 6, "\ud800"), ("special", 1, 8, SPECIAL),
    ]  # fmt: skip
    assert [item.code for item in linter.text(text).lost] == [4]
    assert linter.text("plain é text").n_findings == 0


@pytest.mark.parametrize(("make", "text", "lost"), [
    (wordpiece, "alpha, bravo! ALPHA.", []),
    (wordpiece, "alpha 中 bravo", ["中"]),
    (unigram, "alpha é 中\x04", []),
    (sentencepiece, "alpha é 中\x04", []),
])  # fmt: skip
def test_what_survives_is_not_called_lost(make: object, text: str, lost: list[str]) -> None:
    report = _linter(make(), {}).text(text)  # type: ignore[operator]
    assert [f.text for f in report.places if f.kind == "lost"] == lost
    assert report.n_findings == len(lost)


def test_a_fragment_is_a_token_that_only_builds_flagged_ones() -> None:
    tokenizer = byte_level()
    codec = FastCodec.of(tokenizer)
    ids = {raw: i for i, raw in enumerate(codec.raw)}
    # "embe" only builds "ember", which builds "Ġember" too; "ha" is a step to harbor alone
    parts = fragments(codec, {ids["ember"], ids["Ġember"], ids["harbo"]})
    assert parts == {ids["embe"]: ids["ember"], ids["harb"]: ids["harbo"]}
    rare = scan_with(tokenizer, {"ember": "candidate"}, low=("embe",))
    assert [f.kind for f in Linter.of(*rare).text("embe").places] == ["fragment"]
    assert Linter.of(*rare, kinds=("candidate",)).text("embe").n_findings == 0
    # with a row like everybody's it is a common piece
    assert _linter(tokenizer, {"ember": "candidate"}).text("embe").n_findings == 0
    assert fragments(FastCodec.of(unigram()), {300}) == {}
    vocab = {token: i for i, token in enumerate(("a", "b", "c", "d", "ab", "abc", "abd"))}
    shared = FastCodec.of(Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c"), ("ab", "d")])))
    # "ab" builds "abd" too, which nothing speaks against
    assert fragments(shared, {5}) == {} and fragments(shared, {5, 6}) == {4: 5}


@pytest.mark.parametrize("make", [byte_level, sentencepiece, unigram])
def test_windows_give_the_tokens_of_the_whole_text(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "WINDOW", 300)
    monkeypatch.setattr(spans, "MARGIN", 40)
    codec = FastCodec.of(make())  # type: ignore[operator]
    text = "".join(f"alpha {'é' if k % 7 == 0 else 'bravo'}keeper\nember中 {k} " for k in range(200))
    ids, places = encode_spans(codec, [text])[0]
    parts = [text[k : k + 97] for k in range(0, len(text), 97)]
    pieces = list(windows(codec, parts))
    assert len(pieces) > 10
    assert [i for piece in pieces for i in piece.ids] == ids
    assert [span for piece in pieces for span in piece.spans] == places
    assert [piece.begin for piece in pieces[1:]] == [piece.end for piece in pieces[:-1]]
    assert (pieces[0].begin, pieces[-1].end) == (0, len(text))


def test_a_long_line_and_many_lines_have_the_same_findings_as_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    linter = _linter(byte_level(), {"Ġharbor": "verified"})
    for text in ("alpha harbor " * 400, "alpha harbor\n" * 400):
        whole = [(f.line, f.column, f.start, f.kind) for f in linter.text(text).places]
        monkeypatch.setattr(spans, "WINDOW", 200)
        monkeypatch.setattr(spans, "MARGIN", 20)
        assert [(f.line, f.column, f.start, f.kind) for f in linter.text(text).places] == whole
        assert len(whole) == 400
        monkeypatch.undo()


def test_files_of_every_kind_are_counted_alike(tmp_path: Path) -> None:
    linter = _linter(byte_level(), {"ember": "verified"})
    texts = ["ember one", "nothing", "xx\nember ember"]
    (tmp_path / "a.txt").write_text("ember\r\nember", newline="")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": t}) + "\n\n" for t in texts))
    pq.write_table(pa.table({"body": texts}), tmp_path / "c.parquet")
    for name in ("b.jsonl", "c.parquet"):
        report = linter.files([tmp_path / name], column="body")
        assert [(f.document, f.line, f.column) for f in report.places] == [(1, 1, 1), (3, 2, 1)]
        assert (report.documents, report.counts[0].count, report.counts[0].documents) == (3, 2, 2)
    assert [(f.line, f.column) for f in linter.files([tmp_path / "a.txt"]).places] == [(1, 1), (2, 1)]
    assert linter.files([tmp_path], column="body").counts[0].count == 6
    assert linter.files([tmp_path / "b.jsonl"], column="body", limit=1).n_findings == 2
    with pytest.raises(InvalidInputError, match="body"):
        linter.files([tmp_path / "b.jsonl"])
    with pytest.raises(MissingFileError):
        linter.files([tmp_path / "absent.txt"])


def test_hostile_text_is_shown_harmlessly(tmp_path: Path) -> None:
    linter = _linter(byte_level(), {"ember": "verified"})
    (tmp_path / "bad.txt").write_bytes("\n".join(f"{h}\nember{h}" for h in HOSTILE).encode() + b"\xff\xfe\nember")
    report = linter.files([tmp_path / "bad.txt"])
    assert report.by_kind["not_utf8"] == 2 and report.by_kind["verified"] == len(HOSTILE) + 1
    written = report.to_csv(tmp_path / "f.csv").read_text(encoding="utf-8")
    html = report._repr_html_()
    said = "\n".join(map(str, report.places))
    for text in (written, html, said):
        assert not {"\u202e", "\x00", "\x1b", "\u2028", "\udcff"} & set(text)
    assert "<script>alert" not in html
    rows = list(csv.DictReader(written.splitlines()))
    assert len(rows) == report.n_findings and rows[0]["kind"] == "verified"
    json.dumps(report.to_json(), allow_nan=False)


def test_a_scan_of_another_tokenizer_is_refused() -> None:
    scan, _ = scan_with(byte_level(), {"ember": "verified", "delta": "verified"})
    with pytest.raises(MismatchError, match="another tokenizer"):
        Linter.of(scan, FastCodec.of(unigram()))
    with pytest.raises(UnknownNameError, match="borderline"):
        _linter(byte_level(), {}, kinds=("borderlin",))


def test_without_a_scan_the_weights_flag_and_unused_rows_are_guarded(tmp_path: Path) -> None:
    tokenizer = byte_level()
    at = tokenizer.token_to_id
    unused = [at(f"<unused{k}>") for k in range(6)]
    made = folder(tmp_path, tokenizer, {EMBED: matrix(tokenizer.get_vocab_size() - 2, [*unused[:4], at("ember")])})
    linter = linter_for(str(made))
    report = linter.text("ember <unused0> <unused5> bravo")
    kinds = {row.text: row.kind for row in report.counts}
    assert kinds == {"ember": "candidate", "<unused0>": "reference", "<unused5>": "no_row"}
    assert report.guard == tuple(sorted((at("ember"), unused[0], unused[5])))


def test_the_command_says_by_its_exit_code_whether_something_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level()
    unused = [tokenizer.token_to_id(f"<unused{k}>") for k in range(6)]
    rows = matrix(tokenizer.get_vocab_size(), [*unused, tokenizer.token_to_id("ember")])
    model = folder(tmp_path / "m", tokenizer, {EMBED: rows})
    runs = str(tmp_path / "runs")
    assert main(["glitch", "scan", str(model), "--out", runs, "--percentile", "1", "--json"]) == 0
    scan = json.loads(capsys.readouterr().out)["run"]
    bad, good = tmp_path / "bad.txt", tmp_path / "good.txt"
    bad.write_text("alpha\nember")
    good.write_text("alpha bravo")
    common = ["--model", str(model), "--scan", scan, "--out", runs]
    assert main(["glitch", "lint", str(bad), *common, "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert (shown["n_findings"], shown["guard"]) == (1, [tokenizer.token_to_id("ember")])
    assert (Path(shown["run"]) / "DONE").is_file() and (Path(shown["run"]) / "artifacts" / "findings.csv").is_file()
    assert main(["glitch", "lint", str(bad), *common, "--no-fail"]) == 0
    assert "bad.txt:2:1  candidate" in capsys.readouterr().out
    assert main(["glitch", "lint", str(good), *common]) == 0
    assert main(["glitch", "lint", str(tmp_path / "absent"), *common]) == 2


def test_every_kind_has_a_meaning() -> None:
    assert all(KINDS.values())


@pytest.mark.embedded
def test_the_embedded_tokenizer_loses_its_missing_bytes() -> None:
    report = linter_for("embedded").text("a\x04b \U00040000 <|im_end|> transistorsum")
    assert [f.kind for f in report.places] == ["lost", "lost", "special", "candidate"]
