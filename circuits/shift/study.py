"""SHIFT: find the SAE features that carry a spurious attribute into a probe, have them judged, ablate them.

Source: Marks et al. 2025 (arXiv 2403.19647), section 4. Departures: the judge is a statistic and not a person; the
probe may stand at the SAE's own site, where effects are exact; random features, word deletion, the skyline, the oracle
and intervals are always part of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from circuits.nodes.effects import SiteEffects
from circuits.shift.asked import decider_of
from circuits.shift.collateral import collateral
from circuits.shift.deciders import Decider, FeatureDossier, Node, OracleDecider, Verdict
from circuits.shift.editcheck import pooled_by_hooks, require_same_edit
from circuits.shift.effects import effects_on, examined_effects
from circuits.shift.judging.prepare import prepared
from circuits.shift.methods import ORACLE_PROBE, ORIGINAL, SWAP_DIRECTION_REMOVED, Scorer, ablation
from circuits.shift.reading import ShiftOptions, dossiers_of, nodes_of, of_two_labels, read_study, strongest
from circuits.shift.rows import AttributionRow, EditCheck, JudgedFeature
from circuits.shift.shift_report import ShiftReport
from circuits.shift.task import NEEDS, Need, ShiftMethod, ShiftStudy, ShiftTask
from workbench.bases.sae import AnySAE
from workbench.controls.matching import matched_features
from workbench.controls.methods import comparisons, methods_of, possible
from workbench.core.arguments import checked
from workbench.core.numbers import counted
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
    options: ShiftOptions | None = None,
    plain_text: TokenBatch | None = None,
) -> ShiftReport:
    """Trains a probe on the ambiguous set, ablates the features that the judge calls spurious, evaluates with controls.

    Features are pooled and edited at the same tokens: padding, special tokens, the first token of a text and attention
    sinks are left out of both.

    Args:
        model: the model.
        bases: an SAE per site.
        task: labelled texts; see `ShiftTask.from_frame` and `circuits.biographies`. Methods that need twins, word
            lists or balanced rows which it does not have are left out, and the report says so.
        judge: decides on each candidate; by default `StatisticsDecider`, or `LexiconDecider` without twins. Only one
            that says `is_oracle` is given balanced labels, and none sees a test row. A `workbench.judges.Judge` is
            asked about each one's tokens. A name is one of `circuits.DECIDERS`.
        options: probe site, number of candidates, controls.
        plain_text: other text, on which the loss is measured with and without the ablation.

    Raises:
        InvalidInputError: if the task has more than two labels and `options.positive` is not given.
        MismatchError: if an SAE was made for another model or site or is a transcoder, or the probe reads where no
            feature of an SAE can reach it, or the judge needs what the task does not have.
        ShapeError: if an SAE has another width than its site.
        EditError: if the ablation differs from the one made by plain hooks with the SAE's own encode and decode.
    """
    options = options or ShiftOptions()
    task = of_two_labels(task, options)
    decider = decider_of(judge, task, options.seed)
    study = read_study(model, bases, task, options)
    decider = prepared(decider, study)
    effects = effects_on(study, study.train, task.train.label, options.attribution, options.attribution_rows)
    candidates = strongest(effects, options.top_k)
    dossiers = dossiers_of(study, candidates)
    verdicts = [decider(d if decider.is_oracle else replace(d, balanced=None)) for d in dossiers]
    oracle = [OracleDecider()(dossier) for dossier in dossiers] if task.balanced is not None else None
    chosen, oracle_chosen = _spurious(verdicts), _spurious(oracle or ())
    edit_check = _edit_check(study, chosen or nodes_of(candidates))
    draws = _random_features(study, chosen, options)
    every_method = _methods(study, decider, chosen, oracle_chosen, draws, options)
    usable, left_out = possible(every_method, NEEDS, task.missing())
    methods = methods_of(usable)
    scorer = Scorer(task)
    for method in methods.values():
        scorer.add(method, method.run(study))
    probe = study.probe
    assert probe.accuracy is not None and probe.shuffled is not None
    return ShiftReport(
        task=task.name, label_name=" or ".join(task.label_names),
        spurious_name=" or ".join(task.spurious_names) or None, test_texts=_test_texts(task),
        probe_site=study.reader.probe_site, probe=probe.accuracy, shuffled=probe.shuffled, tokens=_tokens_text(study),
        judge=decider.name, judge_information=decider.information, attribution=_attribution_rows(effects),
        verdicts=tuple(map(_judged, dossiers, verdicts, oracle or [None] * len(verdicts))),
        methods=tuple(scorer.rows), comparisons=tuple(scorer.compare(*pair) for pair in comparisons(methods)),
        random_draws=len(draws), edit_check=edit_check,
        collateral=None if plain_text is None else collateral(study.reader, plain_text, chosen, draws),
        notes=task.notes, left_out=left_out,
        doctor=examined_effects(study, effects, options.attribution, options.attribution_rows, options.doctor),
    )  # fmt: skip


def _test_texts(task: ShiftTask) -> str:
    return "balanced test texts" if len(set(task.test.counts().values())) == 1 else "test texts"


def _spurious(verdicts: Sequence[Verdict]) -> list[Node]:
    return [verdict.node for verdict in verdicts if verdict.decision == "spurious"]


def _random_features(study: ShiftStudy, chosen: Sequence[Node], options: ShiftOptions) -> list[list[Node]]:
    """For each draw as many other features as chosen, each matched to the one at the same site that it stands for."""
    draws: list[dict[Node, Node]] = [{} for _ in range(options.random_draws)]
    for site, basis in study.reader.bases.items():
        nodes = [node for node in chosen if node.site == site]
        if nodes:
            matched = matched_features(
                [node.feature for node in nodes], study.train.frequency[site], options.random_draws,
                norm=basis.rows().norm(dim=1), seed=options.seed,
            )  # fmt: skip
            for draw, features in zip(draws, matched, strict=True):
                draw |= {node: Node(site, feature) for node, feature in zip(nodes, features, strict=True)}
    return [[draw[node] for node in chosen] for draw in draws]


def _skyline(study: ShiftStudy, n: int, options: ShiftOptions) -> list[Node]:
    """As many features as SHIFT ablated, by their effect on the attribute's margin over balanced training rows."""
    balanced = study.task.balanced
    if n == 0 or balanced is None:
        return []
    effects = effects_on(
        study, study.balanced, study.task.expected(balanced), options.attribution, options.attribution_rows
    )
    scores = [
        (effect, Node(site, f)) for site, part in effects.items() for f, effect in enumerate(part.effect.tolist())
    ]
    return [node for _, node in sorted(scores, key=lambda pair: -pair[0])[:n]]


