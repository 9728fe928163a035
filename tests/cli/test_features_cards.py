from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.features.corpus import SITE, corpus_store
from tests.features.toys import random_sae
from tests.tiny import tiny_model
from workbench.activations.harvest import harvest
from workbench.activations.sources import TextFiles
from workbench.cli import main
from workbench.features.cards.cardmaking import CardOptions, feature_cards
from workbench.features.cards.cardset import CardSet
from workbench.features.scores.score_features import score_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model, sae = tmp_path_factory.mktemp("cards"), tiny_model(), random_sae()
    model.hf.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    sae.save_model(folder / "sae")
    corpus_store(folder / "acts")
    run = folder / "run" / "artifacts" / "features"
    score_features(model, sae, scores=("output",)).save(run)
    return folder


def _words(folder: Path, *more: str) -> list[str]:
    return ["features", "cards", str(folder / "sae"), "--model", str(folder / "model"), "--no-check", *more]


def test_cards_are_made_where_the_page_looks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = _words(folder, "--store", str(folder / "acts"), "--features", "3", "17", "--json")
    assert main([*words, "--table", str(folder / "run")]) == 0
    summary = json.loads(capsys.readouterr().out)
    cards = CardSet.load(folder / "sae" / "cards")
    expected = feature_cards(tiny_model(), random_sae(), corpus_store(folder / "acts"), [3, 17], options=CardOptions())
    assert cards.features == (3, 17) and Path(summary["cards"]) == folder / "sae" / "cards"
    for card, other in zip(cards, expected, strict=True):
        assert card.explanation == other.explanation and card.windows == other.windows
        assert card.scores is not None and set(card.scores) == {"output_score", "output_score_delta"}
    assert "another feature's rule is lower by" in summary["findings"][-1]
    found = [c.explanation.scores["detection"].value for c in cards if c.explanation]
    assert f"balanced accuracy {sum(found) / 2:.3g} [" in summary["findings"][-1]
    assert main(["features", "show", str(folder / "sae"), "--out", str(folder / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["features"] == 2


def test_without_rules_nothing_is_said_of_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = _words(folder, "--store", str(folder / "acts"), "--features", "3", "--no-explain")
    assert main([*words, "--out", str(folder / "plain")]) == 0
    out = capsys.readouterr().out
    assert "rule" not in out.lower() and out.startswith("1 feature, ")
    assert [card.explanation for card in CardSet.load(folder / "plain")] == [None]


def test_a_single_rule_has_the_interval_of_a_share(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = _words(folder, "--store", str(folder / "acts"), "--features", "3", "--json")
    assert main([*words, "--out", str(folder / "single")]) == 0
    line = json.loads(capsys.readouterr().out)["findings"][-1]
    assert line.count("(n = 1 feature)") == 2 and "∞" not in line
    assert line.count("[0.00, 1.00]") == 1 and line.count("[−1.00, 1.00]") == 1


def test_text_that_is_one_document_is_said_to_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "one.txt").write_text(" ".join(f"{i} dogs and {i * i} cats" for i in range(300)))
    harvest(tiny_model(), TextFiles((folder / "one.txt",), tokens=2000, context=16), [SITE], folder / "one")
    words = _words(folder, "--store", str(folder / "one"), "--features", "3", "17")
    assert main([*words, "--out", str(folder / "few")]) == 0
    out = capsys.readouterr().out
    assert "2 features without a rule" in out and "all text is one document" in out


def test_wrong_input_makes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder / "other"
    harvest(tiny_model(), TextFiles((__file__,), tokens=200, context=16), ["mlp_out.0"], other)
    target = ["--out", str(folder / "none")]
    for more, message in (
        (["--store", str(other)], "resid_post.1 is not stored"),
        (["--store", str(folder / "nowhere")], "No activation store"),
        (["--store", str(folder / "acts"), "--features", "99"], "Feature 99 does not exist"),
        (["--store", str(folder / "acts"), "--table", str(folder / "model")], "No feature table"),
    ):
        assert main([*_words(folder, *more), *target]) == 2
        assert message in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_the_command_goes_on_and_tidies_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*_words(folder, "--store", str(folder / "acts"), "--features", "3", "17"), "--out", str(folder / "stop")]
    with monkeypatch.context() as patched:
        patched.setattr(
            "workbench.features.explain.rule_explanations._tested", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert main(words) == 130
    assert list((folder / "stop" / ".rules").rglob("rules-0.json")) and not (folder / "stop" / "cards.parquet").exists()
    monkeypatch.setattr(
        "workbench.features.explain.rule_explanations.fit_rule", lambda *_: pytest.fail("rules were kept")
    )
    assert main(words) == 0
    assert not (folder / "stop" / ".rules").exists() and len(CardSet.load(folder / "stop")) == 2


def test_cards_of_other_features_are_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*_words(folder, "--store", str(folder / "acts"), "--no-explain"), "--out", str(folder / "spared")]
    assert main([*words, "--features", "3", "17"]) == 0
    assert main([*words, "--features", "17", "5"]) == 2
    assert "1 card of features that are not among the 2 asked for" in capsys.readouterr().err
    assert CardSet.load(folder / "spared").features == (3, 17)
    assert main([*words, "--features", "3", "17", "5"]) == 0
    assert CardSet.load(folder / "spared").features == (3, 17, 5)
