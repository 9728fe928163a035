"""Pooled activations of labelled texts, plain or with features ablated; what SHIFT computes everything from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.shift.deciders import Node, TokenContext
from circuits.shift.words import word_pattern
from workbench.bases.base import Basis
from workbench.controls.tokens import TokenPolicy
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.progress import track
from workbench.core.tokens import TokenBatch
from workbench.interventions.chosen import Mask
from workbench.interventions.intervention import Intervention
from workbench.interventions.proof import EditReport
from workbench.interventions.saes import SAEAblate
from workbench.models.model import Model
from workbench.probes.linear import mean_pool

CONTEXT_TOKENS = 12
"""Tokens shown on each side of one on which a feature is active."""

ROUNDINGS = 16
"""Roundings that two means of the same tokens may differ by."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PooledTexts(OneLine):
    """Mean over the readable tokens of each text; on the CPU, where probes are fitted.

    Attributes:
        texts: the texts.
        x: activations at the probe's site.
        acts: feature activations per site of an SAE, in the units of the stream (`Basis.coefficients`).
        frequency: share of the readable tokens on which each feature is active, per site.
        n_tokens: readable tokens.
        n_left_out: tokens of the texts that are not read (first, special, sinks).
        others: `acts` and `frequency` of each set of bases that was read along.
        keep: the tokens of each batch that were read, so that an edit need not look for them again; () if not known.
    """

    texts: tuple[str, ...]
    x: Float[Tensor, "rows d"]
    acts: dict[str, Float[Tensor, "rows d_sae"]]
    frequency: dict[str, Float[Tensor, " d_sae"]]
    n_tokens: int
    n_left_out: int
    others: Mapping[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = field(default_factory=dict)
    keep: tuple[Tensor, ...] = ()

    def along(self, name: str) -> PooledTexts:
        """The same texts with the features of a set of bases that was read along."""
        acts, frequency = self.others[name]
        return replace(self, acts=acts, frequency=frequency, others={})


@dataclass(frozen=True, eq=False)
class Reader(OneLine):
    """Reads texts at the probe's site and at the SAEs' sites.

    Attributes:
        model: the model.
        bases: a basis per site.
        probe_site: where the probe reads.
        policy: which tokens are pooled and edited, by their norm at the probe's site.
        batch_size: texts per forward pass.
        along: further sets of bases by name, read in the same passes.
    """

    model: Model
    bases: Mapping[str, Basis]
    probe_site: str
    policy: TokenPolicy
    batch_size: int = 32
    along: Mapping[str, Mapping[str, Basis]] = field(default_factory=dict)

    @classmethod
    def fitted(
        cls, model: Model, bases: Mapping[str, Basis], probe_site: str, texts: Sequence[str], batch_size: int = 32
    ) -> Reader:
        """A reader whose sink norm is estimated on the first batch of texts."""
        batch = model.tokens(list(texts[:batch_size]))
        policy = TokenPolicy.of_batch(batch, model.capture(batch, [probe_site]).flat(probe_site))
        return cls(model, bases, probe_site, policy, batch_size)

    @property
    def is_linear(self) -> bool:
        """Whether ablations can be computed on pooled activations: the only SAE stands at the probe's site."""
        return set(self.bases) == {self.probe_site}

    def keep(self, batch: TokenBatch, x: Float[Tensor, "batch pos d"]) -> Bool[Tensor, "batch pos"]:
        """The tokens that are pooled and edited; `x` are the unedited activations at the probe's site."""
        return self.policy.kept(batch, x)

    def read(self, texts: Sequence[str], what: str) -> PooledTexts:
        """Pooled activations of unedited texts."""
        x, kept, n_tokens, n_left_out = [], [], 0, 0
        every = {"": self.bases, **self.along}
        pooled: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {
            name: {site: [] for site in bases} for name, bases in every.items()
        }
        sites = list(dict.fromkeys([self.probe_site, *(site for bases in every.values() for site in bases)]))
        for batch in self._batches(texts, what):
            captured = self.model.capture(batch, sites)
            keep = self.keep(batch, captured.flat(self.probe_site))
            x.append(mean_pool(captured.flat(self.probe_site), keep).cpu())
            kept.append(keep)
            n_tokens, n_left_out = n_tokens + int(keep.sum()), n_left_out + batch.n_tokens - int(keep.sum())
            for name, bases in every.items():
                for site, basis in bases.items():
                    pooled[name][site].append(pooled_features(basis, captured.flat(site), keep))
        found = {
            name: (
                {site: torch.cat([acts for acts, _ in parts]) for site, parts in of_site.items()},
                {site: torch.stack([n for _, n in parts]).sum(0) / n_tokens for site, parts in of_site.items()},
            )
            for name, of_site in pooled.items()
        }
        acts, frequency = found.pop("")
        return PooledTexts(
            texts=tuple(texts), x=torch.cat(x), acts=acts, frequency=frequency, n_tokens=n_tokens,
            n_left_out=n_left_out, others=found, keep=tuple(kept),
        )  # fmt: skip

    def pooled(self, texts: Sequence[str], what: str) -> Float[Tensor, "rows d"]:
        """Pooled activations at the probe's site alone, for texts whose features nobody looks at."""
        bare = replace(self, bases={}, along={})
        return bare.read(texts, what).x

    def ablated(self, pooled: PooledTexts, nodes: Sequence[Node]) -> Float[Tensor, "rows d"]:
        """Pooled activations at the probe's site with features set to zero and the SAE's error kept."""
        if not nodes:
            return pooled.x
        if not self.is_linear:
            return self.ablated_by_model(pooled, nodes)[0]
        # Mean and decoder are linear: the mean of the edited tokens is the edited mean.
        features = torch.tensor([node.feature for node in nodes])
        rows = self.bases[self.probe_site].rows(features).to(pooled.x)
        taken = pooled.acts[self.probe_site][:, features] @ rows
        left = pooled.x - taken
        # What cancels up to rounding is zero: a probe that standardises would make a dimension of it.
        rounding = ROUNDINGS * torch.finfo(left.dtype).eps * (pooled.x.abs() + taken.abs())
        return left.masked_fill(left.abs() <= rounding, 0.0)

    def ablated_by_model(
        self, pooled: PooledTexts, nodes: Sequence[Node]
    ) -> tuple[Float[Tensor, "rows d"], tuple[EditReport, ...]]:
        """The same by running the model with the edit at every readable token; also what each edit did."""
        x, reports = [], []
        for i, batch in enumerate(self._batches(pooled.texts, "ablating")):
            keep = pooled.keep[i] if pooled.keep else self._readable(batch)
            with self.model.plan(self.intervention(nodes, keep)) as plan:
                x.append(mean_pool(self.model.capture(batch, [self.probe_site]).flat(self.probe_site), keep).cpu())
            reports += plan.report
        return torch.cat(x), tuple(reports)

    def _readable(self, batch: TokenBatch) -> Bool[Tensor, "batch pos"]:
        return self.keep(batch, self.model.capture(batch, [self.probe_site]).flat(self.probe_site))

    def intervention(self, nodes: Sequence[Node], keep: Bool[Tensor, "batch pos"]) -> Intervention:
        """Zeroes the features at their sites, in the order of the sites."""
        edits = Intervention()
        for site, basis in self.bases.items():
            features = [node.feature for node in nodes if node.site == site]
            if features:
                edits += Intervention.at(site, SAEAblate(basis, features), Mask(keep, may_skip_rows=True))
        return edits

    def _batches(self, texts: Sequence[str], what: str) -> Any:
        starts = range(0, len(texts), self.batch_size)
        for start in track(starts, total=len(starts), description=what, unit="batches"):
            yield self.model.tokens(list(texts[start : start + self.batch_size]))


def pooled_features(
    basis: Basis, x: Float[Tensor, "batch pos d"], keep: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, " d_sae"]]:
    """Mean contribution over the kept tokens of each row, and on how many tokens each feature is active; on the CPU.

    One row at a time, so that no more than `(pos, d_sae)` is in memory.
    """
    means, active = [], torch.zeros(basis.d_sae)
    for row, kept in zip(x, keep.to(x.device), strict=True):
        parts = basis.coefficients(row[kept])
        means.append(parts.mean(0).cpu())
        active += (parts != 0).sum(0).cpu()
    return torch.stack(means), active


