from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from circuits.doctor.doctor import DoctorOptions
from circuits.doctor.report import DoctorReport, judged
from circuits.shift.collateral import collateral
from circuits.shift.deciders import FeatureDossier, LexiconDecider, Node, OracleDecider, StatisticsDecider, Verdict
from circuits.shift.editcheck import pooled_by_hooks, require_same_edit
from circuits.shift.evidence import Reader, token_evidence
from circuits.shift.methods import Scorer, words_deleted
from circuits.shift.reading import ShiftOptions
from circuits.shift.shift_report import ShiftReport
from circuits.shift.study import shift
from circuits.shift.task import Prediction, ShiftMethod
from tests.circuits.planted import (
    LABEL_FEATURES,
    OPPOSING,
    SITE,
    SPURIOUS_FEATURES,
    PlantedSAE,
    planted_model,
    planted_sae,
    planted_task,
)
from tests.interventions.builders import ARCHITECTURES, NORMALISATIONS, sae_lens_sae
from tests.tiny import n_hooks, tiny_model
from workbench.bases.base import Basis
from workbench.bases.sae import as_basis
from workbench.controls.methods import Method
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import DegenerateInputError, EditError, InvalidInputError, MismatchError, ShapeError
from workbench.core.stats import Estimate, sample_mean
from workbench.core.tokens import TokenBatch
from workbench.judges import Answer, Question
from workbench.models.model import Model

OPTIONS = ShiftOptions(top_k=10, random_draws=4)


@dataclass(frozen=True)
class Contrary:
    """Calls exactly the label's own features spurious."""

    name = "contrary"
    information = "the opposite of the truth"
    is_oracle = False

    def __call__(self, dossier: FeatureDossier) -> Verdict:
        assert dossier.balanced is None
        wrong = dossier.node.feature in LABEL_FEATURES
        return Verdict(dossier.node, "spurious" if wrong else "intended", 0.0, "planted")


@functools.cache
def _report(probe_site: str = SITE) -> ShiftReport:
    text = TokenBatch.of_rows(torch.randint(2, 250, (6, 12), generator=torch.Generator().manual_seed(0)))
    doctor = DoctorOptions(inputs=8, items=6, sites=1, steps=(4, 8), checks=(1, 3, 7, 8, 11))
    options = replace(OPTIONS, probe_site=probe_site, doctor=doctor)
    return shift(planted_model(), {SITE: planted_sae()}, planted_task(), options=options, plain_text=text)


def test_the_effects_that_candidates_are_ranked_by_are_examined() -> None:
    exact, estimated = _report(), _report("resid_post.2")
    for report in (exact, estimated):
        assert report.doctor is not None and {1, 7, 8} <= set(report.doctor.ran)
        assert f"Attribution doctor: {report.verdict}." in report.findings()
    assert exact.doctor is not None and estimated.doctor is not None
    assert not {1, 7, 8} & set(exact.doctor.numbers), exact.doctor.failed
    reasons = {check.number: check.why for check in exact.doctor.checks if check.outcome == "not applicable"}
    assert "measured effects" in reasons[3] and {3, 11} <= set(estimated.doctor.ran)
    marked = exact.stamped(DoctorReport(what="", checks=(judged(9, "mass", 0.1, 0.8),)))
    assert any("FAILED: planted truth" in getattr(block, "title", "") for block in marked.section().blocks)


def _ablated(report: ShiftReport) -> set[int]:
    return {int(v.feature.rpartition("/")[2]) for v in report.verdicts if v.decision == "spurious"}


@pytest.mark.parametrize("probe_site", [SITE, "resid_post.2"])
def test_shift_picks_the_attribute_and_reaches_the_oracle(probe_site: str) -> None:
    report = _report(probe_site)
    original, repaired, retrained, oracle = (
        report.method(name) for name in ("original", "SHIFT", "SHIFT + retrain", "oracle probe")
    )
    assert original.spurious.value > 0.8 and original.label.value < 0.7
    assert _ablated(report) == SPURIOUS_FEATURES
    assert retrained.label.value >= oracle.label.value - 0.01 and not retrained.spurious.excludes(0.5)
    if probe_site == SITE:
        assert repaired.label.value >= oracle.label.value - 0.01 and not repaired.spurious.excludes(0.5)
    else:  # a block in between mixes the ablation into what the old probe reads; the new probe undoes that
        assert repaired.label.value >= original.label.value + 0.2
    assert report.method("skyline").label == repaired.label


