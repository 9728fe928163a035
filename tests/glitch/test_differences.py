from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.glitch.tiny_copy import PADDING, wordy_model
from tests.glitch.tiny_more import scan_with, wordpiece
from tests.glitch.tiny_vocab import EMBED, byte_level, folder, matrix, sentencepiece
from workbench.cli import main
from workbench.core.errors import CorruptFileError, MissingFileError, UnknownNameError
from workbench.core.records import save_json
from workbench.glitch.scanning.differences import between, side
from workbench.glitch.scanning.saved import SavedScan, TokenFact, load_scan, of_report
from workbench.glitch.scanning.scanner import ScanOptions, scan
from workbench.glitch.text.banlist import ban_list


@pytest.fixture(autouse=True)
def _no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def _changed(a: SavedScan, b: SavedScan, kind: str) -> set[tuple[str, int, int]]:
    return {(c.text, c.id_a, c.id_b) for c in between(a, b).changes if c.kind == kind}


def test_the_same_tokenizer_is_compared_by_id() -> None:
    a, codec = scan_with(byte_level(), {"ember": "verified", "delta": "borderline", "alpha": "candidate"})
    b, _ = scan_with(
        byte_level(), {"ember": "rejected", "delta": "verified", "bravo": "candidate", "alpha": "candidate"}
    )
    ids = {word: codec.raw.index(word) for word in ("ember", "delta", "bravo")}
    report = between(a, b)
    assert report.matched_by == "id" and report.shared == report.n_a == report.n_b
    assert _changed(a, b, "flag_gone") == {("ember", ids["ember"], ids["ember"])}
    assert _changed(a, b, "flag_new") == {("bravo", ids["bravo"], ids["bravo"])}
    assert _changed(a, b, "grade") == {("delta", ids["delta"], ids["delta"])}
    assert {c[0] for c in _changed(a, b, "verdict")} == {"ember", "delta"}
    assert sum(report.counts().values()) == 5
    assert (report.flagged_a, report.flagged_b["verified"]) == (
        {"verified": 1, "borderline": 1, "candidate": 1, "reference": 6},
        1,
    )
    assert between(a, a).changes == () and "No token differs." in between(a, a).findings()


def test_ids_that_moved_are_followed_by_their_text() -> None:
    a, left = scan_with(byte_level(), {"ember": "verified"})
    b, right = scan_with(byte_level(special_first=False, missing=("ÿ", "Ą")), {"ember": "verified"})
    report = between(a, b)
    moved = _changed(a, b, "moved")
    assert report.matched_by == "text" and ("ember", left.raw.index("ember"), right.raw.index("ember")) in moved
    assert all(i != j for _, i, j in moved)
    assert {text for text, _, j in _changed(a, b, "only_a")} == {"<0xFF>", "\\x04"}
    assert report.lossy_b == (0x04,) and report.lossy_a == ()
    assert any("DIFFERENT TOKENIZERS" in said for said in report.findings())
    assert not _changed(a, b, "flag_gone") and not _changed(a, b, "flag_lost_token")


def test_a_flag_whose_token_is_gone_is_told_apart_from_a_flag_that_is_gone() -> None:
    a, _ = scan_with(byte_level(), {"embe": "verified", "ember": "verified"})
    b, _ = scan_with(wordpiece(), {})
    report = between(a, b)
    assert {text for text, _, _ in _changed(a, b, "flag_lost_token")} >= {"embe"}
    assert {text for text, _, _ in _changed(a, b, "flag_gone")} == {"ember"}
    gone = report.metrics()["flags_gone"]
    assert not isinstance(gone, int | float | str) and (gone.value, gone.n) == (1.0, 1)


def test_a_saved_scan_says_the_same_as_the_scan_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level(missing=("Ą",))
    at = tokenizer.token_to_id
    unused = [at(f"<unused{k}>") for k in range(6)]
    made = folder(tmp_path / "m", tokenizer, {EMBED: matrix(tokenizer.get_vocab_size() + 3, [*unused, at("ember")])})
    assert main(["glitch", "scan", str(made), "--out", str(tmp_path / "runs"), "--json"]) == 0
    run = Path(json.loads(capsys.readouterr().out)["run"])
    live, saved = of_report(scan(made)), load_scan(run)
    assert saved.complete and saved.flags() == live.flags() and saved.lossy == live.lossy
    assert {i: f.text for i, f in saved.tokens.items()} == {i: f.text for i, f in live.tokens.items()}
    assert between(live, saved).changes == ()
    (run / "artifacts" / "tokens.csv").unlink()
    alone = load_scan(run / "artifacts" / "glitch.json")
    assert not alone.complete
    assert alone.flags(("candidate",)) == live.flags(("candidate",))
    assert between(alone, live).counts()["flag_gone"] == 0


