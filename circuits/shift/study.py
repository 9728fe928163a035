"""SHIFT: find the SAE features that carry a spurious attribute into a probe, have them judged, ablate them.

Source: Marks et al. 2025 (arXiv 2403.19647), section 4. Departures: the judge is a statistic and not a person; the
probe may stand at the SAE's own site, where effects are exact; random features, word deletion, the skyline, the oracle
and intervals are always part of the result.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution import AttributionOptions, LossOfMargin, NodeEffects, linear_effects, node_effects
from circuits.bases import bases_at, refuse_unreached
from circuits.shift.collateral import collateral
from circuits.shift.editcheck import pooled_by_hooks, require_same_edit
from circuits.shift.evidence import PooledTexts, Reader, TokenEvidence, token_evidence
from circuits.shift.feature_judges import (
    BalancedEvidence,
    FeatureDossier,
    Judge,
    Node,
    OracleJudge,
    StatisticsJudge,
    Verdict,
)
from circuits.shift.methods import Scorer
from circuits.shift.shift_report import AttributionRow, EditCheck, JudgedFeature, ShiftReport
from circuits.shift.task import ShiftTask, delete_words
from workbench.bases.saecode import Basis
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model
from workbench.probes.linear import Probe, ProbeOptions, fit_probe


@dataclass(frozen=True, kw_only=True)
class ShiftOptions:
    """How a SHIFT study is run.

    Attributes:
        probe_site: where the probe reads; by default at the last SAE's own site, where effects are exact.
        top_k: how many features, strongest effect first, are put before the judge.
        random_draws: sets of random features in the control.
        probe: how probes are fitted.
        attribution: how effects are estimated where they are not exact.
        attribution_rows: ambiguous training rows that the estimate uses.
        batch_size: texts per forward pass.
        seed: decides the random features.
    """

    probe_site: str | None = None
    top_k: int = 64
    random_draws: int = 10
    probe: ProbeOptions = field(default_factory=ProbeOptions)
    attribution: AttributionOptions = field(default_factory=AttributionOptions)
    attribution_rows: int = 64
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "random_draws", "attribution_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"ShiftOptions({name}={getattr(self, name)}): needs at least 1.")


@dataclass(frozen=True, eq=False)
class _Study:
    """What all steps share: the texts once read, and the probe that is to be repaired."""

    task: ShiftTask
    reader: Reader
    options: ShiftOptions
    train: PooledTexts
    swapped: PooledTexts
    balanced: PooledTexts
    test: PooledTexts
    probe: Probe

    def refit(self, x: Float[Tensor, "rows d"]) -> Probe:
        """A probe on other activations of the ambiguous set."""
        return fit_probe(
            x, _ints(self.task.train.label), self.reader.probe_site, options=replace(self.options.probe, folds=0)
        )


def shift(
    model: Model,
    bases: Mapping[str, Any],
    task: ShiftTask,
    judge: Judge | None = None,
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
        task: labelled texts; see `circuits.shift.biographies`.
        judge: decides on each candidate; by default `StatisticsJudge`. Only a judge that says `is_oracle` is given
            balanced labels, and no judge sees a test row.
        options: probe site, number of candidates, controls.
        plain_text: other text, on which the loss is measured with and without the ablation.

    Raises:
        MismatchError: if an SAE was made for another model or site or is a transcoder, or the probe reads where no
            feature of an SAE can reach it.
        ShapeError: if an SAE has another width than its site.
        EditError: if the ablation differs from the one made by plain hooks with the SAE's own encode and decode.
    """
    options, judge = options or ShiftOptions(), judge or StatisticsJudge()
    study = _read(model, bases_at(model, bases), task, options)
    effects = _effects(study, study.train, task.train.label)
    candidates = _candidates(effects, options.top_k)
    dossiers = _dossiers(study, candidates)
    verdicts = [judge(d if judge.is_oracle else replace(d, balanced=None)) for d in dossiers]
    oracle = [OracleJudge()(dossier) for dossier in dossiers]
    chosen, oracle_chosen = _spurious(verdicts), _spurious(oracle)
    edit_check = _edit_check(study, chosen or _nodes(candidates))
    draws = _random_features(study, chosen)
    scorer = _score(study, judge, chosen, oracle_chosen, draws)
    probe = study.probe
    assert probe.accuracy is not None and probe.shuffled is not None
    return ShiftReport(
        task=task.name, label_name=" or ".join(task.label_names), spurious_name=" or ".join(task.spurious_names),
        probe_site=study.reader.probe_site, probe=probe.accuracy, shuffled=probe.shuffled, tokens=_tokens_text(study),
        judge=judge.name, judge_information=judge.information, attribution=_attribution_rows(effects),
        verdicts=tuple(_judged(d, v, o) for d, v, o in zip(dossiers, verdicts, oracle, strict=True)),
        methods=tuple(scorer.rows), comparisons=_comparisons(scorer), random_draws=len(draws),
        edit_check=edit_check,
        collateral=None if plain_text is None else collateral(study.reader, plain_text, chosen, draws),
    )  # fmt: skip