def test_random_features_change_nothing_and_have_their_own_interval() -> None:
    report = _report()
    assert report.method("random features").label.value == pytest.approx(
        report.method("original").label.value, abs=0.06
    )
    assert report.method("random features").n_features == len(SPURIOUS_FEATURES)
    gain = next(c for c in report.comparisons if (c.better, c.other) == ("SHIFT", "random features"))
    assert gain.label.low > 0.2 and gain.conflict.value > gain.label.value


def test_ablating_the_label_features_harms() -> None:
    report = shift(planted_model(), {SITE: planted_sae()}, planted_task(), Contrary(), options=OPTIONS)
    assert _ablated(report) == LABEL_FEATURES
    assert report.method("SHIFT").label.value < report.method("original").label.value - 0.05
    assert report.method("SHIFT").spurious.value > report.method("original").spurious.value


def test_a_feature_that_opposes_the_label_is_no_candidate() -> None:
    judged = {int(v.feature.rpartition("/")[2]) for v in _report().verdicts}
    assert judged >= LABEL_FEATURES | SPURIOUS_FEATURES
    assert OPPOSING not in judged
    assert all(v.effect > 0 for v in _report().verdicts)


def test_judges_agree_with_the_truth_and_say_what_they_use() -> None:
    model, bases, task = planted_model(), {SITE: planted_sae()}, planted_task()
    for judge in (LexiconDecider(), OracleDecider()):
        report = shift(model, bases, task, judge, options=OPTIONS)
        assert _ablated(report) & (LABEL_FEATURES | SPURIOUS_FEATURES) == SPURIOUS_FEATURES
        assert report.judge_information == judge.information
    assert not StatisticsDecider().is_oracle
    assert next(v for v in _report().verdicts if v.feature == f"{SITE}/2").spurious_share == pytest.approx(1.0)


class Asked:
    """Says yes where most of the words are on the list of the names that are asked about."""

    name = "reader"

    def __init__(self, says: float | None = None) -> None:
        self.says, self.asked = says, 0

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += len(questions)
        return [Answer(value=self._one(question.text), judge=self.name) for question in questions]

    def _one(self, text: str) -> float | None:
        if self.says is not None:
            return self.says
        task = planted_task()
        own = task.spurious_words if f"either {task.spurious_names[0]} or" in text else task.target_words
        words = text.split("words:\n")[1].split("\n\n")[0].split(", ")
        return float(np.mean([word in own for word in words]))


def test_a_judge_that_can_read_is_asked_about_tokens_and_one_that_can_not_decides_nothing() -> None:
    model, bases, task = planted_model(), {SITE: planted_sae()}, planted_task()
    report = shift(model, bases, task, Asked(), options=OPTIONS)
    assert _ablated(report) & (LABEL_FEATURES | SPURIOUS_FEATURES) == SPURIOUS_FEATURES
    assert report.judge == "reader" and "no label of a row" in report.judge_information
    blind = Asked(says=0.7)
    refused = shift(model, bases, task, blind, options=OPTIONS)
    assert not _ablated(refused) and {v.decision for v in refused.verdicts} == {"unsure"}
    assert all("judge not competent: fails on attribute (0 " in v.why for v in refused.verdicts)
    assert blind.asked == 2 * 12 * 2, "who is refused is not asked about features"


def test_the_oracle_judge_needs_what_others_do_not_get() -> None:
    acts = np.array([1.0, 0.0])
    dossier = FeatureDossier(
        node=Node(SITE, 0),
        effect=1.0,
        acts=acts,
        swapped=acts,
        label=acts,
        top_tokens=(),
        spurious_share=0.0,
        target_share=0.0,
        n_tokens=10,
    )
    with pytest.raises(MismatchError, match="balanced"):
        OracleDecider()(dossier)


def test_statistics_judge_keeps_a_feature_that_does_not_move_and_leaves_rare_ones() -> None:
    generator = np.random.default_rng(0)
    label = np.tile([0.0, 1.0], 40)
    noise = 0.1 * generator.standard_normal(80)
    attribute = FeatureDossier(
        node=Node(SITE, 0),
        effect=1.0,
        acts=label + noise,
        swapped=1 - label + noise,
        label=label,
        top_tokens=(),
        spurious_share=0.0,
        target_share=0.0,
        n_tokens=99,
    )
    wanted = replace(attribute, swapped=attribute.acts)
    judge = StatisticsDecider()
    assert judge(attribute).decision == "spurious"
    assert judge(wanted).decision == "intended"
    assert judge(replace(attribute, n_tokens=2)).decision == "unsure"
    # fires on label 0 instead: the same verdict, whatever side the feature is on
    assert judge(replace(attribute, acts=1 - attribute.acts, swapped=1 - attribute.swapped)).decision == "spurious"


