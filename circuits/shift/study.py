"""SHIFT: find the SAE features that carry a spurious attribute into a probe, have them judged, ablate them.

Source: Marks et al. 2025 (arXiv 2403.19647), section 4. Departures: the judge is a statistic and not a person; the
probe may stand at the SAE's own site, where effects are exact; random features, word deletion, the skyline, the oracle
and intervals are always part of the result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from circuits.nodes.effects import SiteEffects
from circuits.shift.asked import decider_of
from circuits.shift.choosing import ALWAYS, compared_among, methods_for
from circuits.shift.collateral import collateral
from circuits.shift.cue_panel import cue_panel
from circuits.shift.deciders import Decider, FeatureDossier, Verdict
from circuits.shift.effects import examined_effects
from circuits.shift.judgement import edit_check, judge_features, judged
from circuits.shift.judging.prepare import StudyReader
from circuits.shift.methods import Scorer
from circuits.shift.options import ShiftOptions
from circuits.shift.reading import of_two_labels, read_study
from circuits.shift.rows import AttributionRow, JudgedFeature
from circuits.shift.shift_report import ShiftReport
from circuits.shift.task import ShiftMethod, ShiftStudy, ShiftTask
from workbench.bases.sae import AnySAE
from workbench.controls.methods import comparisons, methods_of
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, MismatchError
from workbench.core.numbers import number, percent
from workbench.core.tokens import TokenBatch
from workbench.judges.protocol import Judge
from workbench.models.model import Model


@checked
def shift(
    model: Model,
    bases: Mapping[str, AnySAE],
    task: ShiftTask,
    judge: Decider | Judge | str | None = None,
    *,
    methods: str | Sequence[str] | None = None,
    probe_site: str | None = None,
    options: ShiftOptions | None = None,
    plain_text: TokenBatch | None = None,
) -> ShiftReport:
    """Trains a probe on the ambiguous set, ablates the features that the judge calls spurious, evaluates with controls.

    Features are pooled and edited at the same tokens: padding, special tokens, the first token of a text and attention
    sinks are left out of both. Texts are read once, however many methods are compared.

    Args:
        model: the model.
        bases: an SAE per site.
        task: labelled texts; see `ShiftTask.from_frame` and `circuits.biographies`. Methods that need twins, word
            lists or balanced rows which it does not have are left out, and the report says so.
        judge: decides on each candidate; by default `StatisticsDecider`, or `LexiconDecider` without twins. Only one
            that says `is_oracle` is given balanced labels, and none sees a test row. A `workbench.judges.Judge` is
            asked about each one's tokens. A name is one of `circuits.DECIDERS`.
        methods: what SHIFT is compared with: "standard", "all", or names; in place of `options.methods`.
        probe_site: where the probe reads; in place of `options.probe_site`.
        options: probe site, number of candidates, controls.
        plain_text: other text, on which the loss is measured with and without the ablation.

    Raises:
        UnknownNameError: if there is no method of a name.
        MismatchError: if an SAE was made for another model or site or is a transcoder, or the probe reads where no
            feature of an SAE can reach it, or the judge needs what the task does not have.
        ShapeError: if an SAE has another width than its site.
        EditError: if the ablation differs from the one made by plain hooks with the SAE's own encode and decode.
    """
    options = _with(options or ShiftOptions(), methods, probe_site)
    task = of_two_labels(task, options)
    decider = decider_of(judge, task, options.seed)
    if len(task.label_names) > 2 and isinstance(decider, StudyReader):
        raise MismatchError(
            f"shift: the {decider.name} judge tells two labels apart, and the task has {len(task.label_names)}. Give "
            "ShiftOptions(positive=...) the one that is told from all others, or another judge."
        )
    usable, left_out = methods_for(task, decider, options)
    study = read_study(model, bases, task, options, needs={need for method in usable for need in method.needs})
    judgement = judge_features(study, decider)
    decider, study = judgement.decider, judged(study, judgement)
    chosen = judgement.chosen
    checked_edit = edit_check(study, chosen or judgement.candidates)
    scorer, failed = _scored(study, usable)
    ran = methods_of(compared_among(method for method in usable if method.name not in failed))
    probe, verdicts, oracle = study.probe, judgement.verdicts, judgement.oracle
    assert probe.accuracy is not None and probe.shuffled is not None and study.judged is not None
    draws = study.judged.draws
    return ShiftReport(
        task=task.name, label_name=" or ".join(task.label_names),
        spurious_name=" or ".join(task.spurious_names) or None, test_texts=_test_texts(task),
        probe_site=study.reader.probe_site, probe=probe.accuracy, shuffled=probe.shuffled, tokens=_tokens_text(study),
        judge=decider.name, judge_information=decider.information, attribution=_attribution_rows(judgement.effects),
        verdicts=tuple(map(_judged, judgement.dossiers, verdicts, oracle or [None] * len(verdicts))),
        methods=tuple(scorer.rows),
        comparisons=tuple(scorer.compare(*pair) for pair in comparisons(ran)),
        random_draws=len(draws), edit_check=checked_edit,
        collateral=None if plain_text is None else collateral(study.reader, plain_text, chosen, draws),
        notes=task.notes, left_out=(*left_out, *failed.values()), cautions=_degenerate(study, judgement.candidates),
        cues=cue_panel(task, scorer.predicted, options.seed),
        study=study,
        doctor=examined_effects(
            study, judgement.effects, options.attribution, options.attribution_rows, options.doctor
        ),
    )  # fmt: skip


def _with(options: ShiftOptions, methods: str | Sequence[str] | None, probe_site: str | None) -> ShiftOptions:
    """The options with what was given by itself."""
    asked = options.methods if methods is None else methods if isinstance(methods, str) else tuple(methods)
    return replace(options, methods=asked, probe_site=probe_site or options.probe_site)


def _test_texts(task: ShiftTask) -> str:
    return "balanced test texts" if len(set(task.test.counts().values())) == 1 else "test texts"


def _scored(study: ShiftStudy, methods: Sequence[ShiftMethod]) -> tuple[Scorer, dict[str, str]]:
    """Scores of the methods, and why each one is missing that had nothing to compute."""
    scorer, failed = Scorer(study.task), {}
    for method in methods:
        start = time.perf_counter()
        try:
            prediction = method.run(study)
        except DegenerateInputError as error:
            if method.name in ALWAYS:
                raise
            failed[method.name] = f"{method.name} is left out: {error}"
        else:
            scorer.add(method, prediction, time.perf_counter() - start)
    return scorer, failed


def _degenerate(study: ShiftStudy, candidates: Sequence[object]) -> tuple[str, ...]:
    """What keeps the study from showing anything, in sentences."""
    notes, labels, accuracy = [], study.task.train.label, study.probe.accuracy
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    if accuracy is not None and accuracy.low <= majority:
        notes.append(
            f"The probe is at chance: accuracy {accuracy} in cross-validation, and the most frequent label has "
            f"{percent(majority)}; there is nothing to repair."
        )
    if not candidates:
        notes.append(
            f"No feature supports the label by more than {number(study.options.min_effect)} logits, so there was "
            "nothing to judge and nothing was ablated. Is the SAE on the probe's path?"
        )
    return tuple(notes)


def _judged(dossier: FeatureDossier, verdict: Verdict, oracle: Verdict | None) -> JudgedFeature:
    return JudgedFeature(
        feature=str(dossier.node), effect=dossier.effect, decision=verdict.decision,
        oracle_decision=None if oracle is None else oracle.decision,
        why=verdict.why, top_tokens=dossier.top_tokens,
        spurious_share=dossier.spurious_share, target_share=dossier.target_share,
    )  # fmt: skip


def _attribution_rows(effects: Mapping[str, SiteEffects]) -> tuple[AttributionRow, ...]:
    return tuple(
        AttributionRow(e.site, e.method, float(e.total.mean()), e.gap, e.n, int((e.effect > 0).sum()))
        for e in effects.values()
    )


def _tokens_text(study: ShiftStudy) -> str:
    read, left_out = study.train.n_tokens, study.train.n_left_out
    share = f"{left_out} of {read + left_out} left out"
    return f"all tokens but padding, special tokens, the first one and attention sinks ({share})"
