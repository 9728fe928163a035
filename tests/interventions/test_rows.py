"""Edits per row: taking rows, several interventions as rows of one pass, one op per row, and scaled strengths."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.interventions.builders import bad_sae, edited, sae_lens_sae
from tests.tiny import D_MODEL, FP32_LOGITS, tiny_model
from workbench.core.errors import DegenerateInputError, EditError, InvalidInputError, MismatchError, ShapeError
from workbench.core.tokens import TokenBatch
from workbench.interventions.chosen import Mask, Rows
from workbench.interventions.gates import ProbeGate, When
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op, Where
from workbench.interventions.ops import Add, AddScaled, Affine, LowRank, Map, PerRow, ProjectOut
from workbench.interventions.replacing import Ablate, Patch, Replace
from workbench.interventions.saes import SAEAblate, SAEAdd, SAEAddMax, SAEClamp, SAEScale
from workbench.interventions.scopes import Generated, Last, Pos, Scope
from workbench.interventions.shapes import Cap, ClampProjection, NormPreserve, Rotate, Threshold
from workbench.interventions.variants import variants
from workbench.models.model import Model

IDS = torch.arange(10, 28).view(3, 6)
V = torch.linspace(-1, 2, D_MODEL)
ROWS = 5


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def per_row_ops(rows: int = ROWS) -> list[Op]:
    """Every op with parameters for each row."""
    vectors, each = _random(rows, D_MODEL, seed=1), _random(rows, seed=2)
    features = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i))[:3] for i in range(rows)])
    sae = bad_sae()
    return [
        Add(vectors, each), Add(V, each), Add(vectors), AddScaled(vectors, each), ProjectOut(vectors[:, None]),
        ProjectOut(_random(rows, 2, D_MODEL)), Replace(vectors), Patch(_random(rows, 4, D_MODEL)),
        Patch(_random(rows, 4, D_MODEL), directions=V), Ablate("resample", _random(50, D_MODEL), seed=7),
        Ablate("resample", _random(50, D_MODEL), directions=V, seed=torch.arange(rows)),
        ClampProjection(vectors, each), ClampProjection(V, each, "min"), Cap(vectors, each), Threshold(vectors, each, each),
        Rotate(vectors, each), Rotate(None, each, plane=_random(2, D_MODEL)), NormPreserve(Add(vectors, each)),
        SAEClamp(sae, features, each), SAEClamp(sae, [1, 2, 3], _random(rows, 3)), SAEScale(sae, features, _random(rows, 3)),
        SAEAblate(sae, features), SAEAdd(sae, features, 2.0), SAEAddMax(sae, vectors, each),
        PerRow((Add(V), ProjectOut(V), Ablate("resample", _random(50, D_MODEL), seed=1)), torch.arange(rows) % 4 - 1),
        PerRow((Add(vectors), NormPreserve(Add(V, each))), torch.arange(rows) % 2),
    ]  # fmt: skip


@pytest.mark.parametrize("op", per_row_ops(), ids=lambda op: op.name)
def test_taking_rows_and_applying_commute_bit_by_bit(op: Op) -> None:
    h, where = 5 * _random(9, D_MODEL, seed=4), Where(torch.arange(9) % ROWS, torch.arange(9) % 4)
    whole = op(h, where)
    chosen = torch.tensor([3, 0, 3, 4])
    taken = op.take(chosen)
    for new, old in enumerate(chosen.tolist()):
        mine = where.rows == old
        again = taken(h[mine], Where(torch.full((int(mine.sum()),), new), where.positions[mine]))
        torch.testing.assert_close(again, whole[mine], atol=1e-5, rtol=1e-5)
    assert taken.n_rows == 4
    # The other rows' parameters would have given something else.
    other = op.take(torch.tensor([1, 2, 1, 2]))(h[:4], Where(torch.arange(4), where.positions[:4]))
    assert not torch.allclose(other, taken(h[:4], Where(torch.arange(4), where.positions[:4])), atol=1e-4)


def test_rows_whose_vector_is_zero_survive_being_taken_alone() -> None:
    vectors = torch.stack([V, torch.zeros(D_MODEL), V])
    model = tiny_model()
    clean = model.logits(IDS[1:2])
    with model.plan(Intervention.at("resid_post.1", Add(vectors, 3.0)).take(torch.tensor([1]))):
        assert torch.equal(model.logits(IDS[1:2]), clean)
    with model.plan(
        Intervention.at("resid_post.1", Add(vectors, 3.0))
    ):  # nor does the zero row have to change anything
        model.logits(IDS)
    with pytest.raises(DegenerateInputError, match="zero"):
        Add(torch.zeros(3, D_MODEL))


def _pairs() -> list[tuple[str, list[Intervention]]]:
    """Several interventions for three prompts: those that become one edit, and those that cannot."""
    sae = sae_lens_sae("topk")
    at, mask = Intervention.at, torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 2], mask[2, 4:] = True, True
    vectors = _random(3, D_MODEL, seed=1)
    site = "resid_post.1"
    probe = ProbeGate(V, at="resid_post.0")
    return [
        ("stacked", [at(site, Add(V, s)) for s in (0.0, 1.0, -4.0)]),
        ("stacked", [at(site, Add(vectors)), at(site, Add(V, 2.0))]),
        ("stacked", [at(site, Add(vectors[i])) + at("mlp_out.0", ProjectOut(vectors[i])) for i in range(2)]),
        ("stacked", [at(site, Ablate("resample", _R, seed=s), Pos(1, 3)) for s in (0, 5)]),
        ("stacked", [at(site, Rotate(None, t, plane=_PLANE)) for t in (0.5, -1.0)]),
        ("stacked", [at(site, SAEClamp(sae, [1, 2], 3.0)), at(site, SAEClamp(sae, [5, 7], 9.0))]),
        ("stacked", [at(site, SAEClamp(sae, [1, 2], torch.tensor([1.0, 2.0]))), at(site, SAEClamp(sae, [5, 7], torch.tensor([0.0, 4.0])))]),
        ("stacked", [at(site, SAEAddMax(sae, vectors[i], 2.0), Last()) for i in range(3)]),
        ("stacked", [at(site, Patch(_random(3, 6, D_MODEL, seed=i))) for i in range(2)]),
        ("stacked", [at(site, Threshold(V, 0.5, 3.0)), at(site, Threshold(V, 1.5, vectors[:, 0]))]),
        ("apart", [Intervention(), at(site, Add(V, 2.0))]),
        ("apart", [at(site, Add(V, 2.0)), at(site, ProjectOut(V)), at("mlp_out.0", Add(vectors), Pos(0))]),
        ("apart", [at(site, Add(V), Mask(mask, may_skip_rows=True)), at(site, Add(V), Last())]),
        ("apart", [at(site, Ablate("resample", _R, seed=3)), at(site, ProjectOut(V))]),
        ("apart", [at(site, NormPreserve(Add(vectors))), at(site, NormPreserve(Add(V, 3.0)))]),
        ("apart, shared", [at(site, NormPreserve(_SHARED)), at(site, NormPreserve(_SHARED))]),
        ("apart", [at(site, When(probe, Add(V, 5.0))), at(site, When(probe, Add(vectors)))]),
        ("apart", [at(site, PerRow((Add(V), ProjectOut(V)), torch.tensor([0, 1, -1]))), at(site, Add(V))]),
        ("apart", [at(site, SAEClamp(sae, [1, 2], 3.0)), at(site, SAEClamp(sae, [5], 9.0))]),
        ("apart", [at(site, Add(V)) + at(site, Add(V)), at(site, Add(V))]),
    ]  # fmt: skip


_R, _PLANE = _random(50, D_MODEL, seed=3), _random(2, D_MODEL, seed=5)
_SHARED = Add(_random(3, D_MODEL, seed=6), 4.0)


@pytest.mark.parametrize(("kind", "several"), _pairs(), ids=lambda value: value if isinstance(value, str) else "")
def test_variants_as_rows_of_one_pass_equal_single_runs(kind: str, several: list[Intervention]) -> None:
    model = tiny_model()
    together = variants(several, 3)
    n_edits = sum(len(one.edits) for one in several)
    assert len(together.edits) == (len(several[0].edits) if kind == "stacked" else n_edits)
    found = edited(model, IDS.repeat(len(several), 1), together).split(3)
    runs = [edited(model, IDS, one) for one in several]
    for got, wanted in zip(found, runs, strict=True):
        torch.testing.assert_close(got, wanted, atol=FP32_LOGITS, rtol=1e-4)
    if several[0].edits != several[1].edits and "shared" not in kind:
        assert not torch.allclose(runs[0], runs[1], atol=1e-3)


def test_variants_keep_the_model_that_they_were_made_for() -> None:
    mine = Intervention(Intervention.at("resid_post.1", Add(V)).edits, "a" * 12)
    for other in (Intervention.at("resid_post.1", Add(V, 2.0)), Intervention()):
        assert variants([mine, other], 2).made_for == "a" * 12
    with pytest.raises(MismatchError):
        variants([mine, Intervention((), "b" * 12)], 2)


def test_variants_for_another_number_of_prompts_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 rows; asked for 2 prompts"):
        variants([Intervention.at("resid_post.1", Add(_random(3, D_MODEL)))], 2)
    with pytest.raises(DegenerateInputError, match="no intervention"):
        variants([], 2)


def test_variants_generate_the_same_in_batches_that_hold_only_some_of_them() -> None:
    model = tiny_model()
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[2, 1:] = True
    several = [
        Intervention(), Intervention.at("resid_post.1", Add(V, 3.0), Generated()),
        Intervention.at("resid_post.0", Add(V, 9.0), Mask(mask, may_skip_rows=True)),
    ]  # fmt: skip
    batch = TokenBatch.of_rows(IDS.repeat(3, 1))
    whole = model.generate(batch, 5, intervention=variants(several, 3), temperature=0.0)
    split = model.generate(batch, 5, intervention=variants(several, 3), temperature=0.0, batch_size=2)
    assert [row.tolist() for row in whole.ids] == [row.tolist() for row in split.ids]
    assert [done.tokens for done in whole.report] == [done.tokens for done in split.report]
    for v, one in enumerate(several):
        alone = model.generate(TokenBatch.of_rows(IDS), 5, intervention=one, temperature=0.0)
        assert [row.tolist() for row in alone.ids] == [row.tolist() for row in whole.ids[3 * v : 3 * v + 3]]


def test_resampling_draws_by_prompt_and_position_whatever_the_batch() -> None:
    op = Ablate("resample", torch.arange(1000.0)[:, None].expand(-1, D_MODEL).clone(), seed=3)
    h = torch.zeros(40, D_MODEL)
    where = Where(torch.arange(40) // 8, torch.arange(40) % 8)
    drawn = op(h, where)[:, 0]
    assert len(drawn.unique()) > 35
    assert not torch.equal(drawn, Ablate("resample", op.reference, seed=4)(h, where)[:, 0])
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(op(h[shuffled], Where(where.rows[shuffled], where.positions[shuffled]))[:, 0], drawn[shuffled])
    third = op.take(torch.tensor([3]))(h[:8], Where(torch.zeros(8, dtype=torch.long), torch.arange(8)))[:, 0]
    assert torch.equal(third, drawn[24:32])


# One op per row.


def test_an_op_per_row_equals_each_op_alone_and_leaves_the_rest_untouched() -> None:
    model = tiny_model()
    ops = (Add(V, 2.0), ProjectOut(V), Map(lambda h: h.mul_(2)))
    clean = model.capture(IDS, ["resid_post.1"])["resid_post.1"]
    found = edited(model, IDS, Intervention.at("resid_post.1", PerRow(ops, torch.tensor([2, -1, 1]))))
    torch.testing.assert_close(found[0], 2 * clean[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], clean[1])
    torch.testing.assert_close(found[2], ProjectOut(V)(clean[2]), atol=1e-5, rtol=1e-5)


def test_an_op_per_row_passes_on_rows_strengths_and_parameters() -> None:
    a, b = torch.ones(D_MODEL, requires_grad=True), torch.ones(D_MODEL, requires_grad=True)
    op = PerRow((Add(a), NormPreserve(Add(b, 2.0))), torch.tensor([0, 1, 1]))
    assert [id(p) for p in op.parameters()] == [id(a), id(b)]
    h = _random(3, D_MODEL)
    with torch.no_grad():
        torch.testing.assert_close(op.scaled(3.0)(h)[0], h[0] + 3 * a)
        torch.testing.assert_close(op.scaled(3.0)(h)[2], NormPreserve(Add(b, 6.0))(h[2:])[0])
    with pytest.raises(ShapeError, match=r"for 3, 4 rows"):
        _ = PerRow((Add(torch.ones(4, D_MODEL)),), torch.tensor([0, 0, 0])).n_rows


# Strengths.


@pytest.mark.parametrize(
    ("op", "twice"),
    [
        (Add(V, 1.5), Add(V, 3.0)),
        (Add(V, torch.tensor([1.0, -2.0, 0.0])), Add(V, torch.tensor([2.0, -4.0, 0.0]))),
        (AddScaled(V, 0.5), AddScaled(V, 1.0)),
        (Threshold(V, 3.0, 2.0), Threshold(V, 3.0, 4.0)),
        (Rotate(V, 0.4), Rotate(V, 0.8)),
        (SAEAdd(bad_sae(), [1], 2.0), SAEAdd(bad_sae(), [1], 4.0)),
        (SAEAddMax(bad_sae(), V, 2.0), SAEAddMax(bad_sae(), V, 4.0)),
        (NormPreserve(Add(V, 1.5)), NormPreserve(Add(V, 3.0))),
        (When(ProbeGate(V), Add(V), Add(V, -1.0)), When(ProbeGate(V), Add(V, 2.0), Add(V, -2.0))),
    ],
    ids=lambda op: op.name,
)
def test_twice_an_intervention_has_twice_the_strength_and_zero_times_it_changes_nothing(op: Op, twice: Op) -> None:
    h = _random(3, D_MODEL)
    one = Intervention.at("resid_post.1", op)
    for doubled in (one * 2, 2 * one):
        assert torch.equal(doubled.edits[0].op(h), twice(h))
    assert torch.equal((one * 0).edits[0].op(h), h)
    assert not torch.equal(twice(h), op(h))
    model = tiny_model()
    clean = model.logits(IDS)
    with model.plan(one * 0):
        assert torch.equal(model.logits(IDS), clean)


def test_an_edit_without_a_strength_cannot_be_scaled() -> None:
    eye = torch.eye(D_MODEL)
    for op in (
        ProjectOut(V),
        Replace(V),
        Ablate(),
        Affine(eye),
        LowRank(eye[:1], eye[:1]),
        Cap(V, 1.0),
        SAEAblate(bad_sae(), [1]),
    ):
        with pytest.raises(InvalidInputError, match="no strength"):
            _ = (Intervention.at("resid_post.1", Add(V)) + Intervention.at("resid_post.1", op)) * 2


def _uses(model: Model, iv: Intervention, prompts: list[str]) -> dict[str, Callable[[], object]]:
    """Every way to run an intervention on prompts."""
    batch = model.tokens(prompts)

    def planned() -> None:
        with model.plan(iv):
            model.hf(**batch.hf())

    def cached() -> None:
        with model.plan(iv):
            model.hf.generate(**batch.hf(), max_new_tokens=2, do_sample=False)

    def resumed() -> None:
        run = model.segment(batch, "resid_post.0")
        with model.plan(iv) as plan:
            run.run(plan=plan)

    def said() -> None:
        model.session(intervention=iv, max_new_tokens=2).turn("a")

    return {
        "plan": planned, "hf.generate": cached, "segment": resumed, "session": said,
        "generate": lambda: model.generate(batch, 3, intervention=iv),
        "generate in parts": lambda: model.generate(batch, 3, intervention=iv, batch_size=1),
        "variants": lambda: model.variants(batch, [Intervention(), iv]),
    }  # fmt: skip


def test_parameters_for_other_rows_than_there_are_prompts_are_refused_everywhere() -> None:
    model = tiny_model()
    three = Intervention.at("resid_post.1", Add(_random(3, D_MODEL)))
    for prompts in (["abc"], ["abc", "abd"], ["abc"] * 4):
        for how, run in _uses(model, three, prompts).items():
            with pytest.raises(ShapeError, match="for 3 rows"):
                run()
                pytest.fail(how)
    one = Intervention.at("resid_post.1", Add(_random(1, D_MODEL)))
    for run in _uses(model, one, ["abc", "abd"]).values():
        run()
    alone = Intervention.at("resid_post.1", Add(_random(1, D_MODEL)[0]))
    found = [model.generate(["abc", "abd"], 4, intervention=iv).texts for iv in (one, alone)]
    assert found[0] == found[1]


def test_parameters_per_row_under_embeddings_are_those_of_the_rows() -> None:
    model, two = tiny_model(), Intervention.at("resid_post.1", Add(_random(2, D_MODEL)))
    x = _random(4, 3, D_MODEL)
    with pytest.raises(ShapeError, match="not each row repeated 2 times"), model.plan(two):
        model.hf(inputs_embeds=x)
    with model.plan(two):
        model.hf(inputs_embeds=x[:2].repeat_interleave(2, 0))


@pytest.mark.parametrize("scope", [Pos(4), Pos(-5) & Rows(torch.tensor([True, True])), "mask"], ids=str)
def test_a_row_without_the_positions_that_were_asked_for_is_named(scope: Scope | str) -> None:
    model, prompts = tiny_model(), ["abcdef", "ab"]
    if isinstance(scope, str):
        mask = torch.zeros(2, 6, dtype=torch.bool)
        mask[0, 3], mask[1, 2] = True, True  # the second is padding there
        scope = Mask(mask)
    iv = Intervention.at("resid_post.1", Add(V), scope)
    both = _uses(model, iv, prompts)
    for how in ("plan", "variants", "segment"):
        with pytest.raises(EditError, match=r"row [13] has no token there"):
            both[how]()
            pytest.fail(how)
    with pytest.raises(DegenerateInputError, match="no token in row 1"):
        Mask(torch.tensor([[True], [False]]))


def test_a_row_that_is_named_has_its_number_in_the_whole_job_and_rows_that_ended_are_excused() -> None:
    model = tiny_model()
    iv = Intervention.at("resid_post.1", Add(V), Pos(-5))
    with pytest.raises(EditError, match="row 2 has no token there"):
        model.generate(["abcdef", "abcdef", "ab"], 3, intervention=iv, batch_size=1)
    with pytest.raises(EditError, match="row 1 has no token there"), model.plan(iv):
        model.logits(["abcdef", "ab"])
        model.logits(["abcdef", "abcdeg"])