def test_pooled_ablation_equals_the_edit_run_through_the_model() -> None:
    model, task = planted_model(), planted_task()
    reader = Reader.fitted(model, {SITE: as_basis(planted_sae())}, SITE, task.train.texts, batch_size=7)
    texts = tuple(task.test.texts[:15]) + ("a much longer text with M and T",)
    pooled = reader.read(texts, "test")
    nodes = [Node(SITE, f) for f in (0, 2, 3)]
    by_model, reports = reader.ablated_by_model(pooled, nodes)
    torch.testing.assert_close(reader.ablated(pooled, nodes), by_model, atol=1e-5, rtol=1e-4)
    assert (by_model - pooled.x).norm() > 0.1
    assert sum(report.tokens for report in reports) == pooled.n_tokens
    assert _report().edit_check.difference < 1e-5


def test_top_tokens_and_shares_are_those_of_the_letters() -> None:
    model, task = planted_model(), planted_task()
    reader = Reader.fitted(model, {SITE: as_basis(planted_sae())}, SITE, task.train.texts, batch_size=7)
    words = (task.spurious_words, task.target_words)
    found = token_evidence(
        reader, [*task.train.texts[:9], "a longer one with T"], [Node(SITE, f) for f in (0, 2)], words
    )
    assert found[Node(SITE, 0)].top_tokens[0][0] == "T"
    assert found[Node(SITE, 2)].top_tokens[0][0] == "M"
    assert found[Node(SITE, 2)].n_tokens == 5
    assert (found[Node(SITE, 2)].spurious_share, found[Node(SITE, 2)].target_share) == (1.0, 0.0)


def test_two_runs_give_the_same_report_and_leave_no_trace() -> None:
    model, sae = planted_model(), planted_sae()
    weights = [p.clone() for p in model.hf.parameters()]
    first = shift(model, {SITE: sae}, planted_task(), options=OPTIONS)
    second = shift(model, {"blocks.1.hook_resid_post": sae}, planted_task(), options=OPTIONS)
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(weights, model.hf.parameters(), strict=True))
    assert torch.equal(sae.W_dec, planted_sae().W_dec)


def test_report_is_json_shows_itself_and_names_its_controls() -> None:
    report = _report()
    json.dumps(report.to_json())
    section = report.section()
    assert {"original.label", "shift.label", "random_features.label", "oracle_probe.worst"} <= set(section.metrics)
    assert any("SHIFT beats random features" in line for line in report.findings())
    assert report.collateral is not None and report.collateral.shift.n == 6
    assert all(m.label.n == 200 and m.worst.n == 50 for m in report.methods)


def test_the_headline_names_a_rival_that_is_better_by_its_paired_difference_alone() -> None:
    report = _report()
    subject, rival = "SHIFT + retrain", "swap direction removed"
    rivals = {row.name for row in report.methods if row.role == "rival"}
    assert {c.other for c in report.comparisons if c.better == subject} >= rivals > {rival}
    higher = replace(report.method(subject).label, value=1.0)
    methods = tuple(replace(row, label=higher) if row.name == rival else row for row in report.methods)

    def told(low: float, high: float) -> ShiftReport:
        difference = Estimate((low + high) / 2, low, high, 40, "t", "texts")
        comparisons = tuple(
            replace(c, label=difference) if (c.better, c.other) == (subject, rival) else c for c in report.comparisons
        )
        return replace(report, methods=methods, comparisons=comparisons)

    ahead, level, behind = told(-0.2, -0.1), told(-0.2, 0.1), told(0.1, 0.2)
    assert f"; {rival} had a higher accuracy." in ahead.headline().sentence
    assert f"ahead of SHIFT + retrain: {rival}." in "".join(ahead.findings())
    for report in (level, behind):
        assert rival not in report.headline().sentence and "ahead of" not in "".join(report.findings())


def test_nothing_judged_spurious_is_said() -> None:
    report = shift(planted_model(), {SITE: planted_sae()}, planted_task(), StatisticsDecider(z=1e9), options=OPTIONS)
    assert report.n_spurious == 0
    assert "nothing was ablated" in " ".join(report.findings())
    assert report.method("SHIFT").label == report.method("original").label


