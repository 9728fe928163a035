from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from tests.glitch.tiny_copy import PLANTED as TINY_PLANTED
from tests.glitch.tiny_copy import wordy_model
from tests.glitch.tiny_vocab import EMBED, HEAD, WORDS, byte_level, folder, matrix, sentencepiece
from tests.tiny import tiny_model
from workbench.core.codec import codec_of
from workbench.core.errors import (
    DegenerateInputError,
    InvalidInputError,
    MismatchError,
    MissingFileError,
    ModelUnavailableError,
    UnknownNameError,
)
from workbench.glitch import GlitchReport, ScanOptions, VerifyOptions, scan
from workbench.glitch.reporting import cell_text, shown
from workbench.glitch.verification.prompts import PromptSet, Template, TokenPrompt, prompt_set, prompts_from
from workbench.glitch.verification.verify import verify
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.model import Model
from workbench.report.base import Report, Table

TOKENIZER = byte_level()
N = TOKENIZER.get_vocab_size()
AT = TOKENIZER.token_to_id
RESERVED = [AT(f"<unused{k}>") for k in range(6)]
PADDING = list(range(N, N + 5))
PLANTED = [AT("ember"), AT("Ġharbor"), AT("z")]
IMPOSSIBLE = [i for i in range(N) if TOKENIZER.id_to_token(i) in "ÀÁõö÷øùúûüýþÿ"]
UNUSED = [*RESERVED, *PADDING, *IMPOSSIBLE, *PLANTED]
ALL = ScanOptions(percentile=3.0)


def _tied(path: Path, rows: torch.Tensor) -> Path:
    return folder(path, TOKENIZER, {EMBED: rows})


def _indicator(report: GlitchReport, i: int) -> float:
    return float(report.table.indicator[i])


def test_planted_tokens_head_the_list_and_nothing_else_is_a_candidate_before_them(tmp_path: Path) -> None:
    report = scan(_tied(tmp_path, matrix(N + 5, UNUSED)), options=ALL)
    assert isinstance(report, Report) and report.tied and report.indicator == "I_cos"
    assert set(report.candidates()[:3]) == set(PLANTED)
    never = {*RESERVED, *PADDING, *IMPOSSIBLE, 0}
    assert not never & set(report.candidates())
    plain = report.table.indicator[report.table.ordinary]
    assert report.threshold == pytest.approx(np.percentile(plain, 3.0))
    assert len(report.candidates()) == int((plain <= report.threshold).sum())


def test_the_table_names_every_id_with_its_group(tmp_path: Path) -> None:
    report = scan(_tied(tmp_path, matrix(N + 5, UNUSED)), options=ALL)
    df = report.frame()
    assert len(df) == N + 5 and sorted(df.token_id) == list(range(N + 5))
    wanted = {"token_id", "token", "category", "indicator", "max_prob", "verdict", "is_reference", "group"}
    assert wanted <= set(df.columns)
    by_id = df.set_index("token_id")
    assert set(by_id.loc[PADDING].category) == {"no_token"} and set(by_id.loc[PADDING].group) == {"padding rows"}
    assert by_id.is_reference.sum() == len(report.reference.members)
    assert set(df.verdict) == {"untested"} and df.max_prob.isna().all()
    assert df.indicator.is_monotonic_increasing


def test_without_anything_unused_there_is_no_ranking(tmp_path: Path) -> None:
    report = scan(_tied(tmp_path, matrix(N + 5, [])))
    assert report.indicator is None and report.candidates() == [] and report.reference.name is None
    assert np.isnan(report.table.indicator).all()
    assert any(finding.startswith("NO RANKING") for finding in report.findings())
    with pytest.raises(DegenerateInputError, match="nothing to test"):
        scan(tmp_path, "top")


def test_a_single_given_id_is_used_but_called_unconfirmed(tmp_path: Path) -> None:
    report = scan(_tied(tmp_path, matrix(N + 5, UNUSED)), options=ScanOptions(reference=(RESERVED[0],)))
    assert report.indicator == "I_cos" and "NOT CONFIRMED" in report.indicator_why
    assert report.reference.members == (RESERVED[0],)


