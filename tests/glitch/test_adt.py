from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest, fisher_exact
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.glitch.tiny_vocab import byte_level
from workbench.cli import main
from workbench.core.codec import FastCodec, codec_of
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, MissingFileError
from workbench.core.stats import mcnemar
from workbench.glitch.text.adt import AdtItem, AdtOptions, lexicon_of, make_items, read_lexicon
from workbench.glitch.text.adt_run import AdtAnswer, load_items, prompts_of, run_adt, save_items, words_of
from workbench.glitch.text.spans import encode_spans
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.loading import load_tokenizer
from workbench.models.model import Model

ENDS = ("counts", "maps", "dots", "rats", "winds")
STARTS = ("parent", "pixel", "paper", "pond", "pebble")
CJK = ("東京", "京都", "大学", "学生")


@pytest.fixture(autouse=True)
def _no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def _greedy_sp() -> Tokenizer:
    """Byte-level BPE in which "sp" is merged before any word; whole words with and without a space."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("s", "p")]
    vocab["sp"] = len(vocab)
    for word in (*ENDS, *STARTS):
        left = word[0]
        for char in word[1:]:
            if (left, char) not in merges:
                merges.append((left, char))
            left += char
            vocab.setdefault(left, len(vocab))
        merges.append(("Ġ", word))
        vocab[f"Ġ{word}"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _characters() -> Tokenizer:
    """Words of two characters, and 京大 and 都大, which lie across their borders."""
    vocab = {char: i for i, char in enumerate("東京都大学生")}
    for word in ("京大", *CJK):
        vocab[word] = len(vocab)
    merges = [("京", "大"), *((word[0], word[1]) for word in CJK)]
    return Tokenizer(models.BPE(vocab=vocab, merges=merges))


def _made(tokenizer: Tokenizer, **options: int) -> tuple[AdtItem, ...]:
    codec = FastCodec.of(tokenizer)
    return make_items(codec, analyse(codec), options=AdtOptions(**options))


def test_the_lexicon_is_the_whole_words_of_the_vocabulary() -> None:
    assert set(lexicon_of(analyse(FastCodec.of(_greedy_sp())))) == {*ENDS, *STARTS}
    assert set(lexicon_of(analyse(FastCodec.of(_greedy_sp())), AdtOptions(longest=4))) == {
        "maps",
        "dots",
        "rats",
        "pond",
    }


def test_an_attack_is_a_pair_whose_border_really_lies_inside_a_token() -> None:
    tokenizer = _greedy_sp()
    codec = FastCodec.of(tokenizer)
    items = _made(tokenizer, items=20, per_trap=20)
    attacks = [item for item in items if item.arm == "attack"]
    assert len(attacks) >= 10 and len({(i.first, i.second) for i in attacks}) == len(attacks)
    for item in items:
        ((ids, places),) = encode_spans(codec, [item.text])
        crossing = [i for i, (a, b) in zip(ids, places, strict=True) if a < item.border < b]
        assert item.text[item.border :].startswith(item.second) and item.text[: item.border].endswith(item.first)
        assert bool(crossing) == (item.arm == "attack")
        assert (item.trap, [item.trap_id]) == (("sp", crossing) if crossing else ("", [-1]))
        assert "".join(item.tokens) == item.text and " " not in item.text
        assert (
            item.separated.replace({"hashtag": "-", "domain": "-", "identifier": "_"}[item.carrier], "", 1) == item.text
        )
    assert {(i.first[-1], i.second[0]) for i in attacks} == {("s", "p")}
    plain = [item for item in items if item.arm == "plain"]
    assert len(plain) == len(attacks) and [i.carrier for i in plain] == [i.carrier for i in attacks]


def test_scripts_without_spaces_are_taken_as_they_are() -> None:
    items = _made(_characters(), items=5)
    attack = next(item for item in items if item.arm == "attack")
    assert (attack.first, attack.second, attack.text, attack.trap) == ("東京", "大学", "東京大学", "京大")
    assert (attack.carrier, attack.separated) == ("text", "東京|大学")


def test_the_same_seed_gives_the_same_items_and_limits_hold() -> None:
    assert _made(_greedy_sp(), items=6) == _made(_greedy_sp(), items=6)
    assert _made(_greedy_sp(), items=6, per_trap=9, seed=1) != _made(_greedy_sp(), items=6, per_trap=9, seed=2)
    assert sum(item.arm == "attack" for item in _made(_greedy_sp(), items=3, per_trap=9)) == 3
    codec = FastCodec.of(byte_level())
    with pytest.raises(DegenerateInputError, match="hides its border"):
        make_items(codec, analyse(codec), ("alpha", "bravo"))
    with pytest.raises(InvalidInputError, match="at least 1"):
        AdtOptions(items=0)


def test_a_lexicon_file_is_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("counts\n parent \nnot a word\nx1\ncounts\n", encoding="utf-8")
    assert read_lexicon(tmp_path / "w.txt") == ("counts", "parent")
    codec = FastCodec.of(_greedy_sp())
    (item, *_) = make_items(codec, analyse(codec), read_lexicon(tmp_path / "w.txt"))
    assert (item.first, item.second, item.cuts) == (
        "counts",
        "parent",
        ("count", "countsp", "countspa", "countspar", "countspare", "countsparen"),
    )
    with pytest.raises(MissingFileError):
        read_lexicon(tmp_path / "absent")


def test_items_survive_their_file(tmp_path: Path) -> None:
    items = _made(_greedy_sp(), items=4)
    assert load_items(save_items(tmp_path / "i.jsonl", items)) == items


@dataclass
class Written:
    texts: tuple[str, ...]


@dataclass
class Reader(Model):
    """Answers separated words rightly and joined ones along the tokens of the item."""

    dtype = torch.float32
    fingerprint = property(lambda self: self.name)

    items: tuple[AdtItem, ...]
    name: str = "reader"
    asked: list[str] = field(default_factory=list)
    stop_after: int = 10**9

    def generate(self, prompts: list[str], new_tokens: int, *, temperature: float, stop: tuple[str, ...]) -> Written:
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += prompts
        return Written(tuple(map(self._answer, prompts)))

    def _answer(self, prompt: str) -> str:
        shown = prompt.rsplit("\n", 1)[1].removesuffix(" ->")
        item = next(i for i in self.items if shown in (i.text, i.separated))
        right = f" {item.first.upper()} {item.second}.\nmore"
        if shown == item.separated or item.arm == "plain":
            return right
        cut = item.cuts[0]
        return f" {cut} {(item.first + item.second)[len(cut) :]}\n"


def test_the_drop_is_control_minus_attack_with_its_exact_test() -> None:
    items = _made(_greedy_sp(), items=12, per_trap=12)
    n = sum(item.arm == "attack" for item in items)
    report = run_adt(Reader(items), items, batch_size=5)
    assert (report.accuracy("attack").value, report.accuracy("attack", True).value) == (0.0, 1.0)
    assert report.drop("attack").value == 1.0 and report.p_value("attack") == pytest.approx(2 * 0.5**n)
    assert (report.accuracy("plain").value, report.p_value("plain")) == (1.0, 1.0)
    assert len(report.arm("attack")) == n and len(report.arm("plain")) == n - 4, "four are worked examples"
    share = report.errors_along_tokens("attack")
    assert share is not None and share.value == 1.0 and report.errors_along_tokens("plain") is None
    table = [[0, n], [n - 4, 0]]
    assert report.hidden_border_p() == report.metrics()["hidden_border_p"] == pytest.approx(fisher_exact(table).pvalue)
    assert "WEAK TASK" not in " ".join(report.findings())
    json.dumps(report.to_json())
    assert "sp" in report._repr_html_()


def test_prompts_show_both_forms_and_never_the_answer() -> None:
    items = _made(_greedy_sp(), items=4, per_trap=4)
    attack = items[0]
    joined, separated = prompts_of([attack], [item for item in items if item.arm == "plain"][:2])
    assert joined.endswith(f"{attack.text} ->") and separated.endswith(f"{attack.separated} ->")
    assert joined.rpartition("\n")[0] == separated.rpartition("\n")[0]
    assert f"{attack.first} {attack.second}" not in joined


def test_a_stopped_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    items = _made(_greedy_sp(), items=8, per_trap=8)
    whole = run_adt(Reader(items), items, batch_size=4)
    journal = tmp_path / "answers.jsonl"
    first = Reader(items, stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        run_adt(first, items, batch_size=4, journal=journal)
    with journal.open("a") as file:
        file.write('{"prompt": 9, "ans')
    second = Reader(items)
    assert run_adt(second, items, batch_size=4, journal=journal).answers == whole.answers
    assert len(first.asked) == 8 and not set(first.asked) & set(second.asked)
    other = Reader(items)
    other.name = "another model"
    with pytest.raises(MismatchError, match="another model"):
        run_adt(other, items, journal=journal)
    with pytest.raises(MismatchError, match="prompts"):
        run_adt(second, items[:-1], journal=journal)
    with pytest.raises(DegenerateInputError, match="is an attack"):
        run_adt(second, [item for item in items if item.arm == "plain"])


def test_a_wrong_answer_is_along_the_tokens_only_if_it_cuts_where_a_token_ends() -> None:
    item = AdtItem(
        arm="attack", carrier="hashtag", first="counts", second="parent", text="#countsparent",
        separated="#counts-parent", tokens=("#", "count", "sp", "arent"), trap="sp", trap_id=1, border=7,
    )  # fmt: skip
    assert item.cuts == ("count", "countsp")
    assert AdtAnswer(item, "count sparent", "").along_tokens
    assert not AdtAnswer(item, "counts parent", "").along_tokens
    assert not AdtAnswer(item, "cou ntsparent", "").along_tokens
    assert words_of("") == []


@pytest.mark.parametrize(("b", "c"), [(0, 1), (3, 9), (10, 10), (40, 12)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(binomtest(min(b, c), b + c).pvalue)
    assert mcnemar(0, 0) == 1.0


def test_the_command_makes_items_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "m"
    PreTrainedTokenizerFast(tokenizer_object=_greedy_sp()).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    words = ["glitch", "adt", str(folder), "--make-only", "--items", "3", "--out", str(tmp_path / "runs"), "--json"]
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(load_items(shown["items"])) == shown["n"] and (Path(shown["run"]) / "DONE").is_file()


@pytest.mark.embedded
def test_the_embedded_tokenizer_hides_known_borders() -> None:
    codec = codec_of(load_tokenizer("embedded"))
    vocabulary = analyse(codec)
    found = make_items(codec, vocabulary, ("counts", "parent", "genome", "dent"), AdtOptions(items=40, per_trap=20))
    pairs = {(item.first, item.second): item for item in found if item.arm == "attack"}
    assert "sp" in pairs["counts", "parent"].tokens