def test_an_sae_of_another_site_model_or_width_is_refused() -> None:
    model, task = planted_model(), planted_task()
    for metadata, message in (
        ({"hook_name": "blocks.0.hook_resid_post"}, "trained at resid_post.0"),
        ({"model_fingerprint": "0123456789ab"}, "was trained on model 0123456789ab"),
        ({"hook_name": SITE, "hook_name_out": "mlp_out.1"}, "transcoder: it reads .* and writes mlp_out.1"),
    ):
        sae = planted_sae()
        sae.cfg = SimpleNamespace(metadata=SimpleNamespace(**metadata))
        with pytest.raises(MismatchError, match=message):
            shift(model, {SITE: sae}, task)
    with pytest.raises(ShapeError, match="width"):
        shift(model, {SITE: replace(planted_sae(), W_dec=torch.zeros(15, 3))}, task)
    with pytest.raises(MismatchError, match="below the SAE"):
        shift(model, {SITE: planted_sae()}, task, options=ShiftOptions(probe_site="resid_post.0"))


def _several(where: str) -> tuple[Model, dict[str, Basis], str]:
    """A tiny model with one SAE at the probe's site, one below it, or one in each of three layers."""
    sites = {"own site": ["resid_post.1"], "below": ["mlp_out.1"], "several": ["z.0", "resid_mid.1", "resid_pre.2"]}
    model = tiny_model()
    saes = {
        site: as_basis(sae_lens_sae("jumprelu", "layer_norm" if i else "none", d_in=model.width(site)))
        for i, site in enumerate(sites[where])
    }
    return model, saes, "resid_post.1" if where == "own site" else "resid_post.2"


def _both_ways(model: Model, bases: dict[str, Basis], probe_site: str) -> tuple[torch.Tensor, ...]:
    """Ablated by the reader and by plain hooks, and unedited."""
    texts = ("abcdefgh", "ijk", "lmnopq rs")
    reader = Reader(model, bases, probe_site, TokenPolicy())
    pooled = reader.read(texts, "test")
    nodes = [Node(site, f) for site in bases for f in range(0, 40, 2)]
    ablations = {site: (basis.sae, range(0, 40, 2)) for site, basis in bases.items()}
    batch = model.tokens(list(texts))
    again = pooled_by_hooks(model, batch, TokenPolicy.of_batch(batch).kept(batch), ablations, probe_site)
    return reader.ablated(pooled, nodes), again, pooled.x


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_computed_ablation_equals_plain_hooks_for_every_architecture(architecture: str, normalisation: str) -> None:
    model = tiny_model()
    computed, again, x = _both_ways(model, {SITE: as_basis(sae_lens_sae(architecture, normalisation))}, SITE)
    size = (again - x).norm()
    assert size > 0.05 * x.norm()
    assert (computed - again).norm() < 1e-5 * size
    assert n_hooks(model.hf) == 0


@pytest.mark.parametrize("where", ["own site", "below", "several"])
def test_ablation_through_the_model_equals_plain_hooks_wherever_the_saes_stand(where: str) -> None:
    model, bases, probe_site = _several(where)
    ablated, again, x = _both_ways(model, bases, probe_site)
    difference, allowed = require_same_edit(ablated, again, x, [torch.float32])
    assert difference < 1e-5 < allowed
    for wrong in (x, 2 * again - x, again + 0.1 * (again - x).roll(1, dims=0), again * float("nan")):
        with pytest.raises(EditError, match="plain hooks"):
            require_same_edit(wrong, again, x, [torch.float32])


@pytest.mark.parametrize("where", ["own site", "several"])
def test_rounding_alone_does_not_end_a_study_in_bfloat16(where: str) -> None:
    model, bases, probe_site = _several(where)
    model.hf.to(torch.bfloat16)
    bases = {site: as_basis(basis.sae.to(dtype=torch.bfloat16)) for site, basis in bases.items()}
    ablated, again, x = _both_ways(model, bases, probe_site)
    difference, allowed = require_same_edit(ablated, again, x, [torch.float32, torch.bfloat16])
    assert 1e-4 < difference < allowed < 0.3
    with pytest.raises(EditError, match="plain hooks"):
        require_same_edit(x + 0.5 * (ablated - x), again, x, [torch.bfloat16])


class Louder(PlantedSAE):
    """Decodes to twice what its rows say."""

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        return 2 * acts @ self.W_dec + self.b_dec


@pytest.mark.parametrize("probe_site", [SITE, "resid_post.2"])
def test_a_study_whose_ablation_is_not_that_of_the_sae_ends(probe_site: str) -> None:
    sae = Louder(**vars(planted_sae()))
    with pytest.raises(EditError, match="differs from the one made by plain hooks"):
        shift(planted_model(), {SITE: sae}, planted_task(20, 8), options=replace(OPTIONS, probe_site=probe_site))