_LABELS: tuple[Need, ...] = ("balanced",)


def _methods(
    study: ShiftStudy,
    decider: Decider,
    chosen: Sequence[Node],
    oracle_chosen: Sequence[Node],
    draws: Sequence[Sequence[Node]],
    options: ShiftOptions,
) -> tuple[ShiftMethod, ...]:
    """Every method of the study, those of the task included."""
    most_effective = _skyline(study, len(chosen), options)
    of_draws = f"activation frequencies and norms; mean of {counted(len(draws), 'draws')}"
    of_skyline = "attribute labels of balanced training rows"
    skyline = ablation("skyline", of_skyline, lambda _: [most_effective], ("variant", "rival"), needs=_LABELS)
    others = (*skyline, *study.task.methods, SWAP_DIRECTION_REMOVED)
    rivals = (method.name for method in others if method.role == "rival")
    against = ("random features", "original"), ("random features + retrain", "original", *rivals)
    return (
        ORIGINAL,
        *ablation("random features", of_draws, lambda _: draws, ("control", "control"), is_random=True),
        *ablation("SHIFT", decider.information, lambda _: [chosen], ("subject", "subject"), against),
        *ablation(
            "SHIFT, oracle judge", OracleDecider.information, lambda _: [oracle_chosen], ("variant", "variant"),
            needs=_LABELS,
        ),
        *others,
        ORACLE_PROBE,
    )  # fmt: skip


CHECKED_ROWS = 8
"""Texts on which the edit is made a second time."""


def _edit_check(study: ShiftStudy, nodes: Sequence[Node]) -> EditCheck:
    """The ablation against one by plain hooks, on the training texts on which these features are most active.

    Raises:
        EditError: if they differ by more than rounding explains.
    """
    reader, train = study.reader, study.train
    active = torch.stack([train.acts[node.site][:, node.feature].abs() for node in nodes]).sum(0)
    rows = active.topk(min(CHECKED_ROWS, len(active))).indices
    texts = tuple(train.texts[row] for row in rows.tolist())
    few = replace(train, texts=texts, x=train.x[rows], acts={site: acts[rows] for site, acts in train.acts.items()})
    batch = reader.model.tokens(list(texts))
    keep = reader.keep(batch, reader.model.capture(batch, [reader.probe_site]).flat(reader.probe_site))
    ablations = {
        site: (getattr(basis, "sae", basis), features)
        for site, basis in reader.bases.items() if (features := [n.feature for n in nodes if n.site == site])
    }  # fmt: skip
    again = pooled_by_hooks(reader.model, batch, keep, ablations, reader.probe_site)
    dtypes = [reader.model.dtype, *(basis.dtype for basis in reader.bases.values())]
    difference, allowed = require_same_edit(reader.ablated(few, nodes), again, few.x, dtypes)
    return EditCheck(difference, allowed, len(rows))


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
