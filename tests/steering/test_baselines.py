"""Directions from labelled texts: known answers on planted data, signs, ReFT-r1 and the comparison of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.features.toys import byte_ids, random_sae
from tests.tiny import D_MODEL, tiny_model
from workbench.core.errors import DegenerateInputError, InvalidInputError, UnknownNameError
from workbench.interventions.intervention import Intervention
from workbench.interventions.ops import Add
from workbench.probes.linear import ProbeOptions, fit_probe
from workbench.steering.directions.classical import (
    METHODS,
    Concept,
    DirectionOptions,
    concept_directions,
    concept_tokens,
    leace_direction,
    oriented,
    pca_direction,
)
from workbench.steering.directions.concepts import best_feature, steer_concepts
from workbench.steering.directions.contrast import cosine, difference_of_means
from workbench.steering.directions.reft import ReftOptions, fit_reft, reft_edit
from workbench.steering.sweep.options import SteerOptions

AXIS = torch.eye(6)


def planted(shift: float = 3.0, spread: float = 2.0, n: int = 2000) -> tuple[Tensor, Tensor]:
    """Pairs whose difference is `shift` along axis 0, and noise of `spread` along axis 1."""
    g = torch.Generator().manual_seed(0)
    negatives = 0.1 * torch.randn(n, 6, generator=g)
    noise = spread * torch.randn(n, 1, generator=g) * AXIS[1]
    return negatives + shift * AXIS[0] + noise, negatives


def along(v: Tensor, axis: int) -> float:
    return float(cosine(v[None], AXIS[axis]))


def test_uncentred_pca_finds_the_mean_difference_and_centred_pca_the_spread() -> None:
    a, b = planted()
    assert along(oriented(pca_direction(a, b, centred=False), a, b), 0) > 0.99
    assert abs(along(pca_direction(a, b, centred=True), 1)) > 0.99
    assert along(difference_of_means(a, b), 0) > 0.99
    with pytest.raises(InvalidInputError, match="pairs"):
        pca_direction(a, b[:3], centred=True)


def test_leace_reads_past_the_noise_that_the_difference_of_means_catches() -> None:
    a, b = planted(shift=1.0, spread=8.0, n=20)
    assert along(leace_direction(a, b), 0) > 0.999 > 0.98 > along(difference_of_means(a, b), 0)


def test_leace_removes_what_a_probe_needs() -> None:
    """Along the read direction the classes differ; the oblique projection of LEACE leaves equal means."""
    a, b = planted()
    v, gap = leace_direction(a, b, shrinkage=1e-9).double(), difference_of_means(a, b).double()
    erased = [x.double() - (x.double() @ v)[:, None] * gap / (gap @ v) for x in (a, b)]
    assert float((erased[0].mean(0) - erased[1].mean(0)).norm()) < 1e-5


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_direction_points_at_the_positives(sign: float) -> None:
    a, b = planted()
    a, b = (a, b) if sign > 0 else (b, a)
    probe = fit_probe(torch.cat([a, b]), torch.tensor([1] * 2000 + [0] * 2000), "s", options=ProbeOptions(folds=0)).w
    for v in (difference_of_means(a, b), pca_direction(a, b, centred=False), leace_direction(a, b), probe):
        assert along(oriented(v, a, b), 0) * sign > 0
        assert torch.equal(oriented(v, a, b), oriented(-v, a, b)), "the sign does not depend on where it came from"
        assert float(oriented(v, a, b).norm()) == pytest.approx(1.0)
    with pytest.raises(DegenerateInputError, match="do not differ"):
        oriented(torch.zeros(6), a, b)


def test_special_tokens_are_no_concept_however_short_the_texts() -> None:
    positives = [torch.tensor([0, *([7] * 3), 8, 9, 10]) for _ in range(20)]
    negatives = [torch.tensor([0, *range(11, 51)]) for _ in range(20)]
    assert 0 in concept_tokens(positives, negatives, 60, k=6)
    found = concept_tokens(positives, negatives, 60, k=6, without=[0])
    assert set(found.tolist()) == {7, 8, 9, 10}, "tokens that the positive texts do not hold are none either"


def test_special_tokens_without_a_row_are_no_problem_and_texts_of_special_tokens_alone_are_refused() -> None:
    sides = [torch.tensor([0, 1, 1])], [torch.tensor([0, 2, 60])]
    assert concept_tokens(*sides, 50, k=1, without=[0, 60, 999]).tolist() == [1]
    with pytest.raises(DegenerateInputError, match="no tokens but special ones"):
        concept_tokens([torch.tensor([0, 0])], sides[1], 50, k=1, without=[0])


def test_concept_tokens_are_frequent_on_one_side_only() -> None:
    g = torch.Generator().manual_seed(0)
    common = [torch.randint(0, 30, (50,), generator=g) for _ in range(8)]
    positives = [torch.cat([row, torch.tensor([40, 40, 41])]) for row in common[:4]]
    found = concept_tokens(positives, [*common[4:], torch.tensor([45] * 9)], 50, k=2)
    assert found.tolist() == [40, 41]


def test_the_edit_of_reft_spares_what_is_not_kept() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[False, True, True, True, True], [False, False, True, True, True]])
    v = torch.tensor([0.0, 1.0, 0.0])
    edited, _ = reft_edit(x, v, keep, top=2)
    change = edited - x
    assert not change[~keep].any() and not change[..., [0, 2]].any()
    size = x[0, 1:, 1].relu().topk(2).values.mean()
    assert torch.allclose(change[0, 1:, 1], size.expand(4))


TEXTS = tuple(f"{a}zz {b}zzz {a}zz{b}" for a, b in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"))
PLAIN = tuple(f"{a}qr {b}stu {a}vw{b}" for a, b in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"))


def test_reft_lowers_the_held_out_loss_and_keeps_the_best_epoch() -> None:
    model = tiny_model()
    start = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    before = [p.clone() for p in model.hf.parameters()]
    options = ReftOptions(epochs=8, lr=0.1, patience=8)
    found = fit_reft(model, model.tokens(list(TEXTS)), "resid_post.1", start, options)
    assert min(found.losses) < found.losses[0] - 1e-3
    assert float(found.direction.norm()) == pytest.approx(1.0, abs=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(before, model.hf.parameters(), strict=True)), "the model is frozen"
    options = ReftOptions(epochs=12, lr=3.0, patience=1)
    stopped = fit_reft(model, model.tokens(list(TEXTS)), "resid_post.1", found.direction, options)
    assert len(stopped.losses) == 2, "training ends when it no longer helps"
    assert torch.allclose(stopped.direction, found.direction), "and what was there before is kept"
    with pytest.raises(DegenerateInputError, match="four or more"):
        fit_reft(model, model.tokens(list(TEXTS[:3])), "resid_post.1", start)


@pytest.fixture(scope="module")
def directions() -> Any:
    return concept_directions(tiny_model(), Concept("zz", TEXTS, PLAIN), "resid_post.1")


def test_every_method_gives_a_unit_direction_that_points_at_the_concept(directions: Any) -> None:
    model = tiny_model()
    assert tuple(directions) == tuple(METHODS)
    means = [model.mean(list(texts), "resid_post.1") for texts in (TEXTS, PLAIN)]
    for name, v in directions.items():
        assert float(v.norm()) == pytest.approx(1.0, abs=1e-4), name
        assert name in ("ReFT-r1", "centred PCA") or float(v @ (means[0] - means[1])) > 0, name


def test_adding_the_difference_of_means_makes_the_concept_likelier(directions: Any) -> None:
    model = tiny_model()
    v, token = directions["difference of means"], model.tokens("z").ids[0, -1]
    change = []
    for sign in (1.0, -1.0):
        with model.plan(Intervention.at("resid_post.1", Add(sign * 30 * v))):
            change.append(model.logits(list(PLAIN)).log_softmax(1)[:, token].mean())
    assert change[0] > change[1]


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="1 positives"):
        Concept("x", ("a",), PLAIN)
    with pytest.raises(UnknownNameError, match="PCA"):
        DirectionOptions(methods=("PCa",))


def test_methods_are_compared_at_equal_norm_beside_controls() -> None:
    model, sae = tiny_model(), random_sae()
    concepts = [Concept("zz", TEXTS, PLAIN), Concept("plain", PLAIN, TEXTS, tuple(byte_ids("qrstuvw")))]
    found = steer_concepts(
        model, concepts, "resid_post.1", (0.5, 4.0), ("ab", "cd", "ef", "gh"),
        SteerOptions(new_tokens=3, k=5, plain_texts=("some text",)),
        DirectionOptions(methods=("difference of means", "LEACE"), sae=sae),
    )  # fmt: skip
    names = ["difference of means", "LEACE", "best SAE feature", "random", "negated", "prompt", "unsteered"]
    assert [arm.name for arm in found.arms] == names
    for arm in found.written[:5]:
        for edit in arm.edits:
            assert edit.mean_norm == pytest.approx(edit.strength * found.settings["norm"], rel=1e-3), arm.name
    assert len(found.frame()) == 2 * 4 * (5 * 2 + 2)
    assert found._repr_html_() and found.to_json()["written"] == []
    assert found.arm("difference of means").log_odds.value > found.arm("negated").log_odds.value
    room = tiny_model("gpt2").n_positions
    assert room is not None
    with pytest.raises(InvalidInputError, match=f"{room}"):
        steer_concepts(
            tiny_model("gpt2"), concepts, "resid_post.1", (1.0,), ("ab", "cd", "ef", "gh"),
            SteerOptions(new_tokens=room - 12, k=5), DirectionOptions(methods=("difference of means",)),
        )  # fmt: skip
    with pytest.raises(InvalidInputError, match="each name once"):
        steer_concepts(model, concepts[:1] * 2, "resid_post.1", (1.0,), ("a", "b", "c", "d"))


def test_the_best_feature_is_active_on_the_positives_only() -> None:
    model, sae = tiny_model(), random_sae(k=40)
    v = concept_directions(
        model, Concept("zz", TEXTS, PLAIN), "resid_post.1", DirectionOptions(("difference of means",))
    )
    sae.W_enc.zero_()
    sae.W_enc[:, 7] = 5 * v["difference of means"]
    assert best_feature(model, sae, Concept("zz", TEXTS, PLAIN), "resid_post.1") == 7