def _read(model: Model, bases: Mapping[str, Basis], task: ShiftTask, options: ShiftOptions) -> _Study:
    probe_site = str(model.resolve(options.probe_site or list(bases)[-1]))
    refuse_unreached(model, bases, probe_site, "The probe")
    reader = Reader.fitted(model, bases, probe_site, task.train.texts, options.batch_size)
    train = reader.read(task.train.texts, "reading ambiguous texts")
    groups = tuple(task.group_name(a, b) for a, b in zip(task.train.label, task.train.spurious, strict=True))
    probe = fit_probe(train.x, _ints(task.train.label), probe_site, groups=groups, options=options.probe)
    if probe.accuracy is None:
        raise InvalidInputError(
            "ShiftOptions(probe=ProbeOptions(folds=0)): the study reports cross-validation; use 2 or more."
        )
    swapped = reader.read(task.swapped, "reading swapped texts")
    balanced = reader.read(task.balanced.texts, "reading balanced texts")
    test = reader.read(task.test.texts, "reading test texts")
    return _Study(task, reader, options, train, swapped, balanced, test, probe)


def _effects(study: _Study, pooled: PooledTexts, labels: Sequence[int]) -> dict[str, NodeEffects]:
    """Effects on the margin of some labels of these texts; exact where they can be."""
    reader, options = study.reader, study.options
    if reader.is_linear:
        site = reader.probe_site
        return {site: linear_effects(pooled.acts[site], reader.bases[site].sae, study.probe, _ints(labels))}
    rows = _rows_of_each(labels, options.attribution_rows)
    batch = reader.model.tokens([pooled.texts[row] for row in rows])
    keep = reader.keep(batch, reader.model.capture(batch, [reader.probe_site]).flat(reader.probe_site))
    metric = LossOfMargin(study.probe, _ints([labels[row] for row in rows]), keep)
    saes = {site: basis.sae for site, basis in reader.bases.items()}
    return node_effects(reader.model, saes, batch, metric, keep=keep, options=options.attribution)


def _rows_of_each(labels: Sequence[int], n: int) -> list[int]:
    """The first rows of each label in turn, `n` in all, in their order.

    >>> _rows_of_each([0, 0, 0, 0, 1, 1], 4)
    [0, 1, 4, 5]
    """
    of_label: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        of_label.setdefault(label, []).append(row)
    ranked = sorted((i, row) for rows in of_label.values() for i, row in enumerate(rows))
    return sorted(row for _, row in ranked[:n])


def _candidates(effects: Mapping[str, NodeEffects], top_k: int) -> list[tuple[Node, float]]:
    """The features that support the label most; those that oppose it are never candidates."""
    found = [
        (Node(site, f), effect)
        for site, part in effects.items() for f, effect in enumerate(part.effect.tolist()) if effect > 0
    ]  # fmt: skip
    if not found:
        raise DegenerateInputError(
            "shift: no feature supports the label, so there is nothing to judge. Is the SAE on the probe's path?"
        )
    return sorted(found, key=lambda pair: -pair[1])[:top_k]


