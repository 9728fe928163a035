from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.glitch.tiny_more import scan_with
from tests.glitch.tiny_vocab import SPECIAL, byte_level
from tests.tiny import tiny_hf
from workbench.cli import main
from workbench.core.errors import DegenerateInputError, InvalidInputError, UnknownNameError
from workbench.glitch.scanning.saved import SavedScan, TokenFact
from workbench.glitch.text.banlist import FORMATS, ban_list

GRADES = {"ember": "verified", "delta": "borderline", "alpha": "candidate", "z": "verified", SPECIAL: "verified"}


def _ids(*raws: str) -> tuple[int, ...]:
    _, codec = scan_with(byte_level(), {})
    return tuple(codec.raw.index(raw) for raw in raws)


def _fact(i: int, text: str, indicator: float, max_prob: float, verdict: str) -> TokenFact:
    return TokenFact(
        token_id=i, text=text, category="ok", indicator=indicator, max_prob=max_prob, verdict=verdict, candidate=True
    )


def _scan_of(facts: dict[int, TokenFact]) -> SavedScan:
    return SavedScan(model="many", origin="test", tokens=facts, complete=True, lossy=(), ranked=True)


def _many(n: int) -> SavedScan:
    facts = {i: _fact(i, f"t{i}", i / n, i / n / 200, "weak_verified") for i in range(n)}
    return _scan_of(facts)


def test_only_tested_ordinary_tokens_are_banned_unless_asked() -> None:
    scan, _ = scan_with(byte_level(), GRADES)
    bans = ban_list(scan)
    assert bans.ids == _ids("ember")
    assert bans.left_out["special tokens"] == _ids(SPECIAL)
    assert bans.left_out["single bytes and incomplete characters"] == _ids("z")
    assert set(ban_list(scan, include_special=True, include_bytes=True).ids) == set(_ids("ember", "z", SPECIAL))
    every = ban_list(scan, ("candidate", "borderline", "verified"))
    assert every.ids == _ids("ember", "delta", "alpha"), "the best founded first"
    assert ban_list(scan, ("candidate", "borderline", "verified"), top=2, keep=_ids("ember")).ids == _ids(
        "delta", "alpha"
    )
    with pytest.raises(DegenerateInputError, match="Nothing to ban"):
        ban_list(scan_with(byte_level(), {})[0])
    with pytest.raises(InvalidInputError, match="top"):
        ban_list(scan, top=0)


def test_each_format_is_what_its_engine_takes() -> None:
    bans = ban_list(_many(3))
    assert bans.payload("transformers") == {"bad_words_ids": [[0], [1], [2]]}
    assert bans.payload("vllm") == bans.payload("openai") == {"logit_bias": {"0": -100, "1": -100, "2": -100}}
    assert bans.payload("llamacpp") == {"logit_bias": [[0, False], [1, False], [2, False]]}
    assert bans.payload("llamacpp-cli") == "--logit-bias 0-inf --logit-bias 1-inf --logit-bias 2-inf\n"
    with pytest.raises(UnknownNameError, match="Did you mean vllm"):
        bans.payload("vlm")


@pytest.mark.parametrize(("form", "limit"), [("vllm", 1024), ("openai", 300)])
def test_more_than_an_engine_takes_is_refused(form: str, limit: int) -> None:
    assert len(ban_list(_many(limit)).payload(form)["logit_bias"]) == limit  # type: ignore[index]
    with pytest.raises(InvalidInputError, match=f"at most {limit} in a request"):
        ban_list(_many(limit + 1)).payload(form)
    assert len(ban_list(_many(limit + 1), top=limit).payload(form)["logit_bias"]) == limit  # type: ignore[index]
    assert ban_list(_many(limit + 1)).payload("llamacpp")


def test_ids_beyond_the_matrix_and_of_unknown_kind_are_never_sent() -> None:
    scan = _many(4)
    facts = dict(scan.tokens)
    facts[1] = replace(facts[1], category="no_row")
    facts[2] = TokenFact(token_id=2, text="", category="", reference=True)
    bans = ban_list(replace(scan, tokens=facts), ("verified", "reference"))
    assert bans.ids == (0, 3)
    assert {why: ids for why, ids in bans.left_out.items() if ids} == {
        "ids beyond the matrix": (1,), "of a kind that glitch.json alone does not tell": (2,),
    }  # fmt: skip


def test_generate_with_the_list_never_writes_a_banned_id() -> None:
    hf = tiny_hf("llama")
    hf.generation_config.pad_token_id = 0
    inputs = torch.arange(2, 10)[None]
    seed = {"do_sample": True, "max_new_tokens": 24, "num_return_sequences": 6}
    torch.manual_seed(0)
    free = hf.generate(inputs, **seed)[:, inputs.shape[1] :]
    common = [i for i in torch.bincount(free.flatten()).argsort(descending=True).tolist() if i > 1][:100]
    facts = {i: _fact(i, str(i), 0.1, 0.0, "strong_verified") for i in common}
    payload = ban_list(_scan_of(facts)).payload("transformers")
    assert isinstance(payload, dict)
    torch.manual_seed(0)
    banned = hf.generate(inputs, **seed, **payload)[:, inputs.shape[1] :]
    assert set(free.flatten().tolist()) & set(common)
    assert not set(banned.flatten().tolist()) & set(common)


def test_the_command_writes_the_list_and_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "token_id": 7,
        "token": "\x1b[2Jx",
        "category": "ok",
        "indicator": 0.1,
        "max_prob": 0.001,
        "verdict": "weak_verified",
    }
    facts = {"model": "m", "indicator": "I_cos", "tokenizer": {"lossy": []}, "candidates": [row | {"is_reference": False}],
             "reference": {"members": [3]}, "verification": None}  # fmt: skip
    (tmp_path / "glitch.json").write_text(json.dumps(facts))
    out = tmp_path / "ban.json"
    assert main(["glitch", "export", str(tmp_path), "--format", "vllm", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 ids of m are banned" in said and "\x1b" not in said
    assert json.loads(out.read_text()) == {"logit_bias": {"7": -100}}
    contents = json.loads((tmp_path / "ban.json.contents.json").read_text())
    assert contents["grades"] == {"verified": 1} and contents["tokens"][0]["text"] == "\\x1b[2Jx"
    assert contents["exact"] is FORMATS["vllm"].exact is False
    assert main(["glitch", "export", str(tmp_path), "--grades", "borderline"]) == 2
