"""Output scores of the same directions at every layer."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError, UnknownSiteError
from workbench.features.scores.logit_lens import lens_tokens
from workbench.features.scores.output_score import rank_score
from workbench.features.scores.profile import depth_scores
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.interventions.scopes import Last

PROMPT = "one day"


def test_scores_are_those_of_hooked_forward_passes() -> None:
    model = tiny_model()
    directions = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(1)) * 7
    found = depth_scores(model, directions, share=0.8, prompt=PROMPT, n_random=5)
    assert found.layers == tuple(range(model.n_layers))
    assert found.score.shape == (model.n_layers, 3) and found.random.shape == (model.n_layers, 5)
    lens = lens_tokens(model, directions).ids
    for layer in found.layers:
        x = model.capture(PROMPT, [f"resid_post.{layer}"])[f"resid_post.{layer}"][0, -1]
        for i, direction in enumerate(directions):
            edit = Intervention.at(f"resid_post.{layer}", Add(0.8 * x.norm() * direction / direction.norm()), Last())
            with model.plan(edit):
                logits = model.logits(PROMPT)
            expected = rank_score(logits.float(), lens[i : i + 1])[0]
            torch.testing.assert_close(found.score[layer, i : i + 1], expected, atol=1e-5, rtol=1e-4)


def test_length_does_not_matter_and_layers_can_be_chosen() -> None:
    model = tiny_model()
    directions = torch.eye(model.d_model)[:2]
    found = depth_scores(model, directions, layers=(1,), prompt=PROMPT)
    longer = depth_scores(model, 9 * directions, layers=(1,), prompt=PROMPT)
    assert found.layers == (1,)
    torch.testing.assert_close(found.score, longer.score)


def test_wrong_input_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ShapeError, match="width"):
        depth_scores(model, torch.ones(1, model.d_model + 1))
    with pytest.raises(InvalidInputError, match="share"):
        depth_scores(model, torch.ones(1, model.d_model), share=0.0)
    with pytest.raises(DegenerateInputError):
        depth_scores(model, torch.zeros(1, model.d_model))
    with pytest.raises(UnknownSiteError):
        depth_scores(model, torch.ones(1, model.d_model), layers=(99,))
