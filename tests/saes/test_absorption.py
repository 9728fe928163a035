from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.saes.handmade import word_tokenizer
from tests.tiny import tiny_model
from workbench.bases.base import Dictionary
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, ShapeError
from workbench.saes.evaluation.absorption import AbsorptionOptions, absorption, vocabulary_words

LETTERS, WORDS = 4, 10
N = LETTERS * WORDS
D = LETTERS + N
LETTER = torch.arange(N) // WORDS
TEST = torch.arange(N) % WORDS >= 6
NAMES = [chr(97 + int(i)) for i in LETTER]
X = 3 * torch.eye(D)[LETTER] + torch.eye(D)[LETTERS:]
"""Each word is three times its letter's direction plus its own."""
OPTIONS = AbsorptionOptions(gate_letters=4)


def _sae(absorbed: Tensor) -> Dictionary:
    """Letter features, which are silent on absorbed words; those words' own features carry the letter as well."""
    W_dec = torch.eye(D)
    for word in absorbed.nonzero()[:, 0].tolist():
        W_dec[LETTERS + word] = X[word]

    def encode(x: Tensor) -> Tensor:
        acts = x.clone()
        acts[:, :LETTERS] *= (x[:, LETTERS:] @ (~absorbed).float())[:, None]
        return acts

    return Dictionary.of(encode, W_dec)


def test_a_clean_sae_absorbs_nothing() -> None:
    coder = _sae(torch.zeros(N, dtype=torch.bool))
    torch.testing.assert_close(coder.reconstruct(X), X)
    report = absorption(coder, X, NAMES, TEST, OPTIONS)
    assert report.gate_passed
    assert report.full is not None and report.full.value == 0
    assert report.fraction is not None and report.fraction.value == 0
    assert [s.features for s in report.letters] == [(0,), (1,), (2,), (3,)]
    assert all(s.n == 4 for s in report.letters)


def test_an_absorbing_sae_absorbs_all_and_half_of_it_half() -> None:
    coder = _sae(TEST)
    torch.testing.assert_close(coder.reconstruct(X), X)
    report = absorption(coder, X, NAMES, TEST, OPTIONS)
    assert report.full is not None and report.full.value == 1
    assert report.fraction is not None and report.fraction.value == pytest.approx(1)
    half = absorption(_sae(TEST & (torch.arange(N) % 2 == 0)), X, NAMES, TEST, OPTIONS)
    assert half.full is not None and half.full.value == 0.5
    assert "Full absorption 0.5" in half.findings()[0]


def test_a_feature_of_the_word_that_does_not_carry_the_letter_is_no_absorption() -> None:
    clean, absorbing = _sae(torch.zeros(N, dtype=torch.bool)), _sae(TEST)
    deaf = Dictionary.of(absorbing.encode, clean.W_dec)
    report = absorption(deaf, X, NAMES, TEST, OPTIONS)
    assert report.full is not None and report.full.value == 0


def test_where_letters_are_not_linear_the_gate_fails_and_there_is_no_number() -> None:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    report = absorption(_sae(TEST), x, NAMES, TEST, OPTIONS)
    assert not report.gate_passed
    assert report.full is None
    assert "gate failed" in report.findings()[0]
    assert set(report.section().metrics) == {"letters_passed"}
    strict = absorption(_sae(TEST), X, NAMES, TEST, replace(OPTIONS, gate_letters=5))
    assert strict.full is None and strict.n_good == 4


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ShapeError, match="must pair"):
        absorption(_sae(TEST), X, NAMES[:3], TEST)
    with pytest.raises(DegenerateInputError, match="whole lower-case words"):
        vocabulary_words(tiny_model().tokenizer, AbsorptionOptions())
    with pytest.raises(InvalidInputError):
        AbsorptionOptions(test_share=1.0)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_words_of_a_vocabulary_are_whole_and_lower_case(kind: str) -> None:
    words = ["ant", "bee", *(f"{a}{b}oo" for a in "cdefghijkl" for b in "mnopqrstuv")]
    tokenizer = word_tokenizer(words, kind)
    ids, letters = vocabulary_words(tokenizer, AbsorptionOptions())
    found = [str(tokenizer.convert_ids_to_tokens(i))[1:] for i in ids.tolist()]
    assert set(words) <= set(found) and all(len(word) >= 3 and word.isalpha() for word in found)
    assert letters == [word[0] for word in found]


def test_a_transcoder_is_refused() -> None:
    with pytest.raises(MismatchError, match="transcoder"):
        absorption(replace(_sae(TEST), transcodes=True), X, NAMES, TEST, OPTIONS)
