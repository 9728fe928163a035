from __future__ import annotations

import pytest
import torch

from tests.serve.toys import tiny_sae
from tests.tiny import D_MODEL, tiny_model
from workbench.hooks.sites import Site
from workbench.interventions.scopes import All
from workbench.serve.ask import FeatureEdit
from workbench.serve.edits import control, steered, words

SITE = Site.parse("resid_post.1")
EDITS = (
    FeatureEdit(feature=2, mode="ablate"),
    FeatureEdit(feature=5, strength=1.5),
    FeatureEdit(feature=3, mode="clamp", strength=0.7),
    FeatureEdit(feature=9, strength=-2.0),
    FeatureEdit(feature=4, mode="scale", strength=3.0),
)


@pytest.fixture(scope="module")
def h() -> torch.Tensor:
    return torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(5))


def _edited(intervention: object, h: torch.Tensor) -> torch.Tensor:
    for edit in intervention.edits:  # type: ignore[attr-defined]
        h = edit.op(h)
    return h


def test_each_mode_does_what_it_says(h: torch.Tensor) -> None:
    sae = tiny_sae(tiny_model())
    acts = sae.encode(h)
    for edit, new in (
        (FeatureEdit(feature=3, mode="clamp", strength=0.7), torch.full((6,), 0.7)),
        (FeatureEdit(feature=3, mode="scale", strength=3.0), 3 * acts[:, 3]),
        (FeatureEdit(feature=3, mode="ablate"), torch.zeros(6)),
        (FeatureEdit(feature=3, strength=1.5), acts[:, 3] + 1.5 * acts.amax(1)),
    ):
        expected = h + (new - acts[:, 3])[:, None] * sae.W_dec[3]
        torch.testing.assert_close(_edited(steered(sae, SITE, [edit], All()), h), expected)


def test_what_is_added_is_sized_by_the_unedited_token_whatever_the_order(h: torch.Tensor) -> None:
    sae = tiny_sae(tiny_model())
    added = h + sae.encode(h).amax(1, keepdim=True) * (1.5 * sae.W_dec[5] - 2.0 * sae.W_dec[9])
    torch.testing.assert_close(_edited(steered(sae, SITE, [e for e in EDITS if e.mode == "steer"], All()), h), added)
    whole = _edited(steered(sae, SITE, EDITS, All()), h)
    torch.testing.assert_close(_edited(steered(sae, SITE, EDITS[::-1], All()), h), whole)
    # A feature that is held is at its value after everything else was done.
    held = steered(sae, SITE, EDITS, All())
    assert [edit.op.name for edit in held.edits] == ["SAEAddMax", "SAEScale", "SAEClamp", "SAEAblate"]


def test_the_control_changes_every_token_by_the_same_norm_elsewhere(h: torch.Tensor) -> None:
    sae = tiny_sae(tiny_model())
    change = _edited(steered(sae, SITE, EDITS, All()), h) - h
    other = _edited(control(sae, SITE, EDITS, All(), 0), h) - h
    torch.testing.assert_close(other.norm(dim=1), change.norm(dim=1))
    assert (change.norm(dim=1).std() > 0.01).item(), "the norms differ from token to token, so a mean would be seen"
    assert torch.nn.functional.cosine_similarity(change, other).abs().max() < 0.95
    unit = other / other.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit, unit[:1].expand_as(unit))


def test_the_control_follows_the_seed(h: torch.Tensor) -> None:
    sae = tiny_sae(tiny_model())
    first, again, other, huge = (_edited(control(sae, SITE, EDITS, All(), seed), h) for seed in (0, 0, 1, -(10**30)))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.isfinite(huge).all()


def test_words_go_with_the_edits() -> None:
    assert words(EDITS) == ("steer #5 1.5 × a_max, steer #9 −2 × a_max", "scale #4 × 3", "clamp #3 at 0.7", "ablate #2")
