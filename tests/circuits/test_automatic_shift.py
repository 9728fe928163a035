"""SHIFT without a person and without attribute labels: power, silence without evidence, and what it must not look at."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import circuits
from circuits.shift.automatic.evidence import evidence_of
from circuits.shift.automatic.finding import SearchRows, coherence, halves, trial
from circuits.shift.automatic.support import support
from circuits.shift.judgement import judge_features
from circuits.shift.texts import LabelledTexts
from tests.circuits.planted import SITE, SPURIOUS_FEATURES, planted_model, planted_sae, planted_task
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.probes.linear import ProbeOptions

OPTIONS = circuits.ShiftOptions(methods=("JTT", "oracle probe"), random_draws=2, probe=ProbeOptions(l2=100.0))
SEARCH = circuits.AutomaticOptions(permutations=199)


def _task(minority: int, n: int = 200) -> circuits.ShiftTask:
    """Texts of the planted model, of which some break the correlation; no twins."""
    task, train = planted_task(40, 40), planted_task(n - minority, 40).train
    more = planted_task(2 * minority, 40).balanced if minority else None
    if more is not None and more.spurious is not None and train.spurious is not None:
        rows = [i for i, (y, s) in enumerate(zip(more.label, more.spurious, strict=True)) if y != s]
        few = more.rows(rows)
        train = LabelledTexts(train.texts + few.texts, train.label + few.label, train.spurious + (few.spurious or ()))
    return replace(task, train=train, swapped=None)


@functools.cache
def _found(minority: int) -> circuits.AutomaticShift:
    return circuits.automatic_shift(
        planted_model(), {SITE: planted_sae()}, _task(minority), search=SEARCH, options=OPTIONS
    )


def test_a_shortcut_is_found_without_attribute_labels_and_repaired() -> None:
    found = _found(20)
    evidence, report = found.evidence, found.report
    assert evidence.is_shortcut and set(evidence.features) == {f"{SITE}/{f}" for f in SPURIOUS_FEATURES}
    assert evidence.opposed is not None and evidence.opposed_without is not None
    assert evidence.opposed.value < 0.2 and evidence.opposed_without.value == 1.0 and evidence.opposed.n == 9
    assert max(evidence.p_ablation or 1, evidence.p_environment or 1) <= evidence.alpha
    worst = {row.name: row.worst.value for row in report.methods}
    assert worst["original"] <= 0.3 and worst["SHIFT + retrain"] == worst["oracle probe"] == 1.0 and "JTT" in worst
    assert worst["random features + retrain"] <= 0.3
    assert report.method("SHIFT").regime == "R3" and "Evidence for a shortcut" in report.judge_information
    assert {v.decision for v in report.verdicts} == {"spurious", "unsure"}
    assert "Evidence for a shortcut" in found._repr_html_() and "oracle probe" in found._repr_html_()


def test_attribute_labels_are_not_looked_at() -> None:
    task = _task(20)
    shuffled = replace(task.train, spurious=tuple(np.random.default_rng(0).integers(0, 2, 200).tolist()))
    blind = replace(task, train=shuffled)
    study = circuits.read_study(planted_model(), {SITE: planted_sae()}, blind, OPTIONS)
    decider = judge_features(study, circuits.AutomaticDecider(SEARCH)).decider
    assert decider.evidence == _found(20).evidence  # type: ignore[attr-defined]


def test_without_texts_that_break_the_correlation_or_without_a_correlation_nothing_is_ablated() -> None:
    for minority in (0, 100):
        found = _found(minority)
        assert not found.evidence.is_shortcut and found.report.n_spurious == 0
        assert "nothing is ablated" in found.evidence.why and "can tell them apart" in found.evidence.why
        assert found.report.method("SHIFT + retrain").label == found.report.method("original").label


def test_support_at_the_probes_own_site_is_what_the_feature_adds_to_the_logit() -> None:
    study = circuits.read_study(planted_model(), {SITE: planted_sae()}, _task(20), OPTIONS)
    judged = judge_features(study, circuits.AutomaticDecider(SEARCH))
    candidates = [(dossier.node, dossier.effect) for dossier in judged.dossiers]
    y = np.array(study.task.train.label)
    for i, (node, _) in enumerate(candidates):
        write = float(study.reader.bases[SITE].rows(torch.tensor([node.feature]))[0] @ study.probe.w)
        acts = study.train.acts[SITE][:, node.feature].double().numpy()
        expected = (2 * y - 1) * write * (acts - (acts[y == 1].mean() + acts[y == 0].mean()) / 2)
        np.testing.assert_allclose(support(study, candidates)[:, i], expected, rtol=1e-4, atol=1e-6)


def _rows(x: np.ndarray, y: np.ndarray) -> SearchRows:
    tensor = torch.from_numpy(x).float()

    def ablated(chosen: object) -> Tensor:
        z = tensor.clone()
        z[:, list(chosen)] = 0.0  # type: ignore[call-overload]
        return z

    weight = (x * (2 * y - 1)[:, None]).mean(0)
    return SearchRows(y, (2 * y - 1)[:, None] * weight * x, ablated)


def _drawn(seed: int, cue: float, signs: int, n: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Independent signs of the label, and a stronger cue that agrees with it in a share; 0 is the cue."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 2, n)
    x = random.standard_normal((n, 8))
    x[:, 1 : 1 + signs] += (2 * y - 1)[:, None]
    x[:, 0] += 3 * np.where(random.random(n) < cue, 2 * y - 1, 1 - 2 * y) * (cue != 0.5)
    return x, y


def test_noisy_signs_of_the_label_are_no_shortcut_and_a_cue_is_one() -> None:
    names = [circuits.Node("drawn", i) for i in range(8)]
    none = [evidence_of(_rows(*_drawn(seed, 0.5, 3)), names, SEARCH) for seed in range(8)]
    assert not any(one.is_shortcut for one in none)
    some = [evidence_of(_rows(*_drawn(seed, 0.9, 1, n=1200)), names, SEARCH) for seed in range(8)]
    features = [one.features for one in some if one.is_shortcut]
    assert len(features) >= 4 and set(features) == {("drawn/0",)}


def test_the_test_is_on_rows_that_the_search_has_not_seen_and_counts_losses_elsewhere() -> None:
    x, y = _drawn(0, 0.5, 1)
    searched, tested = halves(y, 0)
    assert not set(searched) & set(tested) and len(searched) + len(tested) == len(y)
    assert [int((y[searched] == label).sum()) for label in (0, 1)] == [int((y == label).sum()) // 2 for label in (0, 1)]
    # the only sign of the label: ablating it helps where it is wrong, and costs as much where it is right
    tried = trial(_rows(x, y), [1], searched, tested, SEARCH)
    assert tried is not None and tried.right[tried.opposed].mean() < 0.2 < tried.right_without[tried.opposed].mean()
    assert abs(tried.gain) < 0.15 and tried.p_ablation > 0.05


def test_features_that_fail_together_are_coherent() -> None:
    random = np.random.default_rng(0)
    common = random.standard_normal((500, 1))
    assert coherence(common + 0.1 * random.standard_normal((500, 4))) > 0.9
    assert abs(coherence(random.standard_normal((500, 4)))) < 0.05


def test_too_few_texts_and_bad_options_are_refused() -> None:
    x, y = _drawn(0, 0.5, 1, n=16)
    with pytest.raises(DegenerateInputError, match="half of the training texts are for the search"):
        evidence_of(_rows(x, y), [circuits.Node("drawn", i) for i in range(8)], SEARCH)
    with pytest.raises(InvalidInputError, match="at least 1 / alpha"):
        circuits.AutomaticOptions(alpha=0.001, permutations=99)


def test_instability_names_the_cue_and_not_the_label() -> None:
    study = circuits.read_study(planted_model(), {SITE: planted_sae()}, _task(32), OPTIONS)
    verdicts = {v.node.feature: v for v in judge_features(study, circuits.InstabilityDecider()).verdicts}
    assert {f for f, v in verdicts.items() if v.decision == "spurious"} == SPURIOUS_FEATURES
    assert {verdicts[f].decision for f in (0, 1)} == {"intended"}
    assert min(verdicts[f].score for f in SPURIOUS_FEATURES) > 0
