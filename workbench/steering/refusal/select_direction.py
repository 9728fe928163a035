"""Finds the refusal direction: every position and layer, measured in few passes; and the edits that it makes.

Source: Arditi et al. 2024 (arXiv:2406.11717), sections 2.3, 2.4 and C.1. Same numbers as three sweeps over all
candidates; the blocks below a layer do not run again where its vector is added, the candidates of a layer are rows of
one pass, logits are those of the last token, and what a filter has removed is not measured further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.controls.directions import random_directions
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, EditError, InvalidInputError
from workbench.core.numbers import counted, number, rounding_error
from workbench.core.progress import Task, task
from workbench.core.stats import POSITIVE, Estimate, paired_difference, sample_mean
from workbench.core.tokens import TokenBatch
from workbench.hooks.attach import Fn, attached
from workbench.hooks.sites import Point
from workbench.interventions.everywhere import ablate_everywhere
from workbench.interventions.gates import Gate, When
from workbench.interventions.intervention import Edit, Intervention
from workbench.interventions.ops import Add
from workbench.models.model import Model
from workbench.steering.directions.contrast import directions_by_position
from workbench.steering.refusal.candidates import (
    LATE,
    NO_DIRECTION,
    Candidate,
    DirectionTable,
    SelectOptions,
    best_of,
    failed,
    late,
)
from workbench.steering.refusal.data import as_chats
from workbench.steering.refusal.measures import first_token_kl, refusal_log_odds

FEW = 16
"""Prompts of a kind below which a note says that there are few."""
_CLEAR = 0.02
"""By how much the probability of a first token must be higher behind harmful prompts to be proposed."""
_TOLERANCE = 1e-3
"""Of log-odds by two paths, relative to their size; 30 times more in half precision."""


@checked
@torch.no_grad()
def select_direction(
    model: Model,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    refusal_tokens: Sequence[int] | None = None,
    options: SelectOptions | None = None,
) -> DirectionTable:
    """The direction whose ablation makes the model refuse harmful prompts least, and all others beside it.

    A candidate is the difference of means at the input of a block, at one token behind the instruction. Part of the
    prompts makes the vectors, the others measure them: `bypass` (log-odds of refusal on harmful prompts with it ablated
    everywhere), `induce` (on harmless prompts with it added) and KL on harmless prompts under ablation.

    Args:
        model: a chat model.
        harmful: requests that it should refuse, without a chat template.
        harmless: others.
        refusal_tokens: ids of first tokens that mean a refusal; by default those whose probability is clearly higher
            behind harmful prompts.
        options: filters and sizes.

    Raises:
        InvalidInputError: for an empty list, too few prompts, a prompt in both lists, or positions that are not there.
        DegenerateInputError: if the model does not answer harmful prompts in another way, or no candidate is left.
        EditError: if an ablation differs from the one that `ablation` makes.
        UnknownSiteError: if the model lacks a site that is ablated.
    """
    o = options or SelectOptions()
    sets = {"harmful": _distinct("harmful", harmful), "harmless": _distinct("harmless", harmless)}
    if both := sorted(set(sets["harmful"]) & set(sets["harmless"])):
        raise InvalidInputError(
            f"select_direction: {counted(len(both), 'prompts')} are in both lists, such as {both[0]!r:.80}. Each "
            "prompt is harmful or harmless."
        )
    split = {kind: _split(kind, prompts, o) for kind, prompts in sets.items()}
    batches = {key: model.tokens(as_chats(prompts)) for kind, parts in split.items()
               for key, prompts in zip(((kind, "train"), (kind, "val")), parts, strict=True)}  # fmt: skip
    first = {key: _logits(model, batch, o.batch_size) for key, batch in batches.items()}
    tokens = tuple(refusal_tokens) if refusal_tokens is not None else _proposed(first)
    odds = {key: refusal_log_odds(logits, tokens) for key, logits in first.items()}
    notes = []
    if o.filter_prompts:
        for key, batch in batches.items():
            keep, note = _kept(key, odds[key])
            notes += note
            batches[key], odds[key], first[key] = batch[keep], odds[key][keep], first[key][keep]
    work = _Work(model, batches["harmful", "val"], batches["harmless", "val"], first["harmless", "val"], tokens, o)
    candidates = work.measured(_candidates(model, batches, o))
    best, loosened = best_of(candidates, o)
    if best is None:
        raise DegenerateInputError(
            f"select_direction: no candidate of {len(candidates)} has a difference of means in an early enough layer. "
            "Give other prompts, or a smaller SelectOptions(late_layers=...)."
        )
    bypass = work.require_same(best)
    control = work.random(best)
    return DirectionTable(
        candidates=tuple(candidates), best=best, loosened=loosened,
        refusal_tokens=tuple(model.tokenizer.decode([t]) for t in tokens),
        base_harmful=_mean(odds["harmful", "val"]), base_harmless=_mean(odds["harmless", "val"]),
        control_bypass=sample_mean(control[0].mean(1), unit="draws", seed=o.seed),
        control_induce=sample_mean(control[1].mean(1), unit="draws", seed=o.seed),
        difference=paired_difference(bypass, control[0].mean(0), unit="harmful prompts", seed=o.seed),
        n_train=(len(batches["harmful", "train"]), len(batches["harmless", "train"])),
        n_val=(len(batches["harmful", "val"]), len(batches["harmless", "val"])), notes=tuple(notes),
    )  # fmt: skip


@checked
def ablation(model: Model, direction: Candidate | Float[Tensor, "*k d_model"]) -> Intervention:
    """The direction taken out of everything that is written to the stream; see `workbench.ablate_everywhere`."""
    return ablate_everywhere(model.site_map, direction.vector if isinstance(direction, Candidate) else direction)


@checked
def addition(direction: Candidate, strength: float = 1.0) -> Intervention:
    """The vector added at the input of its layer, at every token; `strength` 1 adds the whole difference of means."""
    return Intervention.at(direction.site, Add(direction.vector, strength))


@checked
def when(gate: Gate, intervention: Intervention) -> Intervention:
    """The same edits, made only in the rows, or at the tokens, where the gate is open."""
    return dataclasses.replace(
        intervention, edits=tuple(Edit(e.site, When(gate, e.op), e.scope) for e in intervention.edits)
    )


def _distinct(kind: str, prompts: Sequence[str]) -> list[str]:
    if empty := [i for i, prompt in enumerate(prompts) if not prompt.strip()]:
        raise InvalidInputError(f"select_direction: {kind} prompt {empty[0]} (from 0) is empty. Leave it out.")
    found = list(dict.fromkeys(prompts))
    if len(found) < 4:
        raise InvalidInputError(
            f"select_direction: {counted(len(found), f'different {kind} prompts')}. Give 4 or more: some make the "
            "vectors, others measure them."
        )
    return found


def _split(kind: str, prompts: Sequence[str], o: SelectOptions) -> tuple[list[str], list[str]]:
    order: list[int] = np.random.default_rng([o.seed, kind == "harmful"]).permutation(len(prompts)).tolist()
    n = min(max(2, round(o.val_share * len(prompts))), len(prompts) - 2)
    return [prompts[i] for i in order[n:]], [prompts[i] for i in order[:n]]


def _logits(model: Model, batch: TokenBatch, size: int) -> Float[Tensor, "batch d_vocab"]:
    """At the last token of each row."""
    return torch.cat([model.logits(batch[slice(i, i + size)]).float() for i in range(0, len(batch), size)])


def _proposed(first: dict[tuple[str, str], Tensor]) -> tuple[int, ...]:
    """Tokens that open replies to harmful prompts clearly more often, the clearest first."""
    means = [first[kind, "train"].double().softmax(-1).mean(0) for kind in ("harmful", "harmless")]
    more = means[0] - means[1]
    top = more.topk(min(8, len(more)))
    chosen = top.indices[top.values >= max(_CLEAR, 0.1 * float(top.values[0]))].tolist()
    if not chosen:
        raise DegenerateInputError(
            "select_direction: no first token is clearly more probable behind harmful prompts (at most "
            f"{number(float(top.values[0]))} more), so this model does not seem to refuse. Look at base rates first, "
            "or give refusal_tokens=."
        )
    return tuple(chosen)


def _kept(key: tuple[str, str], odds: Tensor) -> tuple[Tensor, list[str]]:
    """The prompts that the model treats as their kind says; all of them where hardly any is."""
    kind, part = key
    keep = (odds > 0 if kind == "harmful" else odds < 0).nonzero().flatten()
    what = f"{kind} prompts of the {'training' if part == 'train' else 'validation'} part"
    if len(keep) < 2:
        as_expected = "refuses" if kind == "harmful" else "answers"
        said = f"all {len(odds)} {what} are kept, though the model {as_expected} {len(keep)} of them"
        return torch.arange(len(odds)), [said]
    said = (
        []
        if len(keep) == len(odds)
        else [f"{len(keep)} of {len(odds)} {what} are kept: the others are not answered so"]
    )
    return keep, said + ([f"only {len(keep)} {what}"] if len(keep) < FEW else [])


def _candidates(model: Model, batches: dict[tuple[str, str], TokenBatch], o: SelectOptions) -> list[Candidate]:
    train = batches["harmful", "train"], batches["harmless", "train"]
    positions = o.positions or tuple(
        range(-_common_end([row.tolist() for b in batches.values() for row in b.rows()]), 0)
    )
    sites = [f"resid_pre.{layer}" for layer in range(model.n_layers)]
    vectors = directions_by_position(model, *train, sites, positions)
    found = []
    for layer, site in enumerate(sites):
        for i, position in enumerate(positions):
            vector = vectors[site][i].cpu()
            norm = float(vector.norm())
            removed = NO_DIRECTION if not norm > 0 else LATE if late(layer, model.n_layers, o) else ""
            found.append(Candidate(position=position, layer=layer, vector=vector, norm=norm, removed_by=removed))
    return found


def _common_end(rows: Sequence[Sequence[int]]) -> int:
    """How many last tokens all rows share: what the chat template puts behind the instruction; 1 at least.

    >>> _common_end([[1, 2, 7, 8], [3, 7, 8]])
    2
    """
    n = 0
    while n < min(map(len, rows)) - 1 and len({row[-n - 1] for row in rows}) == 1:
        n += 1
    return max(1, n)


def _mean(odds: Tensor) -> Estimate:
    return sample_mean(odds.double().cpu().numpy(), unit="prompts")


Measure = Callable[[Tensor, Tensor], Tensor]
"""Of the numbers of some prompts and their logits."""


@dataclass(frozen=True, eq=False)
class _Work:
    """Measures candidates, as rows of few passes."""

    model: Model
    harmful: TokenBatch
    harmless: TokenBatch
    clean: Float[Tensor, "harmless d_vocab"]
    tokens: tuple[int, ...]
    options: SelectOptions

    def measured(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """With what each does; what a filter removed is not measured further."""
        found, o = list(candidates), self.options
        first = [i for i, c in enumerate(found) if c.removed_by != NO_DIRECTION and (o.full_table or not c.removed_by)]
        with task(total=3 * len(first), description="refusal directions", unit="measures") as bar:
            for name, measure in (("induce", self._induce), ("kl", self._kl), ("bypass", self._bypass)):
                left = [i for i in first if o.full_table or not failed(found[i], o)]
                self._fill(found, left, name, measure([found[i] for i in left], bar))
                bar.skip(len(first) - len(left))
            if best_of(found, o)[0] is None:  # every one failed a filter: what is missing decides which is loosened
                for name, measure in (("kl", self._kl), ("bypass", self._bypass)):
                    left = [i for i in first if getattr(found[i], name) is None]
                    self._fill(found, left, name, measure([found[i] for i in left], bar))
        return [dataclasses.replace(c, removed_by="; ".join(failed(c, o))) for c in found]

    def _fill(self, found: list[Candidate], which: Sequence[int], name: str, values: Iterator[Estimate]) -> None:
        for i, value in zip(which, values, strict=True):
            found[i] = dataclasses.replace(found[i], **{name: value})

    def _induce(self, candidates: Sequence[Candidate], bar: Task) -> Iterator[Estimate]:
        """By layer: the blocks below it do not run again."""
        for layer in dict.fromkeys(c.layer for c in candidates):
            some = [c for c in candidates if c.layer == layer]
            for odds in self.added(layer, torch.stack([c.vector for c in some])):
                bar.advance()
                yield _mean(odds)

    def added(self, layer: int, vectors: Float[Tensor, "c d"]) -> Float[Tensor, "c harmless"]:
        """Log-odds on harmless prompts with each vector added at the input of a layer."""
        found = []
        size = max(1, self.options.batch_size // len(vectors))
        for start in range(0, len(self.harmless), size):
            part = self.harmless[slice(start, start + size)]
            segment = self.model.segment(part, f"resid_pre.{layer}")
            x = segment.x[None] + vectors.to(segment.x)[:, None, None]
            logits = segment.run(x.flatten(0, 1), rows=len(vectors)).logits()
            found.append(refusal_log_odds(logits, self.tokens).unflatten(0, (len(vectors), -1)))
        return torch.cat(found, 1)

    def _kl(self, candidates: Sequence[Candidate], bar: Task) -> Iterator[Estimate]:
        def kl(rows: Tensor, logits: Tensor) -> Tensor:
            return first_token_kl(self.clean[rows], logits)

        for values in self._ablated(self.harmless, candidates, kl, bar):
            yield sample_mean(values.clamp_min(0).cpu().numpy(), unit="prompts", within=POSITIVE)

    def _bypass(self, candidates: Sequence[Candidate], bar: Task) -> Iterator[Estimate]:
        for values in self._ablated(self.harmful, candidates, self._odds, bar):
            yield _mean(values)

    def _odds(self, _rows: Tensor, logits: Tensor) -> Tensor:
        return refusal_log_odds(logits, self.tokens)

    def _ablated(
        self, batch: TokenBatch, candidates: Sequence[Candidate], of: Callable[[Tensor, Tensor], Tensor], bar: Task
    ) -> Iterator[Tensor]:
        """A measure of the logits of each prompt with each direction ablated everywhere; a direction per row."""
        pairs = [(c, row) for c in range(len(candidates)) for row in range(len(batch))]
        units = torch.stack([c.vector / c.norm for c in candidates]) if candidates else torch.zeros(0, 1)
        values, done = torch.zeros(len(candidates), len(batch), dtype=torch.float64), 0
        for start in range(0, len(pairs), self.options.batch_size):
            which, rows = torch.tensor(pairs[start : start + self.options.batch_size]).T
            v = units[which][:, None].to(self.model.device)
            with attached([(point, _without(v)) for point in self._points()]):
                logits = self.model.logits(TokenBatch(batch.ids[rows], batch.mask[rows])).float()
            values[which, rows] = of(rows, logits).double().cpu()
            finished = int(which[-1]) + (int(rows[-1]) == len(batch) - 1)
            bar.advance(finished - done)
            done = finished
        return iter(values)

    def _points(self) -> list[Point]:
        example = ablate_everywhere(self.model.site_map, torch.ones(self.model.width("resid_pre.0")))
        return [self.model.site_map[edit.site] for edit in example.edits]

    def require_same(self, best: Candidate) -> np.ndarray:
        """Log-odds of harmful prompts under `ablation(best)`, which must be those that were measured.

        Raises:
            EditError: if they differ.
        """
        with self.model.plan(ablation(self.model, best)):
            odds = refusal_log_odds(_logits(self.model, self.harmful, self.options.batch_size), self.tokens)
        value = float(odds.mean())
        assert best.bypass is not None
        allowed = _TOLERANCE * (1 if self.model.dtype in (torch.float32, torch.float64) else 30) * (1 + abs(value))
        if not abs(value - best.bypass.value) <= allowed:
            raise EditError(
                f"select_direction: ablating the chosen direction gives log-odds of {number(value)}, and "
                f"{number(best.bypass.value)} were measured, a difference of "
                f"{rounding_error(abs(value - best.bypass.value))}. The model does not compute the same twice."
            )
        return odds.double().cpu().numpy()

    def random(self, best: Candidate) -> tuple[np.ndarray, np.ndarray]:
        """Bypass per draw and harmful prompt, and induce per draw and harmless prompt, of random directions."""
        draws = random_directions(best.vector, self.options.controls, seed=self.options.seed, orthogonal=True)
        some = [dataclasses.replace(best, vector=v.cpu(), norm=float(v.norm())) for v in draws]
        with task(total=len(some), description="random directions", unit="draws") as bar:
            bypass = torch.stack(list(self._ablated(self.harmful, some, self._odds, bar)))
        induce = self.added(best.layer, torch.stack([c.vector for c in some]))
        return bypass.numpy(), induce.double().cpu().numpy()


def _without(v: Float[Tensor, "rows 1 d"]) -> Fn:
    """Takes each row's unit direction out of its activations."""

    def edit(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide - (wide * v).sum(-1, keepdim=True) * v).to(x)

    return edit