def test_tied_never_ranks_by_the_input_norm(tmp_path: Path) -> None:
    rows = matrix(N + 5, UNUSED)
    rows[UNUSED] *= 1e-3
    path = _tied(tmp_path, rows)
    assert scan(path).indicator == "I_cos"
    with pytest.raises(UnknownNameError, match="tied models have no I_in"):
        scan(path, options=ScanOptions(indicator="I_in"))


def test_untied_with_decayed_input_rows_ranks_by_their_norm(tmp_path: Path) -> None:
    E = matrix(N + 5, [])
    E[UNUSED] *= 0.01
    report = scan(folder(tmp_path, TOKENIZER, {EMBED: E, HEAD: matrix(N + 5, UNUSED, seed=1)}, tied=False), options=ALL)
    assert report.indicator == "I_in" and set(report.candidates()[:3]) == set(PLANTED)


def test_untied_without_decay_switches_to_the_output_side(tmp_path: Path) -> None:
    tensors = {EMBED: matrix(N + 5, []), HEAD: matrix(N + 5, UNUSED, seed=1)}
    report = scan(folder(tmp_path, TOKENIZER, tensors, tied=False), options=ALL)
    assert report.indicator == "I_cos" and set(report.candidates()[:3]) == set(PLANTED)
    assert {s.indicator for s in report.separations} == {"I_in", "I_cos", "I_centred", "I_l2"}
    assert next(s.auc for s in report.separations if s.indicator == "I_in") < 0.9


def test_untied_with_an_unusable_output_side_still_has_the_input_norm(tmp_path: Path) -> None:
    E = matrix(N + 5, [])
    E[UNUSED] *= 0.01
    report = scan(folder(tmp_path, TOKENIZER, {EMBED: E, HEAD: matrix(N + 5, [], seed=1)}, tied=False), options=ALL)
    assert report.reference.name is None and report.indicator == "I_in"
    assert set(report.candidates()[:3]) == set(PLANTED)


