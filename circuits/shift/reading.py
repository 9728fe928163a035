"""What a SHIFT study starts from: its options, its texts once read, its candidate features and their dossiers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from circuits.decomposition import bases as checked_bases
from circuits.decomposition import refuse_unreached
from circuits.nodes.effects import SiteEffects
from circuits.shift.deciders import BalancedEvidence, FeatureDossier, Node
from circuits.shift.effects import ints
from circuits.shift.evidence import PooledTexts, Reader, TokenEvidence, token_evidence
from circuits.shift.needs import Need
from circuits.shift.options import ShiftOptions
from circuits.shift.table.bases import read_along
from circuits.shift.task import ShiftStudy, ShiftTask
from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE
from workbench.core.arguments import checked
from workbench.core.display import first_few
from workbench.core.errors import InvalidInputError
from workbench.models.model import Model
from workbench.probes.linear import fit_probe


def of_two_labels(task: ShiftTask, options: ShiftOptions) -> ShiftTask:
    """The task itself, or that of `options.positive` against the rest.

    Raises:
        InvalidInputError: if the task has more than two labels and none is named.
    """
    if options.positive is not None:
        return task.one_against_rest(options.positive)
    if len(task.label_names) > 2:
        raise InvalidInputError(
            f"shift: the task has {len(task.label_names)} labels ({first_few(task.label_names, 4)}), and the probe "
            "tells two apart. Give ShiftOptions(positive=...) the one that is told from all others."
        )
    return task


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
        InvalidInputError: if the task has more than two labels and `options.positive` is not given.
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
    probe = fit_probe(train.x, ints(task.train.label), probe_site, groups=groups, options=options.probe)
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

    task, balanced = study.task, study.task.balanced
    evidence = None
    if balanced is not None:
        shortcut = np.array(task.expected(balanced), float)
        evidence = BalancedEvidence(column(study.balanced), np.array(balanced.label, float), shortcut)
    return FeatureDossier(
        node=node, effect=effect, acts=column(study.train),
        swapped=None if task.swapped is None else column(study.swapped), label=np.array(task.train.label, float),
        top_tokens=tokens.top_tokens, spurious_share=tokens.spurious_share, target_share=tokens.target_share,
        n_tokens=tokens.n_tokens, balanced=evidence, contexts=tokens.contexts,
    )  # fmt: skip
