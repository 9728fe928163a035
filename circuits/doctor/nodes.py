"""Effects of nodes in the form that the doctor examines: one attribution per site, on some of the inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.doctor import models
from circuits.doctor.attribution import Attribution, LabelledScores, Make
from circuits.doctor.toys import method_of
from circuits.graph.names import ERROR
from circuits.metrics import AnyMetric, Examples, LossOfMargin, Metric, UnboundMetric, bound
from circuits.nodes.attribute import node_effects
from circuits.nodes.effects import NodeEffects, SiteEffects
from circuits.nodes.runs import AttributionOptions, Method, Rule, runs_of
from circuits.nodes.setting import BASELINES, Setting, States, setting_of
from circuits.pairs import Pairs
from workbench.bases.base import Basis
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.numbers import counted
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model

_SAME = 1e-3
"""How far scores made again may be from those examined, relative to the largest."""


@dataclass(frozen=True, eq=False)
class ChosenRows:
    """A metric of some rows, counted anew."""

    metric: Metric
    index: Int[Tensor, " rows"]

    @property
    def site(self) -> str:
        """Where the metric reads."""
        return self.metric.site

    @property
    def name(self) -> str:
        """For people."""
        return str(getattr(self.metric, "name", type(self.metric).__name__))

    @property
    def tokens(self) -> Tensor | None:
        """The tokens of each row whose logits it takes."""
        tokens: Tensor | None = getattr(self.metric, "tokens", None)
        return None if tokens is None else tokens[self.index.to(tokens.device)]

    def __call__(self, x: Tensor, rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """One number per row."""
        return self.metric(x, self.index.to(rows.device)[rows])


@dataclass(frozen=True, eq=False, kw_only=True)
class NodeCase:
    """What effects of nodes were made of, and how.

    Attributes:
        model: the model.
        bases: a basis per site.
        examples: pairs or texts.
        metric: what the effects are on.
        keep: the tokens that are patched.
        method: the estimator, with its steps and rule.
        seed: of what is drawn.
    """

    model: Model
    bases: Mapping[str, Basis]
    examples: Examples
    metric: AnyMetric
    keep: Bool[Tensor, "batch pos"] | None = None
    method: Method = "ig"
    steps: int = 10
    rule: Rule = "midpoint"
    batch_size: int = 64
    seed: int = 0

    def of_rows(self, index: Tensor) -> NodeCase:
        """The same for some inputs, with the padding of all."""
        examples = self.examples
        metric = bound(self.metric, self.model, examples)
        pairs = examples if isinstance(examples, Pairs) else None

        def some(batch: TokenBatch) -> TokenBatch:
            at = index.to(batch.ids.device)
            return TokenBatch(batch.ids[at], batch.mask[at])

        if pairs is not None:
            chosen: Examples = replace(
                pairs, clean=some(pairs.clean), patch=None if pairs.patch is None else some(pairs.patch),
                answers=pairs.answers[index.to(pairs.answers.device)],
                cases=tuple(pairs.cases[i] for i in index.tolist()),
            )  # fmt: skip
        else:
            assert isinstance(examples, TokenBatch)
            chosen = some(examples)
        own: AnyMetric = self.metric if isinstance(self.metric, UnboundMetric) else ChosenRows(metric, index)
        keep = None if self.keep is None else self.keep[index.to(self.keep.device)]
        return replace(self, examples=chosen, metric=own, keep=keep)

    def effects(self, baseline: str, **other: object) -> NodeEffects:
        """The effects, or with some other settings."""
        settings = {"method": self.method, "steps": self.steps, "rule": self.rule, "batch_size": self.batch_size}
        return node_effects(
            self.model, self.bases, self.examples, self.metric, baseline=baseline, keep=self.keep,  # type: ignore[arg-type]
            aggregation="sum", measured=False, **{**settings, **other},  # type: ignore[arg-type]
        )  # fmt: skip

    def on(self, model: Model) -> NodeCase:
        """The same on a copy of the model."""
        return replace(self, model=model, bases=models.rebound(self.bases, model))

    def shuffled(self) -> NodeCase | None:
        """The same with the labels of half of the inputs swapped; None where there are no two labels."""
        n = len(self.examples) if isinstance(self.examples, Pairs) else len(self.examples.ids)
        swapped = torch.zeros(n, dtype=torch.bool)
        swapped[torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[: n // 2]] = True
        if isinstance(self.examples, Pairs) and isinstance(self.metric, UnboundMetric):
            if self.examples.answers.shape[1] != 2:
                return None
            answers = self.examples.answers
            at = swapped.to(answers.device)[:, None]
            return replace(self, examples=replace(self.examples, answers=torch.where(at, answers.flip(1), answers)))
        inner = self.metric.metric if isinstance(self.metric, ChosenRows) else self.metric
        if not isinstance(inner, LossOfMargin):
            return None
        index = self.metric.index if isinstance(self.metric, ChosenRows) else torch.arange(len(inner.labels))
        labels = inner.labels[index.to(inner.labels.device)]
        labels = torch.where(swapped.to(labels.device), 1 - labels, labels)
        return replace(self, metric=LossOfMargin(inner.probe, labels, inner.keep[index.to(inner.keep.device)]))


def attributions_of(
    effects: NodeEffects, case: NodeCase, inputs: int, most_sites: int, steps: Sequence[int] = (8, 16, 32)
) -> tuple[list[Attribution], str]:
    """The attributions of the sites with the largest effects, and what they are in words.

    Raises:
        MismatchError: if the effects were not made of this case.
        InvalidInputError: for positions put together by "max" or "last", which no patch of a node measures.
    """
    n = len(case.examples) if isinstance(case.examples, Pairs) else len(case.examples.ids)
    if effects.n != n:
        raise MismatchError(
            f"attribution_doctor: the effects are of {counted(effects.n, 'examples')}, and {n} were given. Give those "
            "that the effects were made on."
        )
    if effects.aggregation in ("max", "last"):
        raise InvalidInputError(
            f"attribution_doctor: aggregation={effects.aggregation!r} keeps one position of a node, and patching a "
            "node patches all. Make the effects with aggregation='sum' or 'none'."
        )
    index = torch.linspace(0, n - 1, min(inputs, n)).round().long().unique()
    sites = _strongest(effects, most_sites)
    whole = replace(case, bases={site: case.bases[site] for site in sites})
    chosen = whole.of_rows(index)
    reruns = _Reruns(effects.baseline, chosen)
    found = []
    options = AttributionOptions(method=case.method, steps=case.steps, rule=case.rule, baseline=effects.baseline)  # type: ignore[arg-type]
    for site in sites:
        found.append(_Site(effects[site], whole, chosen, reruns, options, index, steps).attribution())
    what = f"{effects.metric}; {options.words}; {', '.join(sites)}; {counted(len(index), 'inputs')}"
    return found, what


def _strongest(effects: NodeEffects, most: int) -> list[str]:
    """The sites of the largest total absolute effect, in the order of a forward pass; never one without effects."""
    sizes = {name: float(site.value.abs().sum()) for name, site in effects.items()}
    best = sorted((name for name in sizes if sizes[name] > 0), key=lambda name: -sizes[name])[:most]
    return [name for name in effects if name in best]


class _Reruns:
    """Effects of all sites made again, each once."""

    def __init__(self, baseline: str, case: NodeCase) -> None:
        self.baseline, self.case = baseline, case
        self.again = functools.cache(lambda **other: case.effects(baseline, **other))
        self.from_baseline = functools.cache(case.effects)
        self.random = functools.cache(lambda part: case.on(models.randomised(case.model, part)).effects(baseline))
        self.mixed = functools.cache(self._mixed)
        self.same = functools.cache(self._same)

    def _mixed(self) -> NodeEffects | None:
        case = self.case.shuffled()
        return None if case is None else case.effects(self.baseline)

    def _same(self, how: Callable[[Model, TokenBatch], Model | None]) -> NodeEffects | None:
        batch = self.case.examples.clean if isinstance(self.case.examples, Pairs) else self.case.examples
        made = how(self.case.model, batch)
        return None if made is None else self.case.on(made).effects(self.baseline)

    def resampled(self) -> NodeEffects:
        """The effects with the counterpart of the next pair."""
        pairs = self.case.examples
        assert isinstance(pairs, Pairs) and pairs.patch is not None
        rolled = TokenBatch(pairs.patch.ids.roll(1, 0), pairs.patch.mask.roll(1, 0))
        return replace(self.case, examples=replace(pairs, patch=rolled)).effects("patch")


class _Site:
    """One site: its items, and what patching them does."""

    def __init__(
        self, effects: SiteEffects, whole: NodeCase, chosen: NodeCase, reruns: _Reruns, options: AttributionOptions,
        index: Tensor, steps: Sequence[int],
    ) -> None:  # fmt: skip
        self.name, self.whole, self.reruns, self.options, self.index = effects.site, whole, reruns, options, index
        self.effects, self.case, self.steps = effects, chosen, steps
        self.setting = self._setting(chosen)
        (self.place,) = self.setting.places
        rows = torch.arange(len(index), device=self.setting.keep.device)
        self.state = States(self.setting, options.batch_size).of(rows)[self.name]
        ((_, self.run),) = runs_of(self.setting, [self.place], rows, replace(options, batch_size=max(64, len(index))))
        self.base = self.run.values([self.run.clean])[0]
        ends = self.setting.keep.sum(1).cumsum(0).tolist()
        self.tokens = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self.basis = self.place.basis
        kept = torch.isin(effects.example.cpu(), index) & (effects.value.cpu() != 0)
        self.items = effects.feature.cpu()[kept].unique()  # ERROR, if it is there, is first
        self.has_error = bool((self.items == ERROR).any())
        self.features = self.items[self.items != ERROR]

    def _setting(self, case: NodeCase) -> Setting:
        bases = {self.name: case.bases[self.name]}
        return setting_of(case.model, bases, case.examples, case.metric, self.options.baseline, case.keep)

    def scores(self, effects: SiteEffects, index: Tensor) -> np.ndarray:
        """Effects of the items in some inputs, positions added up."""
        row = torch.full((effects.n,), -1)
        row[index] = torch.arange(len(index))
        example, feature, value = effects.example.cpu(), effects.feature.cpu(), effects.value.double().cpu()
        kept = (row[example] >= 0) & torch.isin(feature, self.items)
        column = torch.searchsorted(self.items, feature[kept])
        out = torch.zeros(len(index), len(self.items), dtype=torch.float64)
        out.index_put_((row[example[kept]], column), value[kept], accumulate=True)
        return out.numpy()

    def made(self, effects: NodeEffects | None) -> np.ndarray:
        """Scores of effects on the chosen inputs."""
        assert effects is not None
        return self.scores(effects[self.name], torch.arange(len(self.index)))

    def attribution(self) -> Attribution:
        """The site in the form that the doctor examines."""
        scores = self.scores(self.effects, self.index)
        again = self.made(self.reruns.again())
        off = float(np.abs(again - scores).max() / max(np.abs(scores).max(), 1e-30))
        if off > _SAME:
            raise MismatchError(
                f"attribution_doctor: effects at {self.name} made again by {self.options.words} are others than those "
                "given. Give method=, steps=, rule=, keep= as node_effects had them."
            )
        reruns, case, values = self.reruns, self.case, self._values(self.setting, self.state.read, self.state.x)
        shuffled = reruns.mixed()
        labels = self._labels()
        return Attribution(
            name=self.name, scores=scores, values=values, effect=self.effect, resampled=self.resampled,
            totals=self._totals(), prior=self._prior(), again=lambda: again, adds_up=case.method in ("ig", "atp"),
            steps=(lambda n: self.made(reruns.again(steps=n))) if case.method == "ig" else None,
            settings=self._settings(), method=method_of(case.method, case.steps, case.rule),
            randomised=[lambda k=k: self.made(reruns.random(k + 1)) for k in range(models.PARTS)],
            shuffled=None if shuffled is None else lambda: self.made(shuffled),
            folded=self._same(models.folded), rescaled=self._same(models.rescaled),
            labelled=None if labels is None else self._labelled(labels),
            why={2: _NO_NORM, 11: _NO_NORM, 7: _NO_CLASSES, 1: _ALONE},
        )  # fmt: skip

    def _same(self, how: Callable[[Model, TokenBatch], Model | None]) -> Make | None:
        found = self.reruns.same(how)
        return None if found is None else lambda: self.made(found)

    def _settings(self) -> dict[str, Sequence[Make]]:
        """Scores under other values of each setting: the same again, other baselines, other steps and rules."""
        reruns = self.reruns
        baselines = [b for b in BASELINES if b not in (reruns.baseline, "patch", "zero")]
        makes: list[Make] = [lambda b=b: self.made(reruns.from_baseline(b)) for b in baselines]
        if reruns.baseline == "patch":
            makes.append(lambda: self.made(reruns.resampled()))
        found: dict[str, Sequence[Make]] = {"seed": [lambda: self.made(reruns.again())]}
        found["baseline"] = makes
        if self.case.method == "ig":
            found["steps"] = [lambda n=n: self.made(reruns.again(steps=n)) for n in self.steps]
            rules = [rule for rule in ("left", "midpoint", "right") if rule != self.case.rule]
            found["rule"] = [lambda r=r: self.made(reruns.again(rule=r)) for r in rules]
        return found

    # Measured effects

    def _patched(self, i: int, sets: np.ndarray, moves: Tensor, error: Tensor) -> np.ndarray:
        """Change of the metric of one input when sets of items move."""
        picked = torch.as_tensor(sets, device=moves.device)
        written = self.basis.rows(self.features.to(moves.device)).to(moves)
        errors = picked[:, :1] if self.has_error else None
        features = picked[:, 1:] if self.has_error else picked
        own, found = self.run.clean[self.tokens[i]], []
        for start in range(0, len(picked), 64):
            some = features[start : start + 64].to(moves)
            states = own + torch.einsum("kf,tf,fd->ktd", some, moves, written)
            if errors is not None:
                states = states + errors[start : start + 64, :, None].to(moves) * error
            found.append(self.run.alone(i, states) - self.base[i])
        return torch.cat(found).double().cpu().numpy()

    def effect(self, i: int, sets: np.ndarray) -> np.ndarray:
        """Effect of putting sets of items to their baseline, at all positions."""
        moves = self.state.moves(self.basis, self.tokens[i])
        error = self.state.change[self.tokens[i]] - moves @ self.basis.rows().to(moves)
        return self._patched(i, sets, moves[:, self.features.to(moves.device)], error)

    def resampled(self, i: int, sets: np.ndarray) -> np.ndarray:
        """The same, with the values of the next input; where it has fewer tokens, they repeat."""
        own = torch.arange(len(self.state.x))[self.tokens[i]]
        other = torch.arange(len(self.state.x))[self.tokens[(i + 1) % len(self.tokens)]]
        other = other[torch.arange(len(own)) % len(other)]
        moves = self.basis.coefficients(self.state.read[other]) - self.basis.coefficients(self.state.read[own])
        error = self.state.x[other] - self.state.x[own] - moves @ self.basis.rows().to(moves)
        return self._patched(i, sets, moves[:, self.features.to(moves.device)], error)

    def _totals(self) -> np.ndarray:
        """Measured effect of patching the whole site."""
        return (self.run.values([self.run.clean + self.state.change])[0] - self.base).double().cpu().numpy()

    # What needs no gradient

    def _values(self, setting: Setting, read: Tensor, x: Tensor) -> np.ndarray:
        """Activation of each item times the length of its row, summed over tokens; of the error its length."""
        row = setting.keep.nonzero()[:, 0].to(x.device)
        parts = self.basis.coefficients(read)
        features = self.features.to(x.device)
        written = self.basis.rows(features).norm(dim=1).to(parts)
        columns = [parts[:, features] * written]
        if self.has_error:
            left = x - self.basis.constant(read) - parts @ self.basis.rows().to(parts)
            columns.insert(0, left.norm(dim=1)[:, None])
        every = torch.cat(columns, 1)
        return every.new_zeros(len(setting.keep), every.shape[1]).index_add_(0, row, every).double().cpu().numpy()

    def _prior(self) -> np.ndarray:
        """Mean position of the tokens at which each item changes; the error is everywhere."""
        pos = self.setting.keep.nonzero()[:, 1].double()
        moved = (self.state.moves(self.basis, slice(None))[:, self.features] != 0).double().cpu()
        mean = (moved * pos.cpu()[:, None]).sum(0) / moved.sum(0).clamp_min(1)
        return torch.cat([pos.mean().cpu()[None], mean]).numpy() if self.has_error else mean.numpy()

    def _labels(self) -> np.ndarray | None:
        """Class of every input: its answer, its case or what its case begins with, or the probe's label; of two."""
        metric = self.whole.metric
        pairs = self.whole.examples
        if isinstance(pairs, Pairs):
            kinds: list[list[object]] = [
                list(pairs.answers[:, 0].tolist()), list(pairs.cases), [case.partition("_")[0] for case in pairs.cases],
            ]  # fmt: skip
        else:
            kinds = [list(metric.labels.tolist())] if isinstance(metric, LossOfMargin) else []
        for labels in kinds:
            if len(known := list(dict.fromkeys(labels))) == 2:
                return np.array([known.index(label) for label in labels])
        return None

    def _labelled(self, labels: np.ndarray) -> LabelledScores:
        setting = self._setting(self.whole)
        states = States(setting, self.options.batch_size)
        n = len(setting.clean)
        parts = [states.of(rows)[self.name] for rows in setting.chunks(self.options.batch_size)]
        read, x = (torch.cat([getattr(part, field) for part in parts]) for field in ("read", "x"))
        scores = self.scores(self.effects, torch.arange(n))
        return LabelledScores(scores=scores, values=self._values(setting, read, x), labels=labels)


_NO_NORM = "no norm gain of this model can be moved into the weights that read it"
_NO_CLASSES = "the inputs have no two classes, so there is no head to retrain"
_ALONE = "effects of nodes patched alone need not add up"