def test_random_controls_have_an_interval_over_all_draws() -> None:
    report = _report()
    row, collateral = report.method("random features"), report.collateral
    assert row.over_draws is not None and collateral is not None
    assert row.over_draws.label.value == pytest.approx(row.label.value)
    assert (row.over_draws.label.n, row.over_draws.label.unit) == (OPTIONS.random_draws, "draws")
    assert report.method("SHIFT").over_draws is None
    gain = next(c for c in report.comparisons if (c.better, c.other) == ("SHIFT", "random features"))
    assert gain.over_draws is not None and gain.over_draws.value == pytest.approx(gain.label.value)
    assert collateral.random_over_draws.value == pytest.approx(collateral.random.value)
    assert (collateral.random.n, collateral.random_over_draws.n) == (6, OPTIONS.random_draws)


def test_one_draw_says_nothing_about_other_draws() -> None:
    scorer = Scorer(planted_task())
    right = torch.tensor(planted_task().test.label)

    def add(name: str, *draws: torch.Tensor, is_random: bool = False) -> None:
        method: ShiftMethod = Method(name=name, information="", run=lambda _: Prediction(()))
        scorer.add(method, Prediction(draws, 1, is_random))

    add("better", right)
    add("random", 1 - right, is_random=True)
    assert scorer.compare("better", "random").label.excludes(0.0)
    assert not scorer.compare("better", "random").excludes_zero
    # two draws, 0 % and 100 % right: the rows agree, the draws do not
    add("two", right, 1 - right, is_random=True)
    over = scorer.rows[-1].over_draws
    assert over is not None and over.label.value == 0.5
    assert 0 < over.label.low < 1e-6 and 1 - 1e-6 < over.label.high < 1, "all that a share can be"
    assert scorer.rows[-1].label.low == scorer.rows[-1].label.high == 0.5


def test_a_task_brings_its_own_methods_and_the_report_names_them() -> None:
    given = words_deleted("letters deleted", ["M", "F"])
    task = replace(planted_task(40, 16), methods=(given,))
    report = shift(planted_model(), {SITE: planted_sae()}, task, options=OPTIONS)
    row = report.method("letters deleted")
    assert (row.role, row.information) == ("rival", given.information)
    names = [one.name for one in report.methods]
    assert names.index("skyline + retrain") + 1 == names.index("letters deleted")
    assert any("letters deleted" in line and line.startswith("Controls") for line in report.findings())
    assert "letters deleted" not in [one.name for one in _report().methods]
    with pytest.raises(InvalidInputError, match="'SHIFT' is already the name of a method"):
        clash = replace(task, methods=(replace(given, name="SHIFT"),))
        shift(planted_model(), {SITE: planted_sae()}, clash, options=OPTIONS)


def test_collateral_is_the_mean_over_every_draw_run_by_itself() -> None:
    model = planted_model()
    reader = Reader(model, {SITE: as_basis(planted_sae())}, SITE, TokenPolicy())
    text = TokenBatch.of_rows(torch.randint(2, 250, (5, 12), generator=torch.Generator().manual_seed(0)))
    draws = [[Node(SITE, 5)], [Node(SITE, 6)], []]
    alone = [collateral(reader, text, [], [draw]).random.value for draw in draws]
    together = collateral(reader, text, draws[0], draws)
    assert abs(alone[0] - alone[1]) > 1e-6 and alone[2] == 0.0
    assert together.shift.value == pytest.approx(alone[0])
    assert together.random.value == pytest.approx(np.mean(alone))
    assert together.random_over_draws == sample_mean(np.array(alone), unit="random sets")


def test_too_few_active_features_for_a_random_control_are_refused() -> None:
    sae = planted_sae()
    sae.W_enc[:, [0, 1, *range(4, 15)]] = 0.0  # nothing but the attribute's two letters is ever active
    with pytest.raises(DegenerateInputError, match="random control"):
        shift(planted_model(), {SITE: sae}, planted_task(20, 8), options=OPTIONS)


def test_a_probe_beside_or_below_an_sae_is_refused_in_words() -> None:
    task, parallel = planted_task(), tiny_model("neox")
    sae = sae_lens_sae()
    with pytest.raises(MismatchError, match=r"reads resid_mid\.1, below the SAE at mlp_out\.1"):
        shift(planted_model(), {"mlp_out.1": sae}, task, options=ShiftOptions(probe_site="resid_mid.1"))
    with pytest.raises(MismatchError, match=r"reads mlp_out\.1, beside the SAE at attn_out\.1"):
        shift(parallel, {"attn_out.1": sae, "mlp_out.1": sae}, task)
