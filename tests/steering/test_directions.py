from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from workbench.controls.directions import random_directions
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.interventions.ops import Add, ProjectOut
from workbench.steering.directions.contrast import (
    TwoByTwo,
    cosine,
    difference_of_means,
    directions_by_position,
    mean_activations,
)

TEXTS = ["a long first text", "short", "the third"]


def test_difference_of_means_finds_the_concept_axis_not_the_loudest_one() -> None:
    # pair differences 3 e1 + 2 z e2: the variance lies along e2, the mean along e1
    z = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    base = torch.randn(4000, 4, generator=torch.Generator().manual_seed(1))
    shift = torch.stack([torch.zeros(4000), torch.full((4000,), 3.0), 2 * z, torch.zeros(4000)], dim=1)
    found = difference_of_means(base + shift, base)
    assert cosine(found, torch.tensor([0.0, 1.0, 0.0, 0.0])) > 0.99
    assert found[1] == pytest.approx(3.0, abs=1e-5), "positive side minus negative side"


def test_difference_of_means_of_small_changes_on_large_activations() -> None:
    base = torch.full((1000, 1), 25_000.0)
    assert difference_of_means(base + 0.25, base).item() == pytest.approx(0.25)


def test_sides_must_fit() -> None:
    with pytest.raises(ShapeError, match="same site"):
        difference_of_means(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(DegenerateInputError, match="0 positive"):
        difference_of_means(torch.zeros(0, 3), torch.zeros(2, 3))


def test_random_directions_are_orthogonal_of_equal_norm_and_different() -> None:
    reference = torch.randn(64, generator=torch.Generator().manual_seed(3)) * 40
    found = random_directions(reference, 5, seed=1, orthogonal=True)
    assert torch.allclose(found.norm(dim=1), reference.norm().expand(5), rtol=1e-5)
    assert cosine(found, reference).abs().max() < 1e-6
    assert (cosine(found[1:], found[0]).abs() < 0.6).all()
    assert torch.equal(found, random_directions(reference, 5, seed=1, orthogonal=True))
    assert not torch.equal(found, random_directions(reference, 5, seed=2, orthogonal=True))


def test_random_directions_need_a_reference() -> None:
    with pytest.raises(DegenerateInputError, match="0 to 0"):
        random_directions(torch.zeros(4), 1, orthogonal=True)


def test_mean_activations_average_the_chosen_tokens_of_each_row() -> None:
    model = tiny_model()
    batch = model.tokens(TEXTS)
    where = torch.zeros_like(batch.mask)
    where[:, -2:] = True
    found = mean_activations(model, batch, ["resid_post.1"], where)["resid_post.1"]
    acts = model.capture(batch, ["resid_post.1"])["resid_post.1"]
    assert torch.allclose(found, acts[:, -2:].mean(1), atol=1e-5)
    assert not torch.allclose(found, acts[:, -3:-1].mean(1), atol=1e-2)


def test_mean_activations_leave_padding_out() -> None:
    model = tiny_model()
    batch = model.tokens(TEXTS)
    found = mean_activations(model, batch, ["resid_post.0"], torch.ones_like(batch.mask))["resid_post.0"]
    for i, text in enumerate(TEXTS):
        alone = model.capture(model.tokens(text), ["resid_post.0"])["resid_post.0"][0].mean(0)
        assert torch.allclose(found[i], alone, atol=1e-4)


def test_mean_activations_need_a_token_in_every_row() -> None:
    model = tiny_model()
    batch = model.tokens(TEXTS)
    where = torch.ones_like(batch.mask)
    where[1] = False
    with pytest.raises(DegenerateInputError, match=r"rows \[1\]"):
        mean_activations(model, batch, ["resid_post.0"], where)


def test_directions_by_position_read_the_position_and_site_named() -> None:
    model = tiny_model()
    positive, negative = model.tokens(TEXTS), model.tokens(["another", "one more text"])
    found = directions_by_position(model, positive, negative, ["resid_post.0", "resid_post.2"], (-1, -3))
    for site in found:
        yes, no = (model.capture(batch, [site])[site] for batch in (positive, negative))
        assert torch.allclose(found[site][0], yes[:, -1].mean(0) - no[:, -1].mean(0), atol=1e-5)
        assert torch.allclose(found[site][1], yes[:, -3].mean(0) - no[:, -3].mean(0), atol=1e-5)


@pytest.mark.parametrize("position", [0, -6])
def test_positions_outside_the_shortest_row_are_refused(position: int) -> None:
    model = tiny_model()
    with pytest.raises(InvalidInputError, match="shortest row has 5 tokens"):
        directions_by_position(model, model.tokens(TEXTS), model.tokens(TEXTS), ["resid_post.0"], (position,))


def test_two_by_two_tells_reply_from_topic() -> None:
    reply, topic, both = torch.eye(3)
    noise = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    effects = TwoByTwo.of(noise + 4 * reply + 2 * topic + both, noise + 2 * topic, noise + 4 * reply, noise)
    # half of what refusing a harmful prompt adds counts for each main effect
    assert torch.allclose(effects.reply, 4 * reply + 0.5 * both, atol=1e-5)
    assert torch.allclose(effects.prompt, 2 * topic + 0.5 * both, atol=1e-5)
    assert torch.allclose(effects.interaction, both, atol=1e-5)
    assert torch.allclose(effects.simple, effects.reply + effects.prompt, atol=1e-5)


def test_removing_a_direction_is_idempotent_even_and_ordered() -> None:
    r = torch.tensor([3.0, 4.0, 0.0])
    h = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)) * 100
    once = ProjectOut(r)(h)
    assert (once @ (r / r.norm())).abs().max() < 1e-5 * h.norm(dim=1).max()
    assert torch.allclose(ProjectOut(r)(once), once, atol=1e-4)
    assert torch.allclose(ProjectOut(-5 * r)(h), once, atol=1e-4)
    added_last = Add(r, 2.0)(once)
    removed_last = ProjectOut(r)(Add(r, 2.0)(h))
    assert torch.allclose(added_last @ r, torch.full((7,), 50.0), atol=1e-2)
    assert torch.allclose(removed_last @ r, torch.zeros(7), atol=1e-2)
    with pytest.raises(DegenerateInputError):
        ProjectOut(torch.zeros(3))