@dataclass(frozen=True, eq=False)
class TokenEvidence:
    """Where one feature fires.

    Attributes:
        top_tokens: tokens with the largest activation, with it.
        spurious_share: share of its activation on the first word list, None if that is empty.
        target_share: share on the second.
        n_tokens: tokens on which it is active.
        contexts: the texts around its largest activations, one per text.
    """

    top_tokens: tuple[tuple[str, float], ...]
    spurious_share: float | None
    target_share: float | None
    n_tokens: int
    contexts: tuple[TokenContext, ...]


def token_evidence(
    reader: Reader,
    texts: Sequence[str],
    nodes: Sequence[Node],
    words: tuple[frozenset[str], frozenset[str]],
    top: int = 6,
) -> dict[Node, TokenEvidence]:
    """On which tokens each feature fires, over the readable tokens of the texts."""
    acts: dict[str, list[Tensor]] = {site: [] for site in reader.bases}
    features = {site: [node.feature for node in nodes if node.site == site] for site in reader.bases}
    strings: list[list[str]] = []
    on_words: list[Tensor] = []
    for batch in reader._batches(texts, "reading contexts"):
        captured = reader.model.capture(batch, list(dict.fromkeys([reader.probe_site, *reader.bases])))
        keep = reader.keep(batch, captured.flat(reader.probe_site))
        for site, basis in reader.bases.items():
            x = captured.flat(site)
            some = torch.tensor(features[site], dtype=torch.long)
            rows = [basis.encode_some(row[k], some) for row, k in zip(x, keep.to(x.device), strict=True)]
            acts[site].append(torch.cat(rows).cpu())
        marks = torch.stack([_marked(reader.model, batch, texts, list_, len(strings)) for list_ in words], dim=-1)
        on_words.append(marks[keep].cpu())
        strings += [_strings(row, k) for row, k in zip(batch.str_tokens, keep, strict=True)]
    flat = [token for row in strings for token in row]
    row_of = [i for i, row in enumerate(strings) for _ in row]
    marks = torch.cat(on_words).float()
    return {
        Node(site, f): _evidence(
            torch.cat(acts[site])[:, i], flat, row_of, marks, [bool(list_) for list_ in words], top
        )
        for site in reader.bases for i, f in enumerate(features[site])
    }  # fmt: skip


