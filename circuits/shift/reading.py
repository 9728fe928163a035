"""What a SHIFT study starts from: its options, its texts once read, its candidate features and their dossiers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from circuits.decomposition import bases as checked_bases
from circuits.decomposition import refuse_unreached
from circuits.nodes.effects import SiteEffects
from circuits.shift.deciders import BalancedEvidence, FeatureDossier, Node
from circuits.shift.evidence import PooledTexts, Reader, TokenEvidence, token_evidence
from circuits.shift.multiclass import probe_of, side_of
from circuits.shift.needs import Need
from circuits.shift.options import ShiftOptions
from circuits.shift.table.bases import read_along
from circuits.shift.task import ShiftStudy, ShiftTask
from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.models.model import Model


def of_two_labels(task: ShiftTask, options: ShiftOptions) -> ShiftTask:
    """The task itself, or that of `options.positive` against the rest."""
    return task if options.positive is None else task.one_against_rest(options.positive)


@checked
def read_study(
    model: Model,
    bases: Mapping[str, AnySAE],
    task: ShiftTask,
    options: ShiftOptions | None = None,
    *,
    needs: Iterable[str] = (),
) -> ShiftStudy:
    """Reads every text of a task once, and fits the probe: what `circuits.shift` and its relatives start from.

    Args:
        model: the model.
        bases: an SAE per site.
        task: labelled texts.
        options: probe site, label, batch size.
        needs: further bases that are read in the same passes: "neurons", "tokens".

    Raises:
        MismatchError: if an SAE was made for another model or site or is a transcoder, or the probe reads where no
            feature of an SAE can reach it.
    """
    options = options or ShiftOptions()
    task = of_two_labels(task, options)
    placed = checked_bases(model, bases)
    for basis in placed.values():
        basis.refuse_transcoder("SHIFT")
    return _read(model, placed, task, options, set(needs))


def _read(
    model: Model, bases: Mapping[str, Basis], task: ShiftTask, options: ShiftOptions, needs: set[str]
) -> ShiftStudy:
    probe_site = str(model.resolve(options.probe_site or list(bases)[-1]))
    refuse_unreached(model, bases, probe_site, "The probe")
    reader = Reader.fitted(model, bases, probe_site, task.train.texts, options.batch_size)
    reader = replace(reader, along=read_along(needs, model, bases, task.train.texts))
    train = reader.read(task.train.texts, "reading ambiguous texts")
    groups = tuple(task.group_name(*group) for group in task.train.groups)
    probe = probe_of(train.x, task.train.label, probe_site, options.probe, groups)
    if probe.accuracy is None:
        raise InvalidInputError(
            "ShiftOptions(probe=ProbeOptions(folds=0)): the study reports cross-validation; use 2 or more."
        )
    others: dict[Need, PooledTexts] = {}
    if task.swapped is not None:
        others["twins"] = reader.read(task.swapped, "reading swapped texts")
    if task.balanced is not None:
        others["balanced"] = reader.read(task.balanced.texts, "reading balanced texts")
    test = reader.read(task.test.texts, "reading test texts")
    return ShiftStudy(task=task, options=options, reader=reader, train=train, test=test, others=others, probe=probe)


def strongest(effects: Mapping[str, SiteEffects], top_k: int, above: float = 0.0) -> list[tuple[Node, float]]:
    """The features that support the label most, by more than `above`; those that oppose it are never candidates."""
    supporting = [
        (Node(site, f), effect)
        for site, part in effects.items() for f, effect in enumerate(part.effect.tolist()) if effect > above
    ]  # fmt: skip
    return sorted(supporting, key=lambda pair: -pair[1])[:top_k]


def nodes_of(candidates: Sequence[tuple[Node, float]]) -> list[Node]:
    """The features without their effects."""
    return [node for node, _ in candidates]


def dossiers_of(study: ShiftStudy, candidates: Sequence[tuple[Node, float]]) -> list[FeatureDossier]:
    """The evidence on each candidate."""
    task = study.task
    words = (task.spurious_words, task.target_words)
    contexts = token_evidence(study.reader, task.train.texts, nodes_of(candidates), words) if candidates else {}
    return [_dossier(study, node, effect, contexts[node]) for node, effect in candidates]


def _dossier(study: ShiftStudy, node: Node, effect: float, tokens: TokenEvidence) -> FeatureDossier:
    def column(pooled: PooledTexts) -> np.ndarray:
        return pooled.acts[node.site][:, node.feature].double().cpu().numpy()

    task, balanced, acts = study.task, study.task.balanced, column(study.train)
    labels, of_value = _sides(task, acts)
    evidence = None
    if balanced is not None:
        own, shortcut = labels[1][list(balanced.label)], of_value[list(balanced.spurious or ())]
        evidence = BalancedEvidence(column(study.balanced), own.astype(float), shortcut.astype(float))
    return FeatureDossier(
        node=node, effect=effect, acts=acts,
        swapped=None if task.swapped is None else column(study.swapped),
        label=labels[0][list(task.train.label)].astype(float),
        top_tokens=tokens.top_tokens, spurious_share=tokens.spurious_share, target_share=tokens.target_share,
        n_tokens=tokens.n_tokens, balanced=evidence, contexts=tokens.contexts,
    )  # fmt: skip


def _sides(task: ShiftTask, acts: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Which labels a judge tells from the others, which label an oracle does, and which values go with them.

    Of two labels the second in each case. Of more, the labels that share the usual value of the attribute with the one
    that the feature is most active on, and this one.
    """
    n, known = len(task.label_names), bool(task.spurious_names)
    if n == 2:
        second = np.arange(2) == 1
        return (second, second), np.array([label == 1 for label in task.shortcut()] if known else [], dtype=bool)
    usual = task.usual() if known else None
    strongest, side = side_of(acts, np.array(task.train.label), usual)
    values = np.array([] if usual is None else np.arange(len(task.spurious_names)) == usual[strongest], dtype=bool)
    return (side, np.arange(n) == strongest), values
