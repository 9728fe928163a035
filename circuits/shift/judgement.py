"""From a study's effects to what is ablated: candidates, their dossiers, verdicts, and matched random features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from circuits.nodes.effects import SiteEffects
from circuits.shift.deciders import Decider, FeatureDossier, Node, OracleDecider, Verdict
from circuits.shift.editcheck import pooled_by_hooks, require_same_edit
from circuits.shift.effects import contrasted, effects_on
from circuits.shift.judging.prepare import prepared
from circuits.shift.multiclass import contrasts
from circuits.shift.reading import dossiers_of, strongest
from circuits.shift.rows import EditCheck
from circuits.shift.task import Judged, ShiftStudy
from circuits.shift.texts import LabelledTexts
from workbench.controls.matching import matched_features


@dataclass(frozen=True, eq=False, kw_only=True)
class Judgement:
    """What a judge made of the features of a study.

    Attributes:
        effects: effects on the label's margin per site.
        decider: the judge, after it has seen the training texts.
        dossiers: the candidates, strongest effect first.
        verdicts: one per candidate.
        oracle: those of the oracle judge; None without balanced rows.
    """

    effects: Mapping[str, SiteEffects]
    decider: Decider
    dossiers: tuple[FeatureDossier, ...]
    verdicts: tuple[Verdict, ...]
    oracle: tuple[Verdict, ...] | None

    @property
    def candidates(self) -> tuple[Node, ...]:
        """The features that were judged."""
        return tuple(dossier.node for dossier in self.dossiers)

    @property
    def chosen(self) -> tuple[Node, ...]:
        """Features that the judge calls spurious."""
        return _spurious(self.verdicts)

    @property
    def oracle_chosen(self) -> tuple[Node, ...]:
        """Features that the oracle judge calls spurious."""
        return _spurious(self.oracle or ())


def judge_features(study: ShiftStudy, decider: Decider) -> Judgement:
    """Ranks the features of the study's bases by effect and puts the strongest before the judge.

    None is a candidate where no effect is above the threshold.
    """
    options = study.options
    effects = effects_on(study, study.train, study.task.train.label, options.attribution, options.attribution_rows)
    candidates = strongest(effects, options.top_k, options.min_effect)
    decider, dossiers = prepared(decider, study, candidates), tuple(dossiers_of(study, candidates))
    oracle = None if study.task.balanced is None else tuple(OracleDecider()(dossier) for dossier in dossiers)
    verdicts = tuple(decider(d if decider.is_oracle else replace(d, balanced=None)) for d in dossiers)
    return Judgement(effects=effects, decider=decider, dossiers=dossiers, verdicts=verdicts, oracle=oracle)


def judged(study: ShiftStudy, judgement: Judgement) -> ShiftStudy:
    """The study with what was chosen, and as many random features."""
    chosen = judgement.chosen
    draws = random_features(study, chosen)
    return replace(
        study, judged=Judged(chosen=chosen, oracle=judgement.oracle_chosen, draws=draws, by=judgement.decider)
    )


def _spurious(verdicts: Sequence[Verdict]) -> tuple[Node, ...]:
    return tuple(verdict.node for verdict in verdicts if verdict.decision == "spurious")


def random_features(study: ShiftStudy, chosen: Sequence[Node]) -> tuple[tuple[Node, ...], ...]:
    """For each draw as many other features as chosen, each matched to the one at the same site that it stands for."""
    n_draws, seed = study.options.random_draws, study.options.seed
    draws: list[dict[Node, Node]] = [{} for _ in range(n_draws)]
    for site, basis in study.reader.bases.items():
        nodes = [node for node in chosen if node.site == site]
        if nodes:
            matched = matched_features(
                [node.feature for node in nodes], study.train.frequency[site], n_draws,
                norm=basis.rows().norm(dim=1), seed=seed,
            )  # fmt: skip
            for draw, features in zip(draws, matched, strict=True):
                draw |= {node: Node(site, feature) for node, feature in zip(nodes, features, strict=True)}
    return tuple(tuple(draw[node] for node in chosen) for draw in draws)


def most_effective(study: ShiftStudy, n: int) -> tuple[Node, ...]:
    """As many features, by their effect on the attribute's margin over balanced training rows."""
    balanced = study.task.balanced
    if n == 0 or balanced is None:
        return ()
    effects = _on_the_attribute(study, balanced)
    scores = [
        (effect, Node(site, f)) for site, part in effects.items() for f, effect in enumerate(part.effect.tolist())
    ]
    return tuple(node for _, node in sorted(scores, key=lambda pair: -pair[0])[:n])


def _on_the_attribute(study: ShiftStudy, balanced: LabelledTexts) -> Mapping[str, SiteEffects]:
    """Effects on the margin of the labels that each row's attribute goes with."""
    task, options = study.task, study.options
    if len(task.label_names) == 2:
        return effects_on(study, study.balanced, task.expected(balanced), options.attribution, options.attribution_rows)
    values, contrast = balanced.spurious or (), contrasts(task.together().T)
    return contrasted(study, study.balanced, values, contrast, options.attribution, options.attribution_rows)


CHECKED_ROWS = 8
"""Texts on which the edit is made a second time."""


def edit_check(study: ShiftStudy, nodes: Sequence[Node]) -> EditCheck:
    """The ablation against one by plain hooks, on the training texts on which these features are most active.

    Without features, on the most frequent feature of each site.

    Raises:
        EditError: if they differ by more than rounding explains.
    """
    reader, train = study.reader, study.train
    nodes = nodes or [Node(site, int(share.argmax())) for site, share in train.frequency.items()]
    active = torch.stack([train.acts[node.site][:, node.feature].abs() for node in nodes]).sum(0)
    rows = active.topk(min(CHECKED_ROWS, len(active))).indices
    texts = tuple(train.texts[row] for row in rows.tolist())
    few = replace(
        train,
        texts=texts,
        x=train.x[rows],
        acts={site: acts[rows] for site, acts in train.acts.items()},
        others={},
        keep=(),
    )
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
