from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.glitch.tiny_more import HOSTILE, unigram, wordpiece
from tests.glitch.tiny_vocab import EMBED, WORDS, byte_level, folder, matrix, sentencepiece
from tests.tiny import tiny_model
from workbench.cli import main
from workbench.core.codec import FastCodec
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, MissingFileError
from workbench.glitch.text.sanitize import Sanitizer, copy_check, sanitize_files
from workbench.glitch.verification.prompts import Template, TokenPrompt
from workbench.models.model import Model


@pytest.fixture(autouse=True)
def _no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def _sanitizer(tokenizer: Tokenizer, *raws: str) -> Sanitizer:
    codec = FastCodec.of(tokenizer)
    return Sanitizer.of(codec, [codec.raw.index(raw) for raw in raws])


@pytest.mark.parametrize(("make", "raws"), [
    (byte_level, ("Ġember", "ember", "delta", "Ġalpha")),
    (sentencepiece, ("▁ember", "ember", "delta", "▁alpha")),
    (unigram, ("▁ember", "ember", "delta", "▁delta", "▁alpha")),
    (wordpiece, ("ember", "delta", "alpha")),
])  # fmt: skip
def test_flagged_tokens_go_and_the_text_stays_exactly(make: object, raws: tuple[str, ...]) -> None:
    sanitizer = _sanitizer(make(), *raws)  # type: ignore[operator]
    rng = np.random.default_rng(0)
    words = [*WORDS, "ember", "delta", "alpha", "é", "中", ",", "  ", "\n"]
    texts = [" ".join(rng.choice(words, 12)) + HOSTILE[k % len(HOSTILE)] for k in range(40)]
    texts += ["ember", " ember", "emberember", "delta\x00ember"]
    cut = 0
    for text, ids in zip(texts, sanitizer.codec.encode(texts), strict=True):
        made = sanitizer(ids)
        assert sanitizer.codec.decode([made.ids]) == sanitizer.codec.decode([ids]), text
        assert not made.impossible and not sanitizer.flagged & set(made.ids), text
        assert [at for at, _, _ in made.replaced] == [at for at, i in enumerate(ids) if i in sanitizer.flagged]
        cut += len(made.replaced)
        assert made.ids == tuple(
            itertools.chain(*(dict((a, p) for a, _, p in made.replaced).get(at, (i,)) for at, i in enumerate(ids)))
        )
    assert cut > 40


def test_the_alternative_is_the_shortest_that_there_is() -> None:
    codec = FastCodec.of(byte_level())
    flagged = codec.raw.index("Ġember")
    # " " + "ember" are two pieces; with "ember" flagged too: " " "embe" "r"
    assert [codec.raw[i] for i in _sanitizer(byte_level(), "Ġember").alternatives(flagged)[0]] == ["Ġ", "ember"]
    assert [codec.raw[i] for i in _sanitizer(byte_level(), "Ġember", "ember").alternatives(flagged)[0]] == [
        "Ġ",
        "embe",
        "r",
    ]
    options = _sanitizer(byte_level(), "Ġember").alternatives(flagged)
    assert [len(option) for option in options] == sorted(len(option) for option in options) and len(
        set(options)
    ) == len(options)


def test_ordinary_tokens_come_before_bytes() -> None:
    codec = FastCodec.of(sentencepiece())
    made = _sanitizer(sentencepiece(), "ember", "embe", "emb").alternatives(codec.raw.index("ember"))[0]
    assert [codec.raw[i] for i in made] == ["em", "b", "e", "r"]


def test_what_no_other_tokens_write_is_left_and_named() -> None:
    sanitizer = _sanitizer(byte_level(), "z", "Ġember")
    (ids,) = sanitizer.codec.encode(["z ember"])
    made = sanitizer(ids)
    assert made.impossible == (0,) and made.ids[0] == ids[0] and len(made.replaced) == 1
    with pytest.raises(InvalidInputError, match="not in the vocabulary"):
        sanitizer([10**6])


def test_a_segmentation_that_reads_differently_in_its_place_is_not_used() -> None:
    tokenizer = wordpiece()
    sanitizer = _sanitizer(tokenizer, "alpha")
    codec = sanitizer.codec
    (ids,) = codec.encode(["bravo alpha"])
    made = sanitizer(ids)
    # "alph" "a" would read "alph a"
    assert [codec.raw[i] for i in made.ids] == ["bravo", "alph", "##a"]