def _strings(row: tuple[str, ...], keep: Tensor) -> list[str]:
    """Texts of the kept tokens; `keep` is left-padded, `row` is not."""
    kept = keep[len(keep) - len(row) :]
    return [token for token, wanted in zip(row, kept.tolist(), strict=True) if wanted]


def _evidence(
    acts: Tensor, strings: Sequence[str], row_of: Sequence[int], marks: Tensor, listed: Sequence[bool], top: int
) -> TokenEvidence:
    total = float(acts.sum())
    shares = (acts @ marks / total).tolist() if total else [0.0, 0.0]
    of_spurious, of_target = (share if there else None for share, there in zip(shares, listed, strict=True))
    best: dict[str, float] = {}
    contexts: dict[int, TokenContext] = {}
    for i in map(int, acts.argsort(descending=True)[: 20 * top].tolist()):
        if acts[i] > 0 and len(best) < top:
            best.setdefault(strings[i], float(acts[i]))
        if acts[i] > 0 and len(contexts) < top and row_of[i] not in contexts:
            contexts[row_of[i]] = _context(strings, row_of, i)
    n_tokens = int((acts > 0).sum())
    return TokenEvidence(tuple(best.items()), of_spurious, of_target, n_tokens, tuple(contexts.values()))


def _context(strings: Sequence[str], row_of: Sequence[int], i: int) -> TokenContext:
    near = [j for j in range(max(0, i - CONTEXT_TOKENS), i + CONTEXT_TOKENS + 1) if j < len(strings)]
    near = [j for j in near if row_of[j] == row_of[i]]
    before, after = ("".join(strings[j] for j in part) for part in (range(near[0], i), range(i + 1, near[-1] + 1)))
    return TokenContext(before, strings[i], after)


def _marked(model: Model, batch: TokenBatch, texts: Sequence[str], words: frozenset[str], start: int) -> Tensor:
    """True at tokens that overlap one of the words."""
    marks = torch.zeros_like(batch.mask)
    if not words:
        return marks
    pattern = word_pattern(words)
    for row in range(len(batch)):
        text = texts[start + row]
        spans = [match.span() for match in pattern.finditer(text)]
        coded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if "offset_mapping" not in coded:
            raise InvalidInputError(
                "token_evidence: this tokenizer can't say where its tokens lie in the text. Use a fast tokenizer."
            )
        offsets = cast(Sequence[tuple[int, int]], coded["offset_mapping"])
        hits = [any(a < end and b > begin for begin, end in spans) for a, b in offsets]
        # Right-aligned: a BOS, where there is one, stands in front.
        marks[row, marks.shape[1] - len(hits) :] = torch.tensor(hits, device=marks.device)
    return marks
