from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workbench.errors import InvalidInputError
from workbench.models.sampling import Sampling, choose, inverse_cdf, smallest_kept, uniforms


def test_inverse_cdf_takes_the_token_whose_interval_holds_u() -> None:
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(1, 1000, generator=g) * (torch.rand(1, 1000, generator=g) > 0.3)
    us = torch.rand(4000, generator=g, dtype=torch.float64)
    got, total = inverse_cdf(weights.expand(4000, -1), us)
    torch.testing.assert_close(total, weights.sum(1).expand(4000))
    cdf = weights[0].double().cumsum(0)
    want = torch.searchsorted(cdf, us * cdf[-1], right=True)
    assert torch.equal(got, want)
    assert bool((weights[0, got] > 0).all())


@pytest.mark.parametrize("u", [0.0, 1.0 - 1e-16])
def test_the_ends_of_the_interval_never_choose_an_impossible_token(u: float) -> None:
    weights = torch.zeros(1, 700)
    weights[0, [3, 400]] = 1.0
    assert int(inverse_cdf(weights, torch.tensor([u], dtype=torch.float64))[0]) == (3 if u == 0 else 400)


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    n = 20000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, logprobs = choose(logits.expand(n, -1).clone(), u, Sampling())
    share = torch.bincount(ids, minlength=3) / n
    torch.testing.assert_close(share, logits.exp(), atol=0.015, rtol=0)
    torch.testing.assert_close(logprobs, logits[ids])
    cold, logprob_cold = choose(logits.expand(n, -1).clone(), u, Sampling(temperature=0.5))
    squared = logits.exp() ** 2 / (logits.exp() ** 2).sum()
    torch.testing.assert_close(torch.bincount(cold, minlength=3) / n, squared, atol=0.015, rtol=0)
    torch.testing.assert_close(logprob_cold, logits[cold])  # reported at temperature 1


def test_the_draws_of_a_row_depend_on_seed_and_row_number_only() -> None:
    rows = torch.arange(5)
    assert torch.equal(uniforms(rows, 7, 3)[2:4], uniforms(rows[2:4], 7, 3))
    assert not torch.equal(uniforms(rows, 7, 3), uniforms(rows, 7, 4))
    assert len(uniforms(torch.arange(200), 1, 0).unique()) == 200


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
    n, options = 20000, Sampling(temperature=0.8, **filters)  # type: ignore[arg-type]
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, logprobs = choose(logits.expand(n, -1).clone(), u, options)
    want = _warped(logits, options).softmax(-1)[0]
    assert not torch.allclose(want, (logits[0] / 0.8).softmax(-1), atol=0.05)  # the filter matters here
    torch.testing.assert_close(torch.bincount(ids, minlength=12) / n, want, atol=0.015, rtol=0)
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[ids])  # without the filter


def test_tokens_as_probable_as_the_last_one_kept_are_kept() -> None:
    scores = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    scores -= scores.amax()
    for options in (Sampling(top_p=0.5), Sampling(top_k=2), Sampling(top_k=2, top_p=0.9)):
        assert (scores >= smallest_kept(scores, options)).tolist() == [[True] * 4]


def test_a_filtered_choice_does_not_depend_on_the_other_rows() -> None:
    options = Sampling(top_p=0.9, top_k=400)
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.01], [9.0]] * 3)
    u = torch.rand(6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    together = choose(logits.clone(), u, options)[0]
    assert together.tolist() == [int(choose(logits[i : i + 1].clone(), u[i : i + 1], options)[0]) for i in range(6)]


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