def test_without_evidence_the_tokenizers_are_not_called_the_same() -> None:
    def made(first: int, n: int, vocabulary: str = "") -> SavedScan:
        facts = {i: TokenFact(token_id=i, text=f"t{i}", category="ok", candidate=True) for i in range(first, first + n)}
        return SavedScan(
            model="m", origin="test", tokens=facts, complete=False, lossy=(), ranked=True, vocabulary=vocabulary
        )

    apart = between(made(0, 10), made(50, 10))
    assert apart.matched_by == "text" and not apart.evident
    assert any(said.startswith("NOT KNOWN whether both have the same tokenizer") for said in apart.findings())
    assert between(made(0, 10), made(5, 10)).matched_by == "text"
    assert between(made(0, 30), made(5, 30)).matched_by == "id"
    assert between(made(0, 10, "x"), made(50, 10, "x")).matched_by == "id"
    other = between(made(0, 30, "x"), made(5, 30, "y"))
    assert other.matched_by == "text" and other.evident


def test_a_scan_without_its_table_knows_the_kind_of_what_was_tested(tmp_path: Path) -> None:
    model = wordy_model("llama")
    half, byte = (model.tokenizer.convert_tokens_to_ids(raw) for raw in ("Ã", "z"))
    with torch.no_grad():
        rows = model.hf.get_output_embeddings().weight
        rows[[half, byte]] = rows[PADDING[0]] + 1e-4
    report = scan(model, "top", options=ScanOptions(percentile=10.0, top=60, controls=5, sides=False))
    save_json(tmp_path / "glitch.json", report.to_json())
    live, alone = of_report(report), load_scan(tmp_path)
    tested = [t.token_id for t in report.verification.tested] if report.verification else []
    assert {half, byte} <= set(tested) and alone.vocabulary == live.vocabulary
    assert [alone.tokens[i] for i in tested] == [live.tokens[i] for i in tested]
    grades = ("verified", "borderline", "candidate")
    left_out = "single bytes and incomplete characters"
    bans = ban_list(alone, grades)
    assert bans.left_out[left_out] == ban_list(live, grades).left_out[left_out] != ()


def test_models_tokenizers_and_scans_are_all_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level()
    rows = matrix(tokenizer.get_vocab_size(), [tokenizer.token_to_id(f"<unused{k}>") for k in range(6)])
    made = folder(tmp_path / "m", tokenizer, {EMBED: rows})
    only = tmp_path / "only"
    only.mkdir()
    sentencepiece().save(str(only / "tokenizer.json"))
    assert side(made).ranked and not side(made, tokenizer_only=True).ranked and not side(only).ranked
    assert main(["glitch", "diff", str(made), str(only), "--out", str(tmp_path / "runs"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["matched_by"] == "text"
    file = Path(shown["run"]) / "artifacts" / "changes.csv"
    assert len(list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))) == len(shown["changes"])
    with pytest.raises(MissingFileError, match="neither a scan nor a model"):
        side(tmp_path)


def test_what_is_no_scan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no saved scan"):
        load_scan(tmp_path)
    (tmp_path / "glitch.json").write_text('{"a": 1}')
    with pytest.raises(CorruptFileError, match="glitch.json of a scan"):
        load_scan(tmp_path)
    scan_, _ = scan_with(byte_level(), {})
    with pytest.raises(UnknownNameError, match="verified"):
        scan_.flags(("verifed",))


def test_tokens_with_the_same_text_are_paired_by_what_they_are() -> None:
    def made(*kinds: str) -> SavedScan:
        facts = {i: TokenFact(token_id=i, text="a", category=kind) for i, kind in enumerate(kinds)}
        return SavedScan(model="m", origin="test", tokens=facts, complete=True, lossy=(), ranked=True)

    a, b = made("unreachable_single", "ok"), made("ok", "unreachable_single", "ok")
    assert _changed(a, b, "moved") == {("a", 0, 1), ("a", 1, 0)} and not _changed(a, b, "category")
    assert _changed(a, b, "only_b") == {("a", -1, 2)}
