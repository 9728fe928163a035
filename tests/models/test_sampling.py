from __future__ import annotations

import functools

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.tiny import tiny_model
from workbench.core.errors import InvalidInputError
from workbench.models.sampling import Noise, Sampling, choose, race, smallest_kept


@functools.cache
def drawn(n: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return Noise(torch.arange(n), seed).next(vocab)


def test_a_race_is_won_in_proportion_to_the_weights_within_and_between_blocks() -> None:
    n = 5000
    weights = torch.zeros(1, 700)
    weights[0, [3, 4, 300, 699]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    got, total = race(weights.expand(n, -1), drawn(n, 700))
    share = torch.bincount(got, minlength=700) / n
    torch.testing.assert_close(share[None], weights / 10, atol=0.03, rtol=0)
    assert bool((weights[0, got] > 0).all())
    torch.testing.assert_close(total, torch.full((n,), 10.0))


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    n = 5000
    noise = drawn(n, 12)
    ids, logprobs = choose(logits.expand(n, -1).clone(), noise, Sampling())
    share = torch.bincount(ids, minlength=3) / n
    torch.testing.assert_close(share, logits.exp(), atol=0.03, rtol=0)
    torch.testing.assert_close(logprobs, logits[ids])
    cold, logprob_cold = choose(logits.expand(n, -1).clone(), noise, Sampling(temperature=0.5))
    squared = logits.exp() ** 2 / (logits.exp() ** 2).sum()
    torch.testing.assert_close(torch.bincount(cold, minlength=3) / n, squared, atol=0.03, rtol=0)
    torch.testing.assert_close(logprob_cold, logits[cold])  # reported at temperature 1


def test_the_draws_of_a_row_depend_on_seed_and_row_number_only() -> None:
    whole, part = Noise(torch.arange(5), 3), Noise(torch.tensor([2, 3]), 3)
    assert torch.equal(whole.next(700)[2:4], part.next(700))
    whole.keep(torch.tensor([2, 3]))
    second = whole.next(700)
    assert torch.equal(second, part.next(700))
    assert not torch.equal(second, drawn(2, 700)) and len(drawn(200, 3)[:, 0].unique()) == 200
    assert not torch.equal(drawn(2, 3, seed=1), drawn(2, 3, seed=2))


def test_rounding_of_the_logits_seldom_changes_a_choice() -> None:
    # one uniform number in the cumulative weights chooses another token in 4 of 10 rows here
    logits = torch.randn(400, 5000, generator=torch.Generator().manual_seed(0))
    noise = drawn(400, 5000)
    other = logits + 0.02 * torch.randn(400, 5000, generator=torch.Generator().manual_seed(1))
    changed = choose(logits, noise, Sampling())[0] != choose(other, noise, Sampling())[0]
    assert float(changed.float().mean()) < 0.05


@pytest.mark.parametrize("temperature", [1e-300, 1e-12, 1e-6])
def test_a_temperature_near_zero_takes_the_most_probable_token(temperature: float) -> None:
    model = tiny_model()
    want = model.generate("abc", 6, temperature=0.0)
    got = model.generate("abc", 6, temperature=temperature)
    assert got.ids[0].tolist() == want.ids[0].tolist() and got.texts == want.texts


def test_a_temperature_beyond_fp32_leaves_impossible_tokens_impossible() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 5.0]]).expand(50, -1).clone()
    assert set(choose(logits, drawn(50, 3), Sampling(temperature=1e300))[0].tolist()) == {0, 2}


def _warped(logits: torch.Tensor, options: Sampling) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        warpers.append(MinPLogitsWarper(options.min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits.clone())


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 300, "top_p": 0.3, "min_p": 0.2},
    {"top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_kept_tokens_are_those_of_transformers(filters: dict[str, float], temperature: float) -> None:
    options = Sampling(temperature=temperature, **filters)  # type: ignore[arg-type]
    # from nearly flat, where the nucleus is wider than the first 64, to nearly certain
    scale = torch.tensor([0.01, 0.5, 1.0, 3.0, 10.0])[:, None]
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1)) * scale
    scores = (logits - logits.amax(1, keepdim=True)) / temperature
    kept = scores >= smallest_kept(scores, options)
    assert torch.equal(kept, _warped(logits, options).isfinite())
    assert bool(kept.any(1).all())


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.8}], ids=str)
def test_filtered_draws_follow_the_distribution_of_transformers(filters: dict[str, float]) -> None:
    n, options = 5000, Sampling(temperature=0.8, **filters)  # type: ignore[arg-type]
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    ids, logprobs = choose(logits.expand(n, -1).clone(), drawn(n, 12), options)
    want = _warped(logits, options).softmax(-1)[0]
    assert not torch.allclose(want, (logits[0] / 0.8).softmax(-1), atol=0.05)  # the filter matters here
    torch.testing.assert_close(torch.bincount(ids, minlength=12) / n, want, atol=0.03, rtol=0)
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[ids])  # without the filter


def test_tokens_as_probable_as_the_last_one_kept_are_kept() -> None:
    scores = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    scores -= scores.amax()
    for options in (Sampling(top_p=0.5), Sampling(top_k=2), Sampling(top_k=2, top_p=0.9)):
        assert (scores >= smallest_kept(scores, options)).tolist() == [[True] * 4]


def test_a_filtered_choice_does_not_depend_on_the_other_rows() -> None:
    options = Sampling(top_p=0.9, top_k=400)
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [9.0]] * 3)
    noise = drawn(6, 1000)
    together = choose(logits.clone(), noise, options)[0]
    assert together.tolist() == [int(choose(logits[i : i + 1].clone(), noise[i : i + 1], options)[0]) for i in range(6)]


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": 1.1}, {"stop": ("",)},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_options_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]