def _nodes(candidates: Sequence[tuple[Node, float]]) -> list[Node]:
    """The features without their effects."""
    return [node for node, _ in candidates]


def _dossiers(study: _Study, candidates: Sequence[tuple[Node, float]]) -> list[FeatureDossier]:
    task = study.task
    words = (task.spurious_words, task.target_words)
    contexts = token_evidence(study.reader, task.train.texts, _nodes(candidates), words)
    return [_dossier(study, node, effect, contexts[node]) for node, effect in candidates]


def _dossier(study: _Study, node: Node, effect: float, tokens: TokenEvidence) -> FeatureDossier:
    def column(pooled: PooledTexts) -> np.ndarray:
        return pooled.acts[node.site][:, node.feature].double().cpu().numpy()

    balanced = study.task.balanced
    evidence = BalancedEvidence(
        column(study.balanced), np.array(balanced.label, float), np.array(balanced.spurious, float)
    )
    return FeatureDossier(
        node, effect, column(study.train), column(study.swapped), np.array(study.task.train.label, float),
        tokens.top_tokens, tokens.spurious_share, tokens.target_share, tokens.n_tokens, evidence,
    )  # fmt: skip


def _spurious(verdicts: Sequence[Verdict]) -> list[Node]:
    return [verdict.node for verdict in verdicts if verdict.decision == "spurious"]


NEIGHBOURS = 20
"""From how many features of the closest activation frequency a random one is drawn."""


def _random_features(study: _Study, chosen: Sequence[Node]) -> list[list[Node]]:
    """For each draw, as many other active features as chosen, each of about the frequency of the one it stands for."""
    return [
        _matched(study, chosen, random.Random(f"{study.options.seed}/random/{draw}"))
        for draw in range(study.options.random_draws)
    ]


def _matched(study: _Study, chosen: Sequence[Node], rng: random.Random) -> list[Node]:
    taken, drawn = set(chosen), []
    for node in chosen:
        frequency = study.train.frequency[node.site]
        distance = (frequency - frequency[node.feature]).abs().masked_fill(frequency == 0, float("inf"))
        nearest = distance.argsort()[: int((frequency > 0).sum())]
        near = [Node(node.site, f) for f in nearest.tolist() if Node(node.site, f) not in taken]
        if not near:
            raise DegenerateInputError(
                f"shift: {len(chosen)} features were judged spurious, and {node.site} has too few other active "
                "features for a random control of as many. Use a larger SAE, or put fewer candidates before the judge "
                "(top_k)."
            )
        pick = rng.choice(near[:NEIGHBOURS])
        taken.add(pick)
        drawn.append(pick)
    return drawn


def _skyline(study: _Study, n: int) -> list[Node]:
    """As many features as SHIFT ablated, by their effect on the attribute's margin over balanced training rows."""
    if n == 0:
        return []
    effects = _effects(study, study.balanced, study.task.balanced.spurious)
    scores = [
        (effect, Node(site, f)) for site, part in effects.items() for f, effect in enumerate(part.effect.tolist())
    ]
    return [node for _, node in sorted(scores, key=lambda pair: -pair[0])[:n]]


