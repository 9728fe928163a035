"""SCR and TPP at the SAE's own site: what ablating the features of one concept does to the probes of others.

Source: Karvonen et al. 2025 (SAEBench, arXiv 2503.09532), after SHIFT and targeted probe perturbation. Departures: the
direction of SCR is chosen on validation rows and not on the test, probes are solved to convergence and not stopped at
the best test accuracy, one-against-rest accuracies are balanced instead of on drawn rows, scores have intervals, and
random features and noise of the same size are controls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.decomposition import bases as checked_bases
from circuits.shift.deciders import Node
from circuits.shift.evidence import PooledTexts, Reader
from circuits.shift.resamples import Counts, estimate, resampled, share
from circuits.shift.task import NEEDS, ShiftTask
from circuits.shift.texts import LabelledTexts
from workbench.bases.base import Basis
from workbench.bases.fits import sae_site
from workbench.bases.sae import AnySAE
from workbench.controls.matching import matched_features
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError
from workbench.core.html import Shown
from workbench.core.numbers import counted, setting
from workbench.core.stats import ANY, Estimate, sample_mean
from workbench.models.model import Model
from workbench.probes.linear import Probe, ProbeOptions, fit_probe

if TYPE_CHECKING:
    import pandas as pd

MIN_ROOM = 0.001
"""SCR is 0 where the clean probe is not better than the biased one by at least this accuracy."""

Target = Literal["auto", "label", "attribute"]


@checked
@dataclass(frozen=True, kw_only=True)
class RemovalOptions(OneLine):
    """How SCR and TPP are measured.

    Attributes:
        n_features: how many features are ablated, one score for each number.
        random_draws: sets of random features, and draws of noise.
        validation: share of the balanced rows that no probe is fitted on, where SCR chooses its direction.
        probe: how probes are fitted.
        batch_size: texts per forward pass.
        seed: decides rows, random features and noise.
    """

    n_features: tuple[int, ...] = (2, 5, 10, 20, 50, 100, 500)
    random_draws: int = 10
    validation: float = 0.25
    probe: ProbeOptions = field(default_factory=lambda: ProbeOptions(folds=0))
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.n_features or min(self.n_features) < 1 or self.random_draws < 2:
            raise InvalidInputError(
                f"RemovalOptions(n_features={self.n_features}, random_draws={self.random_draws}): give numbers of "
                "features from 1, and two draws or more."
            )
        if not 0 < self.validation < 1:
            raise InvalidInputError(
                f"RemovalOptions(validation={setting(self.validation)}): needs more than 0, below 1."
            )


@dataclass(frozen=True, kw_only=True)
class RemovalRow(OneLine):
    """The score of one number of features.

    Attributes:
        n_features: how many were asked for.
        n_ablated: how many were ablated: those whose effect is not 0, at most.
        score: of the features with the largest effects; interval over test rows.
        random: of random features matched in frequency and norm, over draws; None if too few are active.
        noise: of noise in random directions, as large in every row as the ablation; over draws.
    """

    n_features: int
    n_ablated: int
    score: Estimate
    random: Estimate | None
    noise: Estimate


@checked
@dataclass(frozen=True, kw_only=True)
class RemovalScores(Shown):
    """SCR or TPP of an SAE.

    Attributes:
        name: "SCR" or "TPP".
        site: where SAE and probes read.
        ablated: whose features were ablated, and what was tested, in words.
        rows: one per number of features.
        accuracies: of the probes on test rows without ablation.
        notes: what keeps the score from saying anything, in sentences.
    """

    name: str
    site: str
    ablated: str
    rows: tuple[RemovalRow, ...]
    accuracies: tuple[tuple[str, Estimate], ...]
    notes: tuple[str, ...] = ()

    @checked
    def at(self, n_features: int) -> RemovalRow:
        """The row of this number of features.

        Raises:
            InvalidInputError: if it was not measured.
        """
        rows = {row.n_features: row for row in self.rows}
        if n_features not in rows:
            raise InvalidInputError(f"{self.name} at {n_features}: measured were {', '.join(map(str, rows))} features.")
        return rows[n_features]

    def frame(self) -> pd.DataFrame:
        """One row per number of features: score, random features and noise, each with the ends of its interval."""
        import pandas as pd

        return pd.DataFrame(
            {"n_features": row.n_features, "n_ablated": row.n_ablated}
            | {
                name + end: getattr(e, end[1:] or "value") if (e := getattr(row, name)) else None
                for name in ("score", "random", "noise") for end in ("", "_low", "_high")
            }
            for row in self.rows
        )  # fmt: skip

    def _shown_facts(self) -> Mapping[str, object]:
        scores = {f"{self.name} at {row.n_features}": f"{row.score}; random {row.random}" for row in self.rows}
        return {"ablated": self.ablated, **dict(self.accuracies), **scores, "notes": " ".join(self.notes)}

    def _shown_line(self) -> str:
        best = self.rows[0]
        return f"{self.name} at {best.n_features} features {best.score}; random features {best.random}"


@checked
def scr(
    model: Model, sae: AnySAE, task: ShiftTask, *, target: Target = "auto", options: RemovalOptions | None = None
) -> RemovalScores:
    """Spurious correlation removal: how much of the way to a clean probe ablating the other concept's features goes.

    `(A_ablated - A_biased) / (A_clean - A_biased)` on balanced test rows. The biased probe is fitted where label and
    attribute go together, the clean one on balanced rows, and so is the probe of the other concept, whose features with
    the largest `|mean activation difference x (w . decoder row)|` are ablated.

    Args:
        model: the model.
        sae: an SAE; probes read where it reads.
        task: two labels, two values of the attribute, balanced training rows.
        target: which concept the biased probe is tested for; by default the one that it gets wrong more often on
            validation rows.
        options: numbers of features, controls.

    Raises:
        MismatchError: if the task has no balanced rows, or not two labels and two values of the attribute.
    """
    options = options or RemovalOptions()
    if task.balanced is None or len(task.label_names) != 2 or len(task.spurious_names) != 2:
        what = NEEDS["balanced"] if task.balanced is None else f"{task.name} has other than two labels and attributes"
        raise MismatchError(f"scr: {what}. Give a task of two labels and two attributes, with balanced training rows.")
    reader = _reader(model, sae, task, options)
    train, balanced, test = (
        reader.read(rows.texts, "reading texts") for rows in (task.train, task.balanced, task.test)
    )
    fitted, held = _split(task.balanced, options)
    concepts = {"label": _array(task.balanced.label), "attribute": _array(task.expected(task.balanced))}
    tested = {"label": _array(task.test.label), "attribute": _array(task.expected(task.test))}
    probe = _fit(train.x, _array(task.train.label), reader, options)
    clean = {name: _fit(balanced.x[fitted], values[fitted], reader, options) for name, values in concepts.items()}
    guesses = probe.predict(balanced.x[held]).numpy()
    right = {name: float((guesses == values[held]).mean()) for name, values in concepts.items()}
    wanted = target if target != "auto" else "label" if right["label"] <= right["attribute"] else "attribute"
    other = "attribute" if wanted == "label" else "label"
    parts = Parts(reader, test, balanced, fitted, options)
    effect = np.abs(parts.effects(concepts[other], clean[other]))
    counts, everyone = resampled(len(task.test), options.seed), np.ones(len(task.test))
    before, best = (p.predict(test.x).numpy() == tested[wanted] for p in (probe, clean[wanted]))

    def score(x: Tensor) -> np.ndarray:
        after = probe.predict(x).numpy() == tested[wanted]
        low, high, now = (share(counts, hits, everyone) for hits in (before, best, after))
        room = high - low
        return np.divide(now - low, room, out=np.zeros_like(room), where=room >= MIN_ROOM)

    rows = tuple(parts.row(n, [effect], lambda xs: score(xs[0])) for n in options.n_features)
    accuracies = {"biased probe": before, "clean probe": best}
    room = float(best.mean() - before.mean())
    return RemovalScores(
        name="SCR", site=reader.probe_site, rows=rows,
        ablated=f"features of the {other}; the biased probe is tested for the {wanted}",
        accuracies=tuple((f"{name}, {wanted}", estimate(share(counts, hits, everyone), len(task.test)))
                         for name, hits in accuracies.items()),
        notes=() if room >= MIN_ROOM else ("The clean probe is no better than the biased one, so SCR is 0.",),
    )  # fmt: skip


@checked
def tpp(model: Model, sae: AnySAE, task: ShiftTask, *, options: RemovalOptions | None = None) -> RemovalScores:
    """Targeted probe perturbation: how much more ablating a label's features hurts its own probe than the others'.

    Mean over labels of the drop of the label's own one-against-rest accuracy, less the mean drop of the others'.
    Features are those with the largest `max(0, mean activation difference) x (w . decoder row)`.

    Args:
        model: the model.
        sae: an SAE; probes read where it reads.
        task: two labels or more; probes are fitted on its balanced rows if it has some, else on its training rows.
        options: numbers of features, controls.
    """
    options = options or RemovalOptions()
    source = task.balanced or task.train
    reader = _reader(model, sae, task, options)
    pooled, test = (reader.read(rows.texts, "reading texts") for rows in (source, task.test))
    label, tested = _array(source.label), _array(task.test.label)
    return targeted(Parts(reader, test, pooled, np.arange(len(label)), options), label, tested, task.label_names)


def targeted(parts: Parts, label: np.ndarray, tested: np.ndarray, names: Sequence[str]) -> RemovalScores:
    """TPP of texts that were read; `label` of those that probes and effects come from, `tested` of the others."""
    reader, options, k = parts.reader, parts.options, len(names)
    random = np.random.default_rng(options.seed)
    probes = []
    for y in range(k):
        own, rest = np.flatnonzero(label == y), np.flatnonzero(label != y)
        rows = np.sort(np.concatenate([own, random.permutation(rest)[: len(own)]]))
        probes.append(_fit(parts.seen.x[rows], (label[rows] == y).astype(int), reader, options))
    effects = [parts.effects((label == y).astype(int), probe, clamped=True) for y, probe in enumerate(probes)]
    counts = resampled(len(tested), options.seed)
    clean = [_balanced_accuracy(counts, probe, parts.test.x, tested == y) for y, probe in enumerate(probes)]

    def score(xs: Sequence[Tensor]) -> np.ndarray:
        drops = np.stack([
            [clean[j] - _balanced_accuracy(counts, probes[j], x, tested == j) for j in range(k)] for x in xs
        ])  # fmt: skip
        own = np.stack([drops[i, i] for i in range(k)])
        others = (drops.sum(axis=1) - own) / (k - 1)
        return (own - others).mean(axis=0)

    return RemovalScores(
        name="TPP", site=reader.probe_site,
        ablated=f"features of each of {counted(k, 'labels')} in turn; every label's own probe is tested",
        rows=tuple(parts.row(n, effects, score) for n in options.n_features),
        accuracies=tuple((name, estimate(values, len(tested))) for name, values in zip(names, clean, strict=True)),
    )  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """What scores are made of: test rows, and the rows that effects come from."""

    reader: Reader
    test: PooledTexts
    seen: PooledTexts
    fitted: Int[np.ndarray, " rows"]
    options: RemovalOptions

    @property
    def basis(self) -> Basis:
        """The SAE."""
        return self.reader.bases[self.reader.probe_site]

    def effects(self, concept: np.ndarray, probe: Probe, clamped: bool = False) -> Float[np.ndarray, " d_sae"]:
        """`(mean over class 1 - mean over class 0) x (w . decoder row)`, the difference at least 0 if `clamped`."""
        acts, one = self.seen.acts[self.reader.probe_site].double().numpy()[self.fitted], concept[self.fitted] == 1
        difference = acts[one].mean(axis=0) - acts[~one].mean(axis=0)
        writes = (self.basis.rows().to(probe.w).cpu() @ probe.w.cpu()).double().numpy()
        return (np.maximum(difference, 0) if clamped else difference) * writes

    def row(self, n: int, effects: Sequence[np.ndarray], score: Callable[[Sequence[Tensor]], np.ndarray]) -> RemovalRow:
        """The score of `n` features of each kind of effect, with its controls."""
        tops = [top_features(effect, n) for effect in effects]
        ablated = [self._without(top) for top in tops]
        random = np.random.default_rng(self.options.seed)
        noise = [
            score([self._noisy(x, random) for x in ablated])[0] for _ in range(self.options.random_draws)
        ]  # fmt: skip
        return RemovalRow(
            n_features=n, n_ablated=max(map(len, tops)), score=estimate(score(ablated), len(self.test.texts)),
            random=self._random(tops, score), noise=sample_mean(np.array(noise), unit="draws", within=ANY),
        )  # fmt: skip

    def _without(self, features: Sequence[int]) -> Float[Tensor, "rows d"]:
        return self.reader.ablated(self.test, [Node(self.reader.probe_site, feature) for feature in features])

    def _noisy(self, ablated: Tensor, random: np.random.Generator) -> Tensor:
        """The test rows moved as far as the ablation moves them, each in a random direction."""
        moved = (ablated - self.test.x).norm(dim=1, keepdim=True)
        direction = torch.from_numpy(random.standard_normal(tuple(ablated.shape))).to(ablated)
        return self.test.x + moved * direction / direction.norm(dim=1, keepdim=True)

    def _random(
        self, tops: Sequence[Sequence[int]], score: Callable[[Sequence[Tensor]], np.ndarray]
    ) -> Estimate | None:
        site, draws = self.reader.probe_site, self.options.random_draws
        norm = self.basis.rows().norm(dim=1).cpu()
        try:
            sets = [
                matched_features(top, self.seen.frequency[site], draws, norm=norm, seed=self.options.seed + i)
                if top else ((),) * draws for i, top in enumerate(tops)
            ]  # fmt: skip
        except DegenerateInputError:  # fewer features are active than the set needs
            return None
        values = [score([self._without(of_top[draw]) for of_top in sets])[0] for draw in range(draws)]
        return sample_mean(np.array(values), unit="draws", within=ANY)


def top_features(effect: Float[np.ndarray, " d_sae"], n: int) -> tuple[int, ...]:
    """The features with the largest effects, of those above 0.

    >>> top_features(np.array([0.0, 3.0, -1.0, 5.0]), 3)
    (3, 1)
    """
    order = np.argsort(-effect, kind="stable")[:n]
    return tuple(int(feature) for feature in order if effect[feature] > 0)


def _reader(model: Model, sae: AnySAE, task: ShiftTask, options: RemovalOptions) -> Reader:
    placed = checked_bases(model, {sae_site(sae): sae})
    for basis in placed.values():
        basis.refuse_transcoder("SCR and TPP")
    (site,) = placed
    return Reader.fitted(model, placed, site, task.train.texts, options.batch_size)


def _split(rows: LabelledTexts, options: RemovalOptions) -> tuple[np.ndarray, np.ndarray]:
    """Rows that probes are fitted on and rows for validation, the same share of every group."""
    random, held = np.random.default_rng(options.seed), []
    for group in rows.counts():
        of_group = [row for row, other in enumerate(rows.groups) if other == group]
        held += random.permutation(of_group)[: max(1, round(options.validation * len(of_group)))].tolist()
    fitted = sorted(set(range(len(rows))) - set(held))
    return np.array(fitted, dtype=int), np.array(sorted(held), dtype=int)


def _fit(x: Tensor, labels: np.ndarray, reader: Reader, options: RemovalOptions) -> Probe:
    return fit_probe(x, torch.from_numpy(labels), reader.probe_site, options=replace(options.probe, folds=0))


def _balanced_accuracy(counts: Counts, probe: Probe, x: Tensor, member: np.ndarray) -> np.ndarray:
    """Mean of the accuracies on members and on others, in each resample."""
    hits = (probe.predict(x).numpy() == 1) == member
    return (share(counts, hits, member.astype(float)) + share(counts, hits, (~member).astype(float))) / 2


def _array(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=int)