def test_tokens_with_the_same_text_are_named(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    n, a = tokenizer.get_vocab_size(), tokenizer.token_to_id("a")
    report = scan(folder(tmp_path, tokenizer, {EMBED: matrix(n + 8, list(range(n, n + 8)))}))
    assert (a, tokenizer.token_to_id("<0x61>")) in {tuple(sorted(ids, reverse=True)) for ids in report.same_text}
    assert any("54 tokens share their text with another one, in 27 sets" in said for said in report.findings())
    table = next(block for block in report.section().blocks if "same text" in getattr(block, "caption", ""))
    assert isinstance(table, Table) and len(table.rows) == 27


def test_reserved_ids_that_were_never_trained_are_spare(tmp_path: Path) -> None:
    used = RESERVED[2]
    report = scan(_tied(tmp_path / "a", matrix(N + 5, [i for i in UNUSED if i != used])), options=ALL)
    assert report.spare() == [i for i in RESERVED if i != used] == report.to_json()["spare"]
    assert any(said.startswith("5 reserved ids are unused") for said in report.findings())
    cut = scan(_tied(tmp_path / "b", matrix(N - 3, [i for i in UNUSED if i < N - 3])), options=ALL)
    assert cut.spare() == [i for i in RESERVED if i < N - 3]
    assert scan(_tied(tmp_path / "c", matrix(N + 5, []))).spare() == []


def test_ids_beyond_the_matrix_have_no_row(tmp_path: Path) -> None:
    report = scan(_tied(tmp_path, matrix(N + 5, UNUSED)[: N - 3]))
    assert len(report.table) == N and report.table.category[N - 3 :] == ("no_row",) * 3
    assert np.isnan(report.table.indicator[N - 3 :]).all()
    assert any("3 token ids lie beyond" in finding for finding in report.findings())
    assert report.tokenizer.counts["no_row"] == 3
    assert sum(report.tokenizer.counts.values()) == len(report.table)


def test_zero_rows_head_the_candidates_and_bad_rows_are_left_out(tmp_path: Path) -> None:
    rows = matrix(N + 5, UNUSED)
    zero, bad = AT("delta"), AT("forest")
    rows[zero], rows[bad, 2] = 0.0, float("nan")
    report = scan(_tied(tmp_path, rows), options=ALL)
    assert report.zero_rows == (zero,) and report.bad_rows == (bad,)
    assert report.candidates()[0] == zero and bad not in report.candidates()
    assert any(said.startswith("1 rows of ordinary tokens are zero") for said in report.findings())
    assert set(report.candidates()[1:4]) == set(PLANTED)
    json.dumps(report.to_json(), allow_nan=False)


def test_zero_rows_of_padding_are_not_called_candidates(tmp_path: Path) -> None:
    rows = matrix(N + 5, UNUSED)
    rows[PADDING] = 0.0
    said = [finding for finding in scan(_tied(tmp_path, rows)).findings() if " zero " in finding]
    assert len(said) == 1 and said[0].startswith("5 rows without an ordinary token are zero")


def test_controls_without_a_number_are_left_out_and_said() -> None:
    model = wordy_model("neox")
    ordinary = [AT(word) for word in WORDS if AT(word) not in TINY_PLANTED]
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[ordinary[:4]] = float("nan")
    said = " ".join(scan(model, "top", options=ScanOptions(top=4, controls=N, sides=False)).findings())
    assert "random ordinary tokens fail the same test" in said and " 4 more controls give no number" in said
    assert "Testing stopped" not in said
    with torch.no_grad():
        model.hf.get_output_embeddings().weight[-1] = float("nan")
    with pytest.raises(DegenerateInputError, match="output matrix is not finite"):
        scan(model, "top", options=ScanOptions(top=4, controls=4, sides=False))


def test_identical_rows_certify_a_bound_unless_their_bias_differs(tmp_path: Path) -> None:
    rows = matrix(N + 5, UNUSED)
    same = [AT("alpha"), AT("bravo"), AT("candle"), AT("delta")]
    rows[same] = rows[same[0]].clone()
    bias = torch.zeros(N + 5)
    bias[same[3]] = 0.5
    made = folder(tmp_path, TOKENIZER, {EMBED: rows, HEAD: rows + 0.0, "lm_head.bias": bias}, tied=True)
    by_id = scan(made).frame().set_index("token_id")
    assert by_id.loc[same[:3], "p_bound"].tolist() == [1 / 3] * 3
    assert np.isnan(by_id.loc[same[3], "p_bound"]) and by_id.loc[same[3], "copies"] == 1


def test_the_bound_holds_for_a_real_model() -> None:
    model = tiny_model("llama")
    same = [10, 20, 30]
    with torch.no_grad():
        weight = model.hf.get_output_embeddings().weight
        kept = weight[same].clone()
        weight[same] = weight[10].clone()
        rows = torch.randint(0, model.d_vocab, (20, 5), generator=torch.Generator().manual_seed(0))
        p = model.hf(input_ids=rows).logits.softmax(-1)[..., same]
        weight[same] = kept
    assert torch.equal(p[..., 0], p[..., 1]) and float(p.max()) <= 1 / 3


def test_permuting_ids_permutes_the_result(tmp_path: Path) -> None:
    rows = matrix(N, [*RESERVED, *IMPOSSIBLE, *PLANTED])
    first = scan(_tied(tmp_path / "a", rows))
    settings = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    order = np.random.default_rng(0).permutation(N)  # new id of each old id
    vocab = settings["model"]["vocab"]
    settings["model"]["vocab"] = {token: int(order[i]) for token, i in vocab.items()}
    for added in settings["added_tokens"]:
        added["id"] = int(order[added["id"]])
    settings["added_tokens"].sort(key=lambda added: added["id"])
    moved = torch.empty_like(rows)
    moved[torch.from_numpy(order)] = rows
    second_folder = _tied(tmp_path / "b", moved)
    (second_folder / "tokenizer.json").write_text(json.dumps(settings))
    second = scan(second_folder)
    assert second.reference.name == first.reference.name
    assert np.allclose(second.table.indicator[order], first.table.indicator, atol=1e-6)
    assert set(second.candidates()) == {int(order[i]) for i in first.candidates()}


def test_block_size_does_not_change_the_result(tmp_path: Path) -> None:
    path = _tied(tmp_path, matrix(N + 5, UNUSED))
    one, two = scan(path, options=ScanOptions(block_rows=13)), scan(path)
    assert one.candidates() == two.candidates()
    assert np.allclose(one.table.indicator, two.table.indicator, atol=1e-6)


def test_it_says_what_it_does_not_know_and_shows_itself(tmp_path: Path) -> None:
    report = scan(_tied(tmp_path / "m", matrix(N + 5, UNUSED)), options=ALL)
    assert any("Recall is not known" in finding for finding in report.findings())
    section = report.section()
    assert section.metrics["n_candidates"] == len(report.candidates())
    assert {"Table", "Histogram"} <= {type(block).__name__ for block in section.blocks}
    assert "ember" in report._repr_html_()
    written = report.to_csv(tmp_path / "tokens.csv").read_text().splitlines()
    assert len(written) == N + 6
    shown = json.dumps(report.to_json(), allow_nan=False)
    assert '"candidates"' in shown and '"table"' not in shown


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="verify='all' does not exist"):
        scan(tmp_path, "all")  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(MissingFileError, match="not a model folder"):
        scan(tmp_path / "absent")
    with pytest.raises(ModelUnavailableError, match="local Hugging Face cache"):
        scan("nobody/has-this-model")
    with pytest.raises(InvalidInputError, match="give a Model"):
        scan(3)
    with pytest.raises(UnknownNameError, match="I_cos"):
        ScanOptions(indicator="I_cosine")
    for options in ({"top": 0}, {"percentile": 0.0}, {"controls": -1}):
        with pytest.raises(InvalidInputError):
            ScanOptions(**options)


