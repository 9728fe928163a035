"""The table of a SHIFT study: which methods are in it, what each may see, and what it says where it can do nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

import circuits
from circuits.shift.choosing import ALWAYS, methods_for
from circuits.shift.deciders import LexiconDecider
from circuits.shift.evidence import PooledTexts, Reader
from circuits.shift.heads.base import HEADS, REGIMES
from circuits.shift.methods import Scorer, words_deleted
from circuits.shift.options import ShiftOptions
from circuits.shift.shift_report import ShiftReport
from circuits.shift.study import shift
from circuits.shift.table.base import SHIFT_METHODS
from circuits.shift.table.bases import EMBED, token_embeddings
from circuits.shift.table.deletion import deleted_matched
from circuits.shift.task import Prediction, ShiftStudy, ShiftTask
from circuits.shift.words import word_pattern
from tests.circuits.planted import SITE, SPURIOUS, planted_model, planted_sae, planted_task
from workbench.controls.methods import Method
from workbench.core.errors import DegenerateInputError, UnknownNameError

OPTIONS = ShiftOptions(top_k=10, random_draws=2)
TASK = planted_task(40, 24)
COLUMNS = [
    "method", "regime", "n_ablated", "accuracy", "accuracy_low", "accuracy_high", "worst_group", "worst_low",
    "worst_high", "worst_n", "attribute_accuracy", "cue_mcc", "seconds",
]  # fmt: skip


def _run(task: ShiftTask = TASK, methods: str | Sequence[str] = "standard", **options: object) -> ShiftReport:
    return shift(planted_model(), {SITE: planted_sae()}, task, methods=methods, options=replace(OPTIONS, **options))


@functools.cache
def _all() -> tuple[ShiftReport, list[tuple[str, ...]]]:
    """Every method, and the texts of each reading."""
    readings, read = [], Reader.read

    def counted(self: Reader, texts: Sequence[str], what: str) -> PooledTexts:
        readings.append(tuple(texts))
        return read(self, texts, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "read", counted)
        return _run(methods="all"), readings


def test_the_table_has_the_columns_that_others_build_on_and_a_regime_for_every_method() -> None:
    report, frame = _all()[0], _all()[0].frame()
    assert list(frame.columns[: len(COLUMNS)]) == COLUMNS
    for row, (_, of) in zip(report.methods, frame.iterrows(), strict=True):
        assert (of["method"], of["n_ablated"], of["worst_n"]) == (row.name, row.n_features, row.worst.n == 6 and 6)
        assert (of["worst_group"], of["worst_low"], of["worst_high"]) == (
            row.worst.value,
            row.worst.low,
            row.worst.high,
        )
        assert of["accuracy_low"] <= of["accuracy"] <= of["accuracy_high"] and of["worst_group"] <= of["accuracy"]
        assert of["regime"] in REGIMES and of["worst_group_name"] in ("M T", "F T", "M N", "F N")
    assert (frame["seconds"] >= 0).all() and frame["seconds"].sum() > 0
    assert {*HEADS, *SHIFT_METHODS, *ALWAYS} - set(frame["method"]) == set()
    assert list(frame["method"][:5]) == list(ALWAYS) and frame["method"].iloc[-1] == "oracle probe"


def test_what_each_method_reaches_and_may_see() -> None:
    """At rho = 1 only what knows more than the training rows, or the words, gets away from the attribute."""
    row = _all()[0].method
    for name in ("DFR", "LEACE", "INLP", "MiMiC", "MiMiC+", "concept bottleneck", "lexicon words deleted"):
        assert row(name).label.value == 1.0 and row(name).cue_mcc.value == 0.0, name
    for name in ("ERM", "reweighting", "subsampling", "GroupDRO", "PDE", "JTT", "length-matched deletion"):
        assert row(name).worst.value < 0.5 and row(name).spurious.value > 0.7, name
    assert row("ERM").label == row("original").label
    assert row("LEACE on training rows").worst.value == 0.0
    assert {name: row(name).regime for name in ("LEACE", "LEACE on training rows", "JTT", "SHIFT", "skyline")} == {
        "LEACE": "R1", "LEACE on training rows": "R2", "JTT": "R3", "SHIFT": "R0", "skyline": "R1",
    }  # fmt: skip
    assert (row("reweighting").n_attribute_labels, row("ERM").n_attribute_labels) == (40, 0)
    assert row("length-matched deletion").over_draws is not None


def test_texts_are_read_once_however_many_methods_there_are() -> None:
    readings = _all()[1]
    for texts in (TASK.train.texts, TASK.swapped, TASK.balanced.texts, TASK.test.texts):
        assert readings.count(tuple(texts)) == 1
    assert len(readings) == 4 + 2 + 2 * 2, "and those without words: of the list, and two draws"


def test_what_keeps_a_method_from_doing_anything_is_said() -> None:
    said = " ".join(_all()[0].findings())
    assert "GroupDRO, PDE, reweighting, subsampling, LEACE on training rows: label and attribute determine each" in said
    assert "LEACE on training rows: erasing the attribute erases the label." in said
    assert "JTT: the error set is empty, so the head is that of ERM." in said


def test_methods_by_name_and_an_unknown_one() -> None:
    report = _run(methods=["JTT", "oracle probe"])
    assert [row.name for row in report.methods] == [*ALWAYS, "JTT", "oracle probe"]
    assert {c.other for c in report.comparisons} == {"original", "random features", "random features + retrain", "JTT"}
    with pytest.raises(UnknownNameError, match="no method 'JTTT'. Did you mean JTT") as error:
        shift(planted_model(), {}, TASK, methods="JTTT")
    assert "\n" not in str(error.value) and all(name in str(error.value) for name in ("all", "MiMiC+", "oracle probe"))


def test_without_an_attribute_or_lists_the_methods_that_need_them_are_left_out_in_words() -> None:
    bare = replace(TASK, swapped=None, balanced=None)
    report = _run(bare, methods=["LEACE", "DFR", "INLP"])
    assert report.method("LEACE").regime == "R2" and report.method("DFR").regime == "R2", "fitted on training rows"
    assert report.method("INLP").regime == "R2"
    without = replace(bare, spurious_names=(), **{
        name: replace(getattr(bare, name), spurious=None) for name in ("train", "test")
    })  # fmt: skip
    usable, left_out = methods_for(without, LexiconDecider(), ShiftOptions(methods="all"))
    names = {line.partition(" is left out: the attribute of the texts is not known.")[0] for line in left_out}
    assert names >= {"DFR", "LEACE", "INLP", "MiMiC", "reweighting"}
    assert {method.name for method in usable} >= {
        "JTT",
        "PoE",
        "ERM",
        "concept bottleneck",
        "embed-only SHIFT + retrain",
    }


def test_a_method_with_nothing_to_compute_is_left_out_and_the_study_goes_on() -> None:
    def nothing(study: ShiftStudy) -> Prediction:
        raise DegenerateInputError("nothing: no rows. Give rows.")

    broken = Method(name="broken", information="nothing", run=nothing, role="rival", compared_with=("original",))
    report = _run(replace(TASK, methods=(broken,)))
    assert "broken is left out: nothing: no rows. Give rows." in report.left_out
    assert "broken" not in [row.name for row in report.methods]
    assert "broken" not in {name for c in report.comparisons for name in (c.better, c.other)}
    same = replace(TASK, swapped=TASK.train.texts)
    assert any("swapped texts equal" in line for line in _run(same, min_effect=1e9).left_out)


def test_a_probe_at_chance_and_no_feature_above_the_threshold_are_said() -> None:
    report = _run(min_effect=1e9)
    assert report.verdicts == () and report.method("SHIFT").label == report.method("original").label
    assert any(
        "No feature supports the label by more than " in line and "nothing was ablated" in line
        for line in report.findings()
    )
    assert report.edit_check.difference < 1e-5 and report.headline().sentence
    labels = tuple(np.random.default_rng(1).permutation(TASK.train.label).tolist())
    lost = replace(TASK, swapped=None, balanced=None, train=replace(TASK.train, label=labels))
    assert any("The probe is at chance" in line for line in _run(lost).cautions)
    assert not _all()[0].cautions


def test_a_list_of_words_that_the_task_deletes_itself_is_deleted_once() -> None:
    own = replace(TASK, methods=(words_deleted("letters deleted", SPURIOUS),))
    with pytest.raises(UnknownNameError, match="letters deleted"):
        _run(own, methods=["lexicon words deleted"])
    other = replace(TASK, methods=(words_deleted("letters deleted", ["M"]),))
    assert _run(other, methods=["lexicon words deleted"]).method("lexicon words deleted").label.value == 1.0


def test_matched_deletion_takes_as_many_other_words_of_like_length_and_frequency() -> None:
    lexicon, random = word_pattern(["she", "her"]), np.random.default_rng(0)
    text = "She saw the cathedral, and her own dog ran away."
    shorter = deleted_matched(text, lexicon, {}, random)
    gone = set(text.lower().replace(",", "").replace(".", "").split()) - set(
        shorter.lower().replace(",", "").replace(".", "").split()
    )
    assert len(gone) == 2 and gone <= {"saw", "the", "and", "own", "dog", "ran"}, "all of three letters, as she and her"
    often = {"her": 64, "the": 64, "and": 60, "own": 59}
    drawn = {deleted_matched("her the and own dog ran", word_pattern(["her"]), often, random) for _ in range(30)}
    assert drawn == {"her and own dog ran", "her the own dog ran", "her the and dog ran"}
    assert deleted_matched("no word of it", lexicon, {}, random) == "no word of it"


def test_the_procedure_on_neurons_is_shift_with_neurons_for_saes() -> None:
    row = _all()[0].method("neurons SHIFT + retrain")
    alone = shift(planted_model(), circuits.neurons(planted_model(), [SITE]), TASK, options=OPTIONS)
    assert row.n_features == alone.n_spurious > 0 and row.label == alone.method("SHIFT + retrain").label


def test_a_token_that_is_ablated_gets_the_mean_embedding() -> None:
    model = planted_model()
    basis = token_embeddings(model, TASK.train.texts)
    x = model.capture(model.tokens(["x M k T", "x M Z T"]), [EMBED]).flat(EMBED)
    acts = basis.encode(x)
    assert acts[0].sum(-1).tolist() == [1.0] * acts.shape[1] and acts[1].sum() < acts.shape[1], "Z never occurred"
    letter = int(acts[0, -1].argmax())
    ablated = basis.ablate(x, [letter])
    torch.testing.assert_close(ablated[0, -1], basis.bias)
    torch.testing.assert_close(ablated[0, :-1], x[0, :-1])
    assert _all()[0].method("embed-only SHIFT + retrain").n_features == 2


def test_the_correlation_of_cue_and_prediction_by_hand() -> None:
    scorer = Scorer(TASK)
    attribute = torch.tensor(TASK.test.spurious)
    follows = Method(name="follows", information="", run=lambda _: Prediction(()))
    scorer.add(follows, Prediction((attribute,)), 1.5)
    flipped = attribute.clone()
    flipped[torch.nonzero(attribute == 0)[:6, 0]] = 1  # of 12 and 12: a table of [[6, 6], [0, 12]]
    scorer.add(replace(follows, name="half"), Prediction((flipped,)))
    scorer.add(replace(follows, name="both"), Prediction((attribute, 1 - attribute), 1, True))
    first, half, both = scorer.rows
    assert (first.cue_mcc.value, first.seconds, first.worst.value) == (1.0, 1.5, 0.0)
    assert half.cue_mcc.value == pytest.approx(72 / np.sqrt(6 * 18 * 12 * 12))  # TP TN - FP FN over the root
    assert half.cue_mcc.low < half.cue_mcc.value < half.cue_mcc.high
    assert both.cue_mcc.value == pytest.approx(0.0) and both.cue_mcc.unit == "draws"
