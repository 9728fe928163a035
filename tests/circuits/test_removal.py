"""SCR and TPP on a planted model, and their parts against sums written out."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import circuits
from circuits.shift.deciders import Node
from circuits.shift.evidence import PooledTexts, Reader
from circuits.shift.removal import Parts, RemovalOptions, RemovalScores, scr, targeted, top_features, tpp
from circuits.shift.resamples import resampled, share
from circuits.shift.task import ShiftTask
from tests.circuits.planted import (
    LABEL_FEATURES,
    SITE,
    SPURIOUS_FEATURES,
    PlantedSAE,
    planted_model,
    planted_sae,
    planted_task,
)
from tests.tiny import D_MODEL
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.probes.linear import ProbeOptions, fit_probe

OPTIONS = RemovalOptions(n_features=(1, 2, 400), random_draws=3)
TASK = planted_task(80, 80)


def _sae(scale: float = 1.0):  # noqa: ANN202
    sae = planted_sae()
    sae.W_dec = sae.W_dec * scale
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    return sae


@functools.cache
def _scr(target: str = "auto") -> RemovalScores:
    return scr(planted_model(), _sae(), TASK, target=target, options=OPTIONS)  # type: ignore[arg-type]


def test_scr_is_one_where_the_ablation_restores_the_clean_probe() -> None:
    scores = _scr()
    assert scores.ablated.startswith("features of the attribute"), "the biased probe gets the label wrong more often"
    two = scores.at(2)
    assert two.n_ablated == 2 and two.score.value == pytest.approx(1.0, abs=0.05)
    assert scores.at(1).score.value < two.score.value, "the other letter of the attribute still misleads"
    assert two.score.low > 0.5 and two.random is not None and abs(two.random.value) < 0.2
    assert two.noise.value < 0.5 and two.noise.n == 3
    accuracies = dict(scores.accuracies)
    assert accuracies["clean probe, label"].value > accuracies["biased probe, label"].value + 0.2
    assert scores.frame().shape == (3, 11)
    # more than are active: no set of random features is that large
    assert scores.at(400).random is None and scores.at(400).n_ablated < 20
    with pytest.raises(InvalidInputError, match="measured were"):
        scores.at(7)


def test_scr_is_zero_where_nothing_changes_or_there_is_no_room() -> None:
    assert TASK.balanced is not None
    nothing = scr(planted_model(), _sae(1e-6), TASK, options=OPTIONS)
    assert nothing.at(2).score.value == pytest.approx(0.0, abs=1e-9)
    fair = replace(TASK, train=TASK.balanced, swapped=None)
    same = scr(planted_model(), _sae(), fair, target="label", options=OPTIONS)
    assert all(row.score.value == 0 for row in same.rows) and "no better" in same.notes[0]

    no_op = tpp(planted_model(), _sae(1e-6), fair, options=OPTIONS)
    assert no_op.name == "TPP" and no_op.at(1).score.value == pytest.approx(0.0, abs=1e-9)


def test_the_direction_is_chosen_without_the_test_rows() -> None:
    # by these rows the biased probe would get the attribute wrong more often
    flipped = replace(TASK.test, spurious=tuple(1 - a for a in TASK.test.spurious or ()))
    again = scr(planted_model(), _sae(), replace(TASK, test=flipped), options=OPTIONS)
    assert again.ablated == _scr().ablated
    forced = _scr("attribute")
    assert forced.ablated.startswith("features of the label")


def test_tpp_is_what_the_own_probe_loses_more_than_the_others() -> None:
    """Three labels with one feature each and a fourth without any, so that a probe has to read its own feature."""
    eye = torch.eye(D_MODEL)
    sae = PlantedSAE(eye, eye, torch.zeros(D_MODEL))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    model = planted_model()
    reader = Reader(model, circuits.bases(model, {SITE: sae}), SITE, TokenPolicy())
    label = np.arange(200) % 4
    acts = torch.rand(200, D_MODEL, generator=torch.Generator().manual_seed(1)) * 0.1
    acts[:, 3] = 0
    acts[np.arange(200), label] += 3 * torch.from_numpy(label < 3)
    pooled = PooledTexts(
        texts=tuple(map(str, label)), x=acts, acts={SITE: acts}, frequency={SITE: (acts > 0).float().mean(0)},
        n_tokens=200, n_left_out=0,
    )  # fmt: skip
    scores = targeted(Parts(reader, pooled, pooled, np.arange(200), OPTIONS), label, label, ("a", "b", "c", "none"))
    one = scores.at(1)
    assert all(accuracy.value > 0.95 for _, accuracy in scores.accuracies)
    # ablating a: its own balanced accuracy falls from 1 to 1/2, that of "none" to 1 - 1/6, since a third of the others
    # now look like it: 1/2 - (1/6 + 0 + 0) / 3 = 4/9; so do b and c, and "none" has no feature: 3 * 4/9 / 4
    assert one.score.value == pytest.approx(1 / 3, abs=0.01) and one.score.high - one.score.low < 0.1
    assert one.random is not None and one.random.value < 0.1


def test_scores_are_the_change_of_the_logit_and_only_effects_above_zero_count() -> None:
    model, basis = planted_model(), circuits.bases(planted_model(), {SITE: _sae()})[SITE]
    reader = Reader.fitted(model, {SITE: basis}, SITE, TASK.train.texts)
    pooled = reader.read(TASK.train.texts, "test")
    label = np.array(TASK.train.label)
    probe = fit_probe(pooled.x, torch.from_numpy(label), SITE, options=ProbeOptions(folds=0))
    parts = Parts(reader, pooled, pooled, np.arange(len(label)), OPTIONS)
    effects, clamped = parts.effects(label, probe), parts.effects(label, probe, clamped=True)
    for feature in (0, 1, 2, 3):
        change = (probe.logit(pooled.x) - probe.logit(reader.ablated(pooled, [Node(SITE, feature)]))).numpy()
        by_hand = change[label == 1].mean() - change[label == 0].mean()
        assert effects[feature] == pytest.approx(by_hand, rel=1e-4, abs=1e-5)
        more = pooled.acts[SITE][label == 1, feature].mean() > pooled.acts[SITE][label == 0, feature].mean()
        assert clamped[feature] == pytest.approx(effects[feature] if more else 0.0)
    assert top_features(np.array([0.0, 2.0, 0.0, 1.0]), 3) == (1, 3)
    assert set(top_features(np.abs(effects), 4)) == LABEL_FEATURES | SPURIOUS_FEATURES


def test_resamples_count_rows_and_begin_with_the_rows_themselves() -> None:
    counts = resampled(7, 0)
    assert (counts[0] == 1).all() and (counts.sum(axis=1) == 7).all()
    hits, chosen = np.array([1, 0, 1, 1, 0, 0, 1]), np.array([1, 1, 1, 0, 0, 0, 0])
    assert share(counts, hits, chosen)[0] == 2 / 3


def test_what_can_not_be_scored_is_refused() -> None:
    with pytest.raises(MismatchError, match="no training rows in which"):
        scr(planted_model(), _sae(), replace(TASK, balanced=None))
    three = ("a", "b", "c")
    task = ShiftTask(
        name="three", label_names=three, train=replace(TASK.train, spurious=None, label=(0, 1, 2, *TASK.train.label[3:])),
        test=replace(TASK.test, spurious=None, label=(0, 1, 2, *TASK.test.label[3:])),
    )  # fmt: skip
    with pytest.raises(MismatchError, match="balanced"):
        scr(planted_model(), _sae(), task)
    wrong: list[dict[str, Any]] = [{"n_features": ()}, {"n_features": (0,)}, {"random_draws": 1}, {"validation": 1.0}]
    for options in wrong:
        with pytest.raises(InvalidInputError):
            RemovalOptions(**options)
