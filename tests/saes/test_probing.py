from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from tests.saes.handmade import word_tokenizer
from tests.tiny import tiny_model
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.stats import Estimate
from workbench.core.tokens import TokenBatch
from workbench.saes.evaluation.labelled import local_text_sets, token_labels, token_texts
from workbench.saes.evaluation.sparse_probing import (
    Examples,
    ProbeScore,
    ProbingOptions,
    ProbingReport,
    probe_sets,
    split_by_document,
    t_mean,
)


def _planted(seed: int = 0, n: int = 400) -> Examples:
    """The label is feature 7 of the SAE and a direction spread over all channels of x."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, n)
    acts = random.random((n, 30)) * (random.random((n, 30)) < 0.3)
    acts[:, 7] = labels * random.uniform(0.5, 1.5, n)
    x = random.normal(size=(n, 40)) + np.outer(2 * labels - 1, np.full(40, 0.3))
    noise = random.random((n, 30)) * (random.random((n, 30)) < 0.3)
    sae = {"SAE": csr_matrix(acts), "random SAE": csr_matrix(noise)}
    return Examples("planted", x, sae, labels, np.arange(n) // 10)


def test_a_planted_feature_is_found_and_every_control_stands_where_it_must() -> None:
    report = probe_sets([_planted()], ProbingOptions(per_class=150))
    mean = {(s.reads, s.k): report.mean(s.reads, s.k).value for s in report.scores}
    assert mean["SAE", 1] == 1
    assert mean["random SAE", 1] < 0.65
    assert mean["SAE, shuffled labels", 5] < 0.65
    assert 0.52 < mean["residual channels", 1] < 0.8
    assert mean["residual channels", 1] < mean["residual channels", 5] < mean["full residual", 0]
    assert mean["full residual", 0] > 0.85
    one = next(s for s in report.scores if s.reads == "residual channels" and s.k == 1)
    assert one.sd > 0
    assert one.accuracy.low < one.accuracy.value < one.accuracy.high
    assert one.accuracy.n == 5
    assert len(report.findings()) == 4
    found = report.section().metrics["SAE_k1"]
    assert isinstance(found, Estimate) and found.value == 1 and found.unit == "reseeds"


def test_over_several_sets_the_difference_is_taken_set_by_set() -> None:
    """Sets differ far more than SAE and control do; only the pairs show who is ahead."""

    def score(task: str, reads: str, k: int, *accuracies: float) -> ProbeScore:
        return ProbeScore(task, reads, k, t_mean(accuracies), t_mean(accuracies), accuracies)

    scores = []
    for i, easy in enumerate((0.55, 0.7, 0.95)):
        scores += [score(f"{i}", "SAE", 1, easy + 0.02, easy + 0.03), score(f"{i}", "random SAE", 1, easy, easy)]
        scores += [score(f"{i}", "residual channels", 1, easy + 0.06 - 0.03 * i, easy + 0.05 - 0.03 * i)]
        scores += [score(f"{i}", "SAE, shuffled labels", 1, 0.5, 0.5), score(f"{i}", "full residual", 0, 1.0, 1.0)]
    report = ProbingReport(tuple(scores))
    mean, ahead = report.mean("SAE", 1), report.ahead("SAE", 1, "random SAE")
    assert (mean.n, mean.unit) == (3, "sets")
    assert ahead.value == pytest.approx(0.025) and ahead.high - ahead.low < 1e-9
    assert mean.high - mean.low > 0.5
    (line, _) = report.findings()
    assert "a random SAE: worse (the SAE is ahead by 0.0250 [0.0250, 0.0250] (n = 3 sets))" in line
    assert "1 residual channel: not clearly different (the SAE is ahead by" in line


def test_test_documents_are_never_trained_on_and_classes_are_balanced() -> None:
    examples, options = _planted(), ProbingOptions(per_class=100)
    train, test = split_by_document(examples, options, np.random.default_rng(0))
    assert not set(examples.documents[train]) & set(examples.documents[test])
    for rows, n in ((train, 70), (test, 30)):
        assert np.bincount(examples.labels[rows]).tolist() == [n, n]
        assert len(set(rows)) == len(rows)


def test_a_label_that_only_names_the_document_is_not_learned() -> None:
    """One feature per document: perfect within documents, worthless for others."""
    random = np.random.default_rng(0)
    documents = np.repeat(np.arange(40), 10)
    labels = random.integers(0, 2, 40)[documents]
    acts = csr_matrix(np.eye(40)[documents])
    examples = Examples("leak", np.eye(40)[documents], {"SAE": acts, "random SAE": acts}, labels, documents)
    assert probe_sets([examples]).mean("full residual", 0).value < 0.65


def test_wrong_input_is_refused() -> None:
    good = _planted()
    with pytest.raises(ShapeError, match="must pair"):
        Examples("x", good.x[:3], good.acts, good.labels, good.documents)
    with pytest.raises(DegenerateInputError, match="no labelled set"):
        probe_sets([])
    with pytest.raises(DegenerateInputError, match="Give more text"):
        probe_sets([Examples("x", good.x, good.acts, np.zeros(400, dtype=int), good.documents)])
    with pytest.raises(InvalidInputError):
        ProbingOptions(reseeds=1)


def test_token_labels_say_what_they_say() -> None:
    tokenizer = tiny_model().tokenizer
    text = "Ab 3,\nz"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    batch = TokenBatch.pad([ids, ids[:2]], pad_id=1)
    entropy = torch.arange(batch.ids.numel(), dtype=torch.float32).view(batch.ids.shape)
    labels = token_labels(batch, token_texts(tokenizer), entropy)
    assert labels["digit"].tolist()[0] == [0, 0, 0, 1, 0, 0, 0]
    assert labels["capitalised"].tolist()[0] == [1, 0, 0, 0, 0, 0, 0]
    assert labels["newline"].tolist()[0] == [0, 0, 0, 0, 0, 1, 0]
    assert labels["punctuation"].tolist()[0] == [0, 0, 0, 0, 1, 0, 0]
    assert labels["second half of the row"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [-1] * 5 + [0, 1]]
    assert labels["uncertain next token"][0].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert token_labels(TokenBatch.pad([[0, 1, 9]], 0), [" word", "word"])["begins a word"].tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_token_that_begins_a_word_is_known_in_every_kind_of_vocabulary(kind: str) -> None:
    tokenizer = word_tokenizer(["ant", "bee"], kind)
    ids = tokenizer(" ant bee", add_special_tokens=False)["input_ids"]
    assert [token_texts(tokenizer)[i] for i in ids] == [" ant", " bee"]
    assert token_labels(TokenBatch.pad([ids], 0), token_texts(tokenizer))["begins a word"].tolist() == [[1, 1]]


def test_local_texts_are_balanced_reproducible_and_what_they_are_called() -> None:
    sets = local_text_sets(per_class=20)
    assert sets == local_text_sets(per_class=20)
    by_name = {s.name: s for s in sets}
    for s in sets:
        assert sum(s.labels) == 20 and len(s.labels) == len(s.texts) == len(s.documents) == 40
        assert len(set(s.documents)) > 10
    loops = by_name["loop or no loop"]
    assert all(("for " in t or "while " in t) for t, label in zip(loops.texts, loops.labels, strict=True) if label)
    docs = by_name["code or docstring"]
    assert all(t.startswith("def ") == bool(label) for t, label in zip(docs.texts, docs.labels, strict=True))