def test_files_become_ids_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    sanitizer = _sanitizer(byte_level(), "Ġember")
    texts = ["alpha ember", "\ud800 ember ember", "delta"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "b.txt").write_text("x ember\n" * 50)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    report = sanitize_files(sanitizer, paths, tmp_path / "ids.jsonl")
    whole = (tmp_path / "ids.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(row["document"], len(row["replaced"])) for row in rows] == [(1, 1), (2, 2), (3, 0), (1, 50)]
    assert sanitizer.codec.decode([row["ids"] for row in rows]) == [
        "alpha ember",
        "� ember ember",
        "delta",
        "x ember\n" * 50,
    ]
    assert (report.cuts[0].replaced, report.cuts[0].pieces, report.documents) == (53, (" ", "ember"), 4)
    assert report.tokens_after - report.tokens == 53
    assert [row["decodes_to"] for row in rows] == ["text", "other", "text", "text"]  # half a character becomes �
    assert (report.changed, report.by_cuts) == (1, 0) and report.first_changed.endswith("a.jsonl document 2")
    (tmp_path / "ids.jsonl").write_bytes(whole[: len(whole) // 2])
    again = sanitize_files(sanitizer, paths, tmp_path / "ids.jsonl")
    assert (tmp_path / "ids.jsonl").read_bytes() == whole and again.cuts == report.cuts
    with pytest.raises(MismatchError, match="tokenizer: file"):
        sanitize_files(_sanitizer(wordpiece(), "alpha"), paths, tmp_path / "ids.jsonl")
    with pytest.raises(MismatchError, match="flagged: file"):
        sanitize_files(_sanitizer(byte_level(), "ember"), paths, tmp_path / "ids.jsonl")
    with pytest.raises(MismatchError, match="files: file"):
        sanitize_files(sanitizer, paths[:1], tmp_path / "ids.jsonl")
    paths[1].write_text("y ember\n" * 50)
    with pytest.raises(MismatchError, match="files: file"):
        sanitize_files(sanitizer, paths, tmp_path / "ids.jsonl")
    (tmp_path / "foreign.jsonl").write_text("{}\n")
    with pytest.raises(MismatchError, match="nothing"):
        sanitize_files(sanitizer, paths, tmp_path / "foreign.jsonl")
    with pytest.raises(MissingFileError):
        sanitize_files(sanitizer, [tmp_path / "absent"], tmp_path / "other.jsonl")


@pytest.mark.parametrize(("make", "content", "changed"), [
    (byte_level, b"alpha ember\r\n  delta\t", 0),
    (byte_level, "caf\xe9 ember".encode("latin-1"), 1),
    (wordpiece, b"Alpha ember", 1),
    (sentencepiece, b"alpha ember", 0),
])  # fmt: skip
def test_each_document_is_decoded_and_held_against_its_file(
    make: object, content: bytes, changed: int, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    report = sanitize_files(_sanitizer(make(), "delta"), [tmp_path / "t.txt"], tmp_path / "ids.jsonl")  # type: ignore[operator]
    said = " ".join(report.findings())
    assert report.changed == changed and report.by_cuts == 0
    assert ("every document decodes to the text of its file" in said) == (not changed)
    assert ("t.txt document 1. 1 of them do not without the cuts either" in said) == bool(changed)


def test_a_batch_is_ready_for_generation() -> None:
    model = tiny_model()
    sanitizer = Sanitizer.of(FastCodec.of(model.tokenizer.backend_tokenizer), [])
    batch = sanitizer.batch(model, ["ab", "abcd"])
    plain = model.tokens(["ab", "abcd"])
    assert batch.ids.tolist() == plain.ids.tolist() and batch.mask.tolist() == plain.mask.tolist()
    assert model.generate(batch, 2, temperature=0.0).texts == model.generate(["ab", "abcd"], 2, temperature=0.0).texts


def test_the_command_writes_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level()
    unused = [tokenizer.token_to_id(f"<unused{k}>") for k in range(6)]
    rows = matrix(tokenizer.get_vocab_size(), [*unused, tokenizer.token_to_id("ember")])
    model = folder(tmp_path / "m", tokenizer, {EMBED: rows})
    (tmp_path / "t.txt").write_text("ember bravo")
    runs = str(tmp_path / "runs")
    assert main(["glitch", "sanitize", str(tmp_path / "t.txt"), "--model", str(model), "--out", runs, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    row = json.loads(Path(shown["file"]).read_text())
    assert FastCodec.of(tokenizer).decode([row["ids"]]) == ["ember bravo"] and len(row["replaced"]) == 1
    assert (
        main(["glitch", "sanitize", str(tmp_path / "t.txt"), "--model", str(model), "--out", runs, "--grades", "no"])
        == 2
    )


def test_spliced_prompts_hold_every_piece_in_every_place() -> None:
    import torch

    made = Template(TokenPrompt("p", "", "{token}", "{token}"), torch.tensor([5, 9, 6, 9]), torch.tensor([1, 3]))
    assert made.spelled((7, 8)) == [5, 7, 8, 6, 7, 8]


@pytest.mark.slow
@pytest.mark.embedded
def test_cutting_a_token_that_cannot_be_said_helps_the_model_to_copy_it(embedded: Model) -> None:
    codec = FastCodec.of(embedded.tokenizer.backend_tokenizer)
    glitch = [36743, 45175, 48047]
    short = TokenPrompt("copy", "What goes in comes out unchanged.", "\nIn: «{token}»\nOut:", " «{token}»", shots=2)
    check = copy_check(embedded, Sanitizer.of(codec, glitch), glitch, [7101, 9214], prompt=short)
    assert check.gain.low > 1 and check.control_gain is not None
    assert all(codec.decode([c.pieces]) == codec.decode([[c.token_id]]) for c in check.tokens)
    with pytest.raises(DegenerateInputError, match="another segmentation"):
        copy_check(embedded, Sanitizer.of(codec, glitch), [codec.raw.index("z")])
