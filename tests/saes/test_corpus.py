from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from tests.tiny import tiny_model, tiny_tokenizer
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.models.model import Model
from workbench.saes.comparison.corpus import (
    CorpusOptions,
    check_corpus,
    first_tokens,
    repeated_ngrams,
    start_distribution,
)

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


def _own_text(model: Model, rows: int = 300, seed: int = 0) -> Tensor:
    prompt = torch.full((rows, 1), BOS)
    return torch.cat([prompt, model.sample(prompt, 11, seed=seed)], dim=1)


def test_the_models_own_text_is_rarely_told_apart_from_the_model(model: Model) -> None:
    """Three ranges of 98.3 % each: at most one corpus in twenty falls outside, up to chance over the seeds."""
    seeds = 30
    reports = [check_corpus(model, _own_text(model, seed=seed)[:, :3]) for seed in range(seeds)]
    outside = sum(not report.like_the_model for report in reports)
    assert outside <= binom.ppf(0.995, seeds, 0.05)
    like = next(report for report in reports if report.like_the_model)
    assert like.n_sequences == 300
    assert "as drawn from the model" in like.findings()[0] and "not as" not in like.findings()[0]
    assert like.found["cross_entropy"] == pytest.approx(like.entropy, abs=0.3)
    assert like.found["mean_kl"] > 0.1, "sampling noise alone; this is why the null stands beside it"
    json.dumps(like.to_json())


def test_other_text_is_told_apart(model: Model) -> None:
    rows = torch.randint(2, 200, (300, 12), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = BOS
    report = check_corpus(model, rows)
    assert not report.like_the_model and "not as drawn" in report.findings()[0]
    same = rows.clone()
    same[:, 1] = 77
    report = check_corpus(model, same)
    assert report.found["unique_first"] == 1 < report.null["unique_first"].low
    assert report.top == (("P", 1.0, pytest.approx(float(start_distribution(model)[77]))),) or report.top[0][1] == 1.0


def test_the_divergences_are_their_formulas(model: Model) -> None:
    rows = _own_text(model)
    report = check_corpus(model, rows, options=CorpusOptions(pseudo_count=2.0))
    with torch.no_grad():
        p = model.hf(torch.tensor([[BOS]])).logits[0, -1].double().softmax(0).numpy()
    counts = np.bincount(rows[:, 1], minlength=len(p))
    q, smooth = counts / 300, (counts + 2 / len(p)) / 302
    there = q > 0
    kl_data = (q[there] * np.log(q[there] / p[there])).sum()
    kl_model = (p * np.log(p / smooth)).sum()
    assert report.found["kl_data_model"] == pytest.approx(kl_data, rel=1e-5)
    assert report.found["kl_model_data"] == pytest.approx(kl_model, rel=1e-5)
    assert report.found["mean_kl"] == pytest.approx((kl_data + kl_model) / 2, rel=1e-5)
    assert report.found["cross_entropy"] == pytest.approx(-(q[there] * np.log(p[there])).sum(), rel=1e-5)
    assert report.found["unique_first"] == there.sum()


def test_more_sequences_have_a_smaller_null(model: Model) -> None:
    rows = _own_text(model)
    few, many = check_corpus(model, rows[:30]), check_corpus(model, rows)
    assert few.null["mean_kl"].low > many.null["mean_kl"].high


def test_first_tokens_follow_start_or_end_tokens(model: Model) -> None:
    rows = torch.tensor([[5, 6, EOS, 7, 8], [9, EOS, EOS, 4, EOS]])
    assert first_tokens(model, rows).tolist() == [5, 7, 4]
    rows[:, 0] = BOS
    assert first_tokens(model, rows).tolist() == [6, EOS], "only these are drawn after the start token"
    with pytest.raises(DegenerateInputError, match="no text starts in 1 rows"):
        check_corpus(model, torch.tensor([[EOS, EOS, EOS, EOS]]))
    assert check_corpus(model, torch.tensor([[5, 6, 7, 8]]), torch.tensor([5])).n_sequences == 1


def test_repetition_is_counted_as_by_hand(model: Model) -> None:
    rows = torch.randint(2, 6, (30, 14), generator=torch.Generator().manual_seed(0))
    for n in (1, 3, 5):
        grams = [[tuple(row[i : i + n]) for i in range(15 - n)] for row in rows.tolist()]
        every = [gram for row in grams for gram in row]
        found = repeated_ngrams(rows, n)
        assert found.repeated == pytest.approx(1 - len(set(every)) / len(every))
        assert found.looping_rows == pytest.approx(sum(len(set(row)) < len(row) for row in grams) / 30)
    with pytest.raises(InvalidInputError, match="rows hold 14"):
        repeated_ngrams(rows, 15)


def test_copied_rows_are_seen(model: Model) -> None:
    rows = _own_text(model, 40)
    report = check_corpus(model, torch.cat([rows, rows[:10]]))
    assert report.unique_sequences == pytest.approx(40 / 50, abs=0.03)
    assert [part.n for part in report.ngrams] == [4, 8], "rows of 12 tokens hold no 16-gram"
    assert report.ngrams[1].repeated >= 10 / 50
    assert {"mean_kl", "null_mean_kl", "repeated_8grams"} <= report.section().metrics.keys()
    assert tiny_tokenizer().bos_token_id == BOS