def _score(
    study: _Study, judge: Judge, chosen: list[Node], oracle_chosen: list[Node], draws: list[list[Node]]
) -> Scorer:
    """Every method on the test set."""
    scorer, reader, test = Scorer(study.task), study.reader, study.test
    scorer.add("original", "nothing else", 0, [study.probe.predict(test.x)])

    def ablation(name: str, information: str, sets: Sequence[Sequence[Node]], *, is_random: bool = False) -> None:
        edited = [(reader.ablated(study.train, nodes), reader.ablated(test, nodes)) for nodes in sets]
        n = len(sets[0])
        kept = [study.probe.predict(there) for _, there in edited]
        retrained = [study.refit(here).predict(there) for here, there in edited]
        scorer.add(name, information, n, kept, is_random=is_random)
        scorer.add(f"{name} + retrain", information, n, retrained, is_random=is_random)

    ablation("random features", f"activation frequencies; mean of {len(draws)} draws", draws, is_random=True)
    ablation("SHIFT", judge.information, [chosen])
    ablation("SHIFT, oracle judge", OracleJudge.information, [oracle_chosen])
    ablation("skyline", "attribute labels of balanced training rows", [_skyline(study, len(chosen))])
    deleted = [
        reader.read([delete_words(text, study.task.spurious_words) for text in part.texts], "reading without words")
        for part in (study.train, test)
    ]  # fmt: skip
    scorer.add("gendered words deleted", "the word list; the probe is trained and tested on the shorter texts", 0,
               [study.refit(deleted[0].x).predict(deleted[1].x)])  # fmt: skip
    direction = _swap_direction(study)
    scorer.add("swap direction removed", "the swapped texts: their mean difference, projected out; probe retrained", 0,
               [study.refit(_without(study.train.x, direction)).predict(_without(test.x, direction))])  # fmt: skip
    oracle = fit_probe(
        study.balanced.x,
        _ints(study.task.balanced.label),
        reader.probe_site,
        options=replace(study.options.probe, folds=0),
    )
    scorer.add("oracle probe", "label of balanced training rows", 0, [oracle.predict(test.x)])
    return scorer


def _swap_direction(study: _Study) -> Tensor:
    """Unit direction from attribute 0 to attribute 1, the mean over training texts and their swapped versions."""
    sign = 2.0 * _ints(study.task.train.spurious).to(study.train.x) - 1.0
    direction = (sign[:, None] * (study.train.x - study.swapped.x)).mean(0)
    if not bool(direction.norm() > 0):
        raise DegenerateInputError(
            "shift: the swapped texts equal the training texts at the probe's site. Swap the attribute's words."
        )
    return direction / direction.norm()


def _without(x: Tensor, direction: Tensor) -> Tensor:
    return x - (x @ direction)[:, None] * direction


def _comparisons(scorer: Scorer) -> tuple[Any, ...]:
    pairs = (
        ("SHIFT", "random features"), ("SHIFT", "original"), ("SHIFT + retrain", "random features + retrain"),
        ("SHIFT + retrain", "original"), ("SHIFT + retrain", "swap direction removed"),
    )  # fmt: skip
    return tuple(scorer.compare(better, other) for better, other in pairs)


CHECKED_ROWS = 8
"""Texts on which the edit is made a second time."""


def _edit_check(study: _Study, nodes: Sequence[Node]) -> EditCheck:
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
        site: (basis.sae, features)
        for site, basis in reader.bases.items() if (features := [n.feature for n in nodes if n.site == site])
    }  # fmt: skip
    again = pooled_by_hooks(reader.model, batch, keep, ablations, reader.probe_site)
    dtypes = [reader.model.dtype, *(basis.sae.W_dec.dtype for basis in reader.bases.values())]
    difference, allowed = require_same_edit(reader.ablated(few, nodes), again, few.x, dtypes)
    return EditCheck(difference, allowed, len(rows))


def _judged(dossier: FeatureDossier, verdict: Verdict, oracle: Verdict) -> JudgedFeature:
    return JudgedFeature(
        str(dossier.node), dossier.effect, verdict.decision, oracle.decision, verdict.why, dossier.top_tokens,
        dossier.spurious_share, dossier.target_share,
    )  # fmt: skip


def _attribution_rows(effects: Mapping[str, NodeEffects]) -> tuple[AttributionRow, ...]:
    return tuple(
        AttributionRow(e.site, e.method, e.total, e.gap, e.n_rows, int((e.effect > 0).sum())) for e in effects.values()
    )


def _tokens_text(study: _Study) -> str:
    read, left_out = study.train.n_tokens, study.train.n_left_out
    share = f"{left_out} of {read + left_out} left out"
    return f"all tokens but padding, special tokens, the first one and attention sinks ({share})"


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