def test_a_loaded_model_is_tested_beside_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    report = scan(model, options=ScanOptions(reference=(5, 6, 7), percentile=10.0))
    assert report.verification is None and report.model == model.name
    options = ScanOptions(reference=(5, 6, 7), percentile=10.0, top=3, controls=500)
    monkeypatch.setattr("workbench.glitch.scanning.scanner._prompts", lambda *_: _short_templates())
    tested = scan(model, "top", options=options)
    assert tested.verification is not None
    assert [t.token_id for t in tested.verification.candidates] == tested.candidates()[:3]
    controls = [t.token_id for t in tested.verification.controls]
    assert not set(controls) & {*tested.candidates(), *tested.reference.members}
    assert 0 < len(controls) == len(set(controls)) < 260
    again = scan(model, "top", options=options)
    assert again.verification == tested.verification
    df = tested.frame().set_index("token_id")
    assert (df.role == "candidate").sum() == 3 and (df.role == "control").sum() == len(controls)
    assert df.max_prob.notna().sum() == (df.role != "").sum()
    assert any("Expected" in finding and "false among the 3 tested" in finding for finding in tested.findings())


def _short_templates() -> PromptSet:
    prompt, slot = TokenPrompt("p", "", "{token}", "{token}"), torch.tensor([1])
    return PromptSet((
        Template(prompt, torch.tensor([3, 7, 9]), slot), Template(prompt, torch.tensor([4, 7, 8, 9]), slot, "chat"),
    ))  # fmt: skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_planted_model_is_read_from_its_training(tmp_path: Path, one_thread: None) -> None:
    """Trains embeddings with AdamW on text that never holds the planted ids."""
    trained = [i for i in range(N) if i not in set(UNUSED)]
    generator = torch.Generator().manual_seed(0)
    pairs = torch.tensor(trained)[torch.randint(0, len(trained), (64, 40), generator=generator)]
    for tied in (True, False):
        torch.manual_seed(0)
        E = torch.nn.Embedding(N + 5, 32)
        torch.nn.init.normal_(E.weight, std=0.5)
        inner, init = torch.nn.Linear(32, 32), E.weight.detach().clone()
        head = E if tied else torch.nn.Linear(32, N + 5, bias=False)
        parameters = {*E.parameters(), *inner.parameters(), *head.parameters()}
        steps, lr, decay = 200, 0.03, 0.5
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
        for step in range(steps):
            ids = pairs[step % 64]
            h = torch.nn.functional.layer_norm(E(ids) + inner(E(ids)).tanh(), (32,))
            loss = torch.nn.functional.cross_entropy(h @ head.weight.T, ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tensors = {EMBED: E.weight.detach()} | ({} if tied else {HEAD: head.weight.detach()})
        report = scan(folder(tmp_path / str(tied), TOKENIZER, tensors, tied=tied), options=ALL)
        assert report.indicator == ("I_cos" if tied else "I_in"), report.findings()
        assert set(report.candidates()[:3]) == set(PLANTED)
        if not tied:
            expected = init[PLANTED] * (1 - lr * decay) ** steps
            assert torch.allclose(E.weight[PLANTED], expected, rtol=1e-4)


def test_words_of_the_tiny_vocabulary_are_ordinary(tmp_path: Path) -> None:
    report = scan(_tied(tmp_path, matrix(N + 5, UNUSED)))
    assert all(report.table.ordinary[AT(word)] for word in WORDS)


IDENTICAL = {5, *range(7, 17), 36743, 36744, 45175, 48047}


@pytest.mark.embedded
def test_the_embedded_model_gives_the_known_list(embedded: Model) -> None:
    report = scan("embedded")
    assert set(report.reference.members) == IDENTICAL and report.reference.name == "identical rows"
    assert sorted(len(ids) for ids in report.identical) == [2, 2, 4, 7]
    assert report.tied and report.indicator == "I_cos"
    values = report.table.indicators["I_cos"]
    assert values.mean() == pytest.approx(0.417, abs=5e-4) and values.std() == pytest.approx(0.130, abs=6e-4)
    assert np.percentile(values, 2.0) == pytest.approx(0.2676, abs=1e-4)
    order = [190, 43858, 39145, 36902, 45139, 43420, 39121, 45691, 34047, 41255, 46687, 39362, 40264]
    assert set(report.candidates()[:4]) == {36743, 36744, 45175, 48047} and report.candidates()[4:17] == order
    assert values[[190, 43858, 39145, 36902]].round(4).tolist() == [0.0001, 0.0003, 0.0011, 0.0016]
    norms = report.table.norm
    lowest = set(np.argsort(norms)[:983].tolist())
    assert not lowest & set(np.argsort(values)[:983].tolist()), "the input norm must find none of them"

    guessed = scan(embedded, options=ScanOptions(reference=(0,)))
    assert not set(guessed.candidates()[:100]) & set(report.candidates()[:100])
    ranks = [np.argsort(np.argsort(r.table.indicators["I_cos"])) for r in (guessed, report)]
    assert np.corrcoef(*ranks)[0, 1] < -0.75


@pytest.mark.slow
@pytest.mark.embedded
def test_the_embedded_model_cannot_say_the_first_candidates(embedded: Model, tmp_path: Path) -> None:
    short = {"name": "short", "preamble": "Out repeats In.", "shown": "\nIn: «{token}»\nOut:", "answer": " «{token}»"}
    (tmp_path / "short.json").write_text(json.dumps([short | {"shots": 3}]))
    options = ScanOptions(top=3, controls=3, prompts=tmp_path / "short.json", verification=VerifyOptions(steps=1))
    report = scan(embedded, "top", options=options)
    assert report.verification is not None
    assert {t.token_id for t in report.verification.candidates} <= IDENTICAL
    assert {t.verdict for t in report.verification.candidates} == {"strong_verified"}
    assert report.verification.control_failures is not None and report.verification.control_failures.value == 0.0
    assert all(t.max_prob > 0.05 for t in report.verification.controls)


def test_tokens_that_no_text_gives_are_tested_in_a_table_of_their_own(tmp_path: Path) -> None:
    halves = [AT("Ã"), AT("â")]
    report = scan(_tied(tmp_path, matrix(N + 5, [*UNUSED, *halves])), options=ScanOptions(percentile=10.0))
    left = [i for i in report.unwritable() if report.table.category[i] == "partial_utf8"]
    assert set(halves) <= set(left) and not set(left) & {*report.candidates(), *report.reference.members}
    assert report.row(halves[0])["kind"] == "byte"


def test_every_part_of_a_test_is_in_the_report_and_in_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr("workbench.glitch.scanning.scanner._prompts", lambda *_: _short_templates())
    options = ScanOptions(reference=(5, 6, 7), percentile=40.0, top=4, controls=6, symptoms=True, spliced=3)
    journal = tmp_path / "tested.jsonl"
    report = scan(model, "top", options=replace(options, journal=journal))
    verification = report.verification
    assert verification is not None and report.sides is not None and report.symptoms is not None
    assert verification.forms == ("raw", "chat") and set(verification.failures_by_form) == {"raw", "chat"}
    assert len(verification.candidates) == 4 and 0 < len(verification.spliced) <= 3
    assert {t.token_id for t in verification.spliced} <= set(report.unwritable())
    facts = report.to_json()
    assert facts["verification"]["model_hash"] == model.fingerprint and facts["seed"] == 0
    assert facts["verification"]["dtype"] == "float32" and len(facts["verification"]["prompt_hash"]) == 12
    first = facts["candidates"][0]
    assert {"kind", "script", "part_of", "broken", "symptoms", "form", "p_value"} <= first.keys()
    json.dumps(facts, allow_nan=False)
    findings = " ".join(report.findings())
    assert "NO VERDICT" in findings and "Symptoms (chat form" in findings and "raw alone" in findings
    before = journal.read_bytes()
    again = scan(model, "top", options=replace(options, journal=journal))
    assert again.verification == verification and journal.read_bytes() == before
    with pytest.raises(MismatchError, match="steps"):
        scan(model, "top", options=replace(options, journal=journal, verification=VerifyOptions(steps=1)))


def test_the_table_survives_a_spreadsheet_and_any_token(tmp_path: Path) -> None:
    tokenizer = byte_level()
    nasty = ["=1+1", "+cmd", "-2", "@sum", "'=", 'a"b', "a,b", "a;b", "x\ny", "'s", "\u2028", "é=", "\x00="]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in nasty])
    n = tokenizer.get_vocab_size()
    made = folder(tmp_path, tokenizer, {EMBED: matrix(n, UNUSED[: len(RESERVED)])})
    report = scan(made)
    raw = report.to_csv(tmp_path / "t.csv").read_bytes()
    rows = list(csv.DictReader(io.StringIO(raw.decode("utf-8"), newline="")))
    assert len(rows) == n == raw.count(b"\n") - 1
    for row in rows:
        assert row["token"].lstrip()[:1] not in tuple("=+-@") or len(row["token"]) == 1
        assert cell_text(row["token"]) == shown(report.table.token[int(row["token_id"])])
    assert {"'=1+1", "'+cmd", "''=", "'s"} <= {row["token"] for row in rows}


@pytest.mark.embedded
def test_the_embedded_model_fails_in_both_forms_and_on_both_sides(embedded: Model, tmp_path: Path) -> None:
    short = {"name": "short", "preamble": "Out repeats In.", "shown": "\nIn: «{token}»\nOut:", "answer": " «{token}»"}
    (tmp_path / "short.json").write_text(json.dumps([short | {"shots": 2}]))
    made = prompt_set(embedded, analyse(codec_of(embedded.tokenizer)), prompts_from(tmp_path / "short.json"))
    assert made.forms == ("raw", "chat")
    codec = codec_of(embedded.tokenizer)
    done = verify(embedded, codec, made.templates, [36743, 43858, 34047], [27556, 31940, 39978], VerifyOptions(steps=1))
    assert all(t.verdict == "strong_verified" and t.p_value == 1 / 4 for t in done.candidates)
    assert min(t.best_in("raw") or 0 for t in done.controls) > 0.05
