from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import faithful_sae
from experiments.faithful_sae import Options, study
from tests.tiny import tiny_model
from workbench.core.errors import CorruptFileError, InvalidInputError, MissingFileError
from workbench.core.stats import Estimate
from workbench.saes.comparison.corpus import CorpusOptions
from workbench.saes.comparison.faithful import FakeFeatureOptions, Quality
from workbench.saes.comparison.faithful_report import CORPUS, OWN, FaithfulReport
from workbench.saes.config import SAEConfig
from workbench.saes.evaluation import library_texts
from workbench.saes.evaluation.evaluate import EvalOptions
from workbench.saes.evaluation.library_texts import Labelled, docstrings, library_topics, read_labelled, write_corpus

SMALL = Options(
    tokens=1200, context=12, seeds=2, sae=SAEConfig(d_sae=48, k=4, tokens=2000, batch=100),
    evaluation=EvalOptions(max_rows=4), fake=FakeFeatureOptions(tokens=240, context=12, seeds=2),
    corpus=CorpusOptions(draws=100),
)  # fmt: skip
TEXTS = Labelled(
    tuple(f"{word} {i} {word} {i * 7}" for i in range(12) for word in ("aaa bb", "zz 99 yy")), (0, 1) * 12, ("a", "z")
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faithful")


@pytest.fixture(scope="module")
def report(folder: Path) -> FaithfulReport:
    corpus = folder / "text.txt"
    corpus.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    return study(tiny_model(), "resid_post.1", folder / "run", corpus=corpus, labelled=TEXTS, options=SMALL)


def test_the_study_measures_every_sae_on_both_texts_and_every_pair(report: FaithfulReport) -> None:
    assert [(sae.data, sae.seed) for sae in report.saes] == [(OWN, 0), (OWN, 1), (CORPUS, 0), (CORPUS, 1)]
    assert all(set(sae.on) == {OWN, CORPUS} for sae in report.saes)
    assert [len(report.of(group)) for group in ((OWN, OWN), (CORPUS, CORPUS), (OWN, CORPUS))] == [1, 1, 4]
    assert report.tokens == 1200 and set(report.texts) == {OWN, CORPUS}
    assert report.texts[OWN].n_sequences == 100 > report.texts[CORPUS].found["unique_first"]
    assert report.texts[CORPUS].ngrams[0].repeated > 0.5 > report.texts[OWN].ngrams[0].repeated
    assert report.raw_probe.value > 0.9 > report.raw_shuffled.value
    for sae in report.saes:
        better, worse = (sae.on[text].fvu.value for text in ((OWN, CORPUS) if sae.data == OWN else (CORPUS, OWN)))
        assert better < worse, "an SAE serves the kind of text that it was trained on best"


def test_a_stopped_study_measures_nothing_twice(
    report: FaithfulReport, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for name in ("fake_features", "quality", "check_corpus", "match_by_activations", "fit_probe"):
        real = getattr(faithful_sae, name)
        monkeypatch.setattr(faithful_sae, name, lambda *a, _f=real, _n=name, **k: (ran.append(_n), _f(*a, **k))[1])

    def again(options: Options) -> FaithfulReport:
        return study(
            tiny_model(), "resid_post.1", folder / "run", corpus=folder / "text.txt", labelled=TEXTS, options=options
        )

    assert again(SMALL) == report and not ran
    (measured,) = (folder / "run" / "measured").iterdir()
    for part in ("own-0-on-corpus", "own-1-and-corpus-0", "text-own"):
        (measured / "parts" / f"{part}.json").unlink()
    assert again(SMALL) == report and ran == ["quality", "match_by_activations", "check_corpus"]
    other = again(replace(SMALL, match=replace(SMALL.match, threshold=0.1)))
    assert other.pairs != report.pairs and ran.count("match_by_activations") == 7


def test_the_report_says_only_what_intervals_decide(report: FaithfulReport) -> None:
    section = report.section()
    json.dumps(report.to_json())
    assert len(section.metrics) > 40 and len(section.blocks) >= 9
    differences = report.differences()
    said = "\n".join(section.findings)
    for name, value in differences.items():
        word = "not clearly different" if not value.excludes(0.0) else "higher" if value.value > 0 else "lower"
        assert f"{name}: {word}" in said
    own, other = ([s.on[OWN].fvu.value for s in report.saes if s.data == data] for data in (OWN, CORPUS))
    assert differences["FVU on own text"].value == pytest.approx(sum(own) / 2 - sum(other) / 2)

    def with_fvu(q: Quality, value: float) -> Quality:
        return replace(q, fvu=Estimate(value, value, value, 1, ""))

    moved = tuple(
        replace(sae, on=sae.on | {OWN: with_fvu(sae.on[OWN], (0.1 if sae.data == OWN else 0.5) + 0.001 * sae.seed)})
        for sae in report.saes
    )
    assert any(
        f.startswith("FVU on own text: lower with own text than") for f in replace(report, saes=moved).findings()
    )


def test_pairs_from_the_same_initial_weights_are_not_counted_as_sharing_across_texts(report: FaithfulReport) -> None:
    across = report.of((OWN, CORPUS))
    assert [pair.names for pair in across if pair.same_start] == [("own-0", "corpus-0"), ("own-1", "corpus-1")]
    assert not any(pair.same_start for group in (OWN, CORPUS) for pair in report.of((group, group)))
    alike = Estimate(0.9, 0.8, 1.0, 48, "")
    pairs = tuple(
        replace(
            pair, directions=replace(pair.directions, ratio=alike if pair.same_start else replace(alike, value=0.1))
        )
        for pair in report.pairs
    )
    said = replace(report, pairs=pairs).findings()[0]
    assert "0.100 to 0.100 (n = 48 features, 2 pairs) with other seeds" in said
    assert "0.900 to 0.900 (n = 48 features, 2 pairs) from the same initial weights" in said


def test_stores_and_saes_are_used_again(report: FaithfulReport, folder: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in (folder / "run").rglob("*.safetensors")}
    again = study(
        tiny_model(), "resid_post.1", folder / "run", corpus=folder / "text.txt", labelled=TEXTS, options=SMALL
    )
    assert again == report
    assert {f: f.stat().st_mtime_ns for f in (folder / "run").rglob("*.safetensors")} == before


def test_unequal_budgets_and_single_seeds_are_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "text.txt"
    corpus.write_text("Too short for the budget. " * 10, encoding="utf-8")
    with pytest.raises(InvalidInputError, match="as many of both"):
        study(tiny_model(), "resid_post.1", tmp_path, corpus=corpus, labelled=TEXTS, options=SMALL)
    with pytest.raises(InvalidInputError, match="at least two seeds"):
        replace(SMALL, seeds=1)


@pytest.mark.slow
def test_the_local_corpus_is_made_again_to_the_byte_and_leaves_the_probe_texts_out(tmp_path: Path) -> None:
    first, second = write_corpus(tmp_path / "a.jsonl"), write_corpus(tmp_path / "b.jsonl")
    assert first.read_bytes() == second.read_bytes() != write_corpus(tmp_path / "c.jsonl", seed=1).read_bytes()
    text = "\n".join(json.loads(line)["text"] for line in first.read_text(encoding="utf-8").splitlines())
    assert len(text) > 500_000
    topics = library_topics(per_class=50)
    assert topics.labels == (0,) * 50 + (1,) * 50 and len(set(topics.texts)) == 100
    long = [t for t in topics.texts if len(t) > 200]
    assert len(long) > 20 and not any(t in text for t in long)
    assert ast.get_docstring(ast.parse(Path(library_texts.__file__).read_text("utf-8"))) in list(
        docstrings(Path(library_texts.__file__))
    )


def test_labelled_files_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    file = tmp_path / "l.jsonl"
    file.write_text('{"text": "a", "label": 1}\n\n{"text": "b", "label": 0}\n', encoding="utf-8")
    assert read_labelled(file) == Labelled(("a", "b"), (1, 0), ("0", "1"))
    file.write_text('{"text": "a", "label": 1}\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(CorruptFileError, match="line 2"):
        read_labelled(file)
    file.write_text('{"text": "a", "label": 1}\n', encoding="utf-8")
    with pytest.raises(CorruptFileError, match="needs two"):
        read_labelled(file)
    file.write_text('{"text": "a\u2028b", "label": 1}\n{"text": "b", "label": 0}\n', encoding="utf-8")
    assert read_labelled(file).texts == ("a\u2028b", "b"), "JSON may hold other line ends"
    file.write_text('{"text": "a", "label": 1}\n', encoding="utf-16")
    with pytest.raises(CorruptFileError, match="not UTF-8"):
        read_labelled(file)
    with pytest.raises(MissingFileError, match="no file"):
        read_labelled(tmp_path / "none")
