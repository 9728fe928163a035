from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.glitch.tiny_copy import PLANTED, wordy_model
from workbench.core.codec import codec_of
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.glitch.searching.gradient import GradientOptions, climb, uncertainty
from workbench.glitch.verification.probing import SHORT
from workbench.glitch.verification.prompts import Template, prompt_set
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.model import Model

MODEL = wordy_model()
IDS = np.arange(20, 140)


def _short(model: Model) -> Template:
    return prompt_set(model, analyse(codec_of(model.tokenizer)), [SHORT], "raw").templates[0]


TEMPLATE = _short(MODEL)


def _entropy(model: Model, rows: torch.Tensor) -> torch.Tensor:
    """Entropy of the next token for input embeddings, written out."""
    p = model.hf(inputs_embeds=rows).logits[:, -1].double().softmax(1)
    return -(p * p.log()).sum(1)


def test_the_gradient_is_that_of_the_entropy_in_nats() -> None:
    for family in ("llama", "gemma3"):
        model = wordy_model(family)
        made = _short(model)
        tokens = torch.tensor([40, 77])
        found = uncertainty(model, made, tokens)
        rows = model.hf.get_input_embeddings()(made.fill(tokens)).detach()
        assert torch.allclose(found.entropy.double(), _entropy(model, rows), atol=1e-4)
        assert found.entropy.min() > 0 and found.gradient.shape == (2, model.d_model)
        step = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
        step = 1e-2 * step / step.norm()
        up, down = rows.clone(), rows.clone()
        up[:, made.slots] += step
        down[:, made.slots] -= step
        numeric = (_entropy(model, up) - _entropy(model, down)) / 2
        assert torch.allclose((found.gradient @ step).double(), numeric, rtol=0.05, atol=2e-5)
        assert not torch.allclose(numeric, torch.zeros(2, dtype=torch.float64), atol=1e-5)


def test_nothing_is_left_on_the_model() -> None:
    uncertainty(MODEL, TEMPLATE, torch.tensor([40]))
    assert all(p.grad is None and not p.requires_grad for p in MODEL.hf.parameters())


def test_the_walk_takes_the_neighbours_with_the_highest_first_order_entropy() -> None:
    options = GradientOptions(iterations=4, batch_size=5, neighbours=12)
    asked: list[list[int]] = []

    def oracle(ids: np.ndarray) -> np.ndarray:
        asked.append(ids.tolist())
        return np.isin(ids, PLANTED)

    climb(MODEL, TEMPLATE, IDS, oracle, options)
    E = MODEL.hf.get_input_embeddings().weight.detach()
    at = int(IDS[E[torch.from_numpy(IDS)].norm(dim=1).argmin()])
    assert at in asked[0]
    done: set[int] = set()
    for k, batch in enumerate(asked):
        left = [int(i) for i in IDS if i not in done]
        near = sorted(left, key=lambda i: -float(torch.cosine_similarity(E[i], E[at], dim=0)))[: options.neighbours]
        here = uncertainty(MODEL, TEMPLATE, torch.tensor([at]))
        score = {i: float(here.entropy[0] + (E[i] - E[at]) @ here.gradient[0]) for i in near}
        expected = sorted(near, key=lambda i: -score[i])[: options.batch_size]
        if k:
            assert set(batch) == set(expected)
        done |= set(batch)
        entropies = uncertainty(MODEL, TEMPLATE, torch.tensor(batch)).entropy
        at = batch[int(entropies.argmax())]
    assert len(asked) == 4 and len(done) == 20


def test_cost_is_counted_and_the_walk_ends_when_everything_is_tested() -> None:
    found = climb(MODEL, TEMPLATE, IDS[:30], lambda ids: ids % 2 == 0, GradientOptions(iterations=99))
    assert found.calls == 30 and sorted(found.asked) == IDS[:30].tolist()
    assert found.gradient_passes == 31 and found.n_found == 15
    again = climb(MODEL, TEMPLATE, IDS[:30], lambda ids: ids % 2 == 0, GradientOptions(iterations=99))
    assert np.array_equal(found.asked, again.asked)


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(DegenerateInputError, match="no tokens"):
        climb(MODEL, TEMPLATE, np.array([], dtype=np.int64), lambda ids: ids > 0)
    with pytest.raises(InvalidInputError, match="neighbours"):
        GradientOptions(batch_size=8, neighbours=4)
