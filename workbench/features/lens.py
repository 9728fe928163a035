"""The logit lens of captured activations: which tokens the model would write if it ended at a site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import clipped
from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.html import MOST_CELLS, Shown, grid, grids, preformatted, tokens_line
from workbench.core.numbers import counted, number
from workbench.core.tokenizer import decoded
from workbench.core.tokens import TokenBatch, labelled
from workbench.features.scores.logit_lens import IN_RESIDUAL, in_residual, slab_rows
from workbench.hooks.capture import Activations
from workbench.hooks.sites import Site
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

ROWS_SHOWN = 3
"""Rows of a batch whose heat maps are shown."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Lens(Shown):
    """What the end of a model reads at some sites, per token; a heat map of sites by tokens in a notebook.

    Attributes:
        sites: in the order of a forward pass.
        ids: most probable tokens, best first.
        logprobs: their log-probabilities, in nats.
        entropy: of the distribution, in nats.
        kl: KL(last site || this one) in nats: how far the reading is from that of the last site, 0 there.
        next_logprob: log-probability of the token that follows in the text; at the end of a row that of the answer, nan
            without one.
        next_rank: number of tokens that are strictly more probable than it; -1 at the end of a row without an answer.
        rows: row of the batch of each token.
        positions: position of each token in its row.
        batch: the tokens.
    """

    sites: tuple[Site, ...]
    ids: Int[Tensor, "sites tokens k"]
    logprobs: Float[Tensor, "sites tokens k"]
    entropy: Float[Tensor, "sites tokens"]
    kl: Float[Tensor, "sites tokens"]
    next_logprob: Float[Tensor, "sites tokens"]
    next_rank: Int[Tensor, "sites tokens"]
    rows: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    batch: TokenBatch

    def frame(self) -> pd.DataFrame:
        """One row per site, token and rank, labelled by the row of the batch."""
        n, tokens, k = self.ids.shape
        site, token, rank = (part.tolist() for part in torch.ones(n, tokens, k).nonzero(as_tuple=True))
        rows, positions, texts = self.rows.tolist(), self.positions.tolist(), self._texts()
        each = {name: getattr(self, name).flatten().repeat_interleave(k).cpu().numpy() for name in _PER_TOKEN}
        columns = {
            "site": [str(self.sites[i]) for i in site], "layer": [self.sites[i].layer for i in site],
            "position": [positions[i] for i in token], "token": [texts[i] for i in token], "rank": rank,
            "top_id": self.ids.flatten().tolist(), "top_token": self._tops(self.ids.flatten().tolist()),
            "logprob": self.logprobs.flatten().cpu().numpy(), **each,
        }  # fmt: skip
        return labelled(columns, self.batch.index, [rows[i] for i in token])

    def _texts(self) -> list[str]:
        texts = [_texts(self.batch, row) for row in range(len(self.batch))]
        return [texts[row][at] for row, at in zip(self.rows.tolist(), self.positions.tolist(), strict=True)]

    def _tops(self, ids: list[int]) -> list[str]:
        tokenizer = self.batch.tokenizer
        known = {i: decoded(tokenizer, [i]) if tokenizer else f"⟨{i}⟩" for i in set(ids)}
        return [known[i] for i in ids]

    def _shown_line(self) -> str:
        n, tokens, k = self.ids.shape
        return f"{counted(n, 'sites')} x {counted(tokens, 'tokens')}, the {k} most probable tokens at each"

    def _shown_parts(self) -> Iterable[Markup]:
        rows = self.rows.unique().tolist()
        fit = MOST_CELLS * len(rows) // max(len(self.rows) * len(self.sites), 1)
        shown = rows[: max(1, min(ROWS_SHOWN, fit))]
        yield from map(self._map, shown)
        yield from _left_out(len(shown), len(rows))

    def _map(self, row: int) -> Markup:
        """Sites by tokens of one row, the last site on top; coloured by the probability of the best token."""
        here = (self.rows == row).nonzero()[:MOST_CELLS, 0].tolist()
        texts, order = _texts(self.batch, row), range(len(self.sites) - 1, -1, -1)
        shares = [[float(self.logprobs[s, t, 0].exp()) for t in here] for s in order]
        best = [self._tops(self.ids[s, here, 0].tolist()) for s in order]
        titles = [[self._title(s, t) for t in here] for s in order]
        caption = f"row {row}: most probable token at each site, coloured by its probability"
        return grid(
            [str(self.sites[s]) for s in order],
            [texts[int(self.positions[t])] for t in here],
            shares,
            best,
            titles,
            caption,
        )

    def _title(self, site: int, token: int) -> str:
        tops = self._tops(self.ids[site, token].tolist())
        chances = [number(float(p)) for p in self.logprobs[site, token].exp()]
        return " · ".join(f"{text!r} {p}" for text, p in zip(tops, chances, strict=True))


_PER_TOKEN = ("entropy", "kl", "next_logprob", "next_rank")


@checked
@torch.no_grad()
def lens(
    acts: Activations, model: Model | None = None, *, k: int = 5, answers: Int[Tensor, " batch"] | None = None
) -> Lens:
    """Logit lens of captured activations: the model's own final norm and unembedding, bias and soft cap included.

    Sites that are not in the coordinates of the residual stream, such as `z`, are left out. At the last `resid_post`
    the reading is what the model writes. Logits are held for a few tokens at a time, never for all.

    Args:
        acts: from `model.capture(text, ["resid_post"])`.
        model: that they were captured from; needed only where it is not known any more.
        k: how many tokens are kept at each site and token.
        answers: token ids that are taken to follow the rows, one each.

    Raises:
        MismatchError: if no site of `acts` is in the residual stream.
        InvalidInputError: if the model or the batch is not known, or for k out of range.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    model = model if model is not None else acts.model if isinstance(acts.model, Model) else None
    if model is None or acts.tokens is None:
        raise InvalidInputError("lens(acts): the model that they were captured from is gone. Give lens(acts, model).")
    if not 1 <= k <= model.d_vocab:
        raise InvalidInputError(f"lens(k={k}): the vocabulary has {model.d_vocab} tokens. Choose 1 <= k <= that.")
    sites = sorted((site for site in map(Site.parse, acts) if in_residual(site)), key=lambda site: site.order)
    if not sites:
        raise MismatchError(f"lens: none of {', '.join(acts)} is in the residual stream. Capture {IN_RESIDUAL[3]}.")
    rows, positions, kept = _chosen(acts, sites)
    width, lengths = acts.tokens.ids.shape[1], acts.tokens.lengths.to(positions.device)[rows]
    ends = positions + 1 >= lengths
    column = (positions + 1 + width - lengths).clamp_max(width - 1)
    following = acts.tokens.ids.to(rows.device)[rows, column]
    if answers is not None:
        following, ends = torch.where(ends, answers.to(rows.device)[rows], following), torch.zeros_like(ends)
    parts = [
        _read(model, [x[part] for x in kept], following[part], ends[part], k)
        for part in torch.arange(len(rows)).split(max(1, slab_rows(model.d_vocab) // 4))
    ]
    read = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    return Lens(sites=tuple(sites), **read, rows=rows, positions=positions, batch=acts.tokens)


def _chosen(acts: Activations, sites: list[Site]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Row and position of each real token, and its activations at each site."""
    assert acts.tokens is not None
    if acts.rows is not None and acts.positions is not None:
        return acts.rows, acts.positions, [acts[site] for site in sites]
    real = acts.tokens.mask
    return real.nonzero()[:, 0], acts.tokens.positions[real], [acts[site][real.to(acts[site].device)] for site in sites]


def _read(
    model: Model, kept: list[Float[Tensor, "n d"]], following: Int[Tensor, " n"], ends: Tensor, k: int
) -> dict[str, Tensor]:
    """The readings of some tokens at every site."""
    last = log_probabilities(model, kept[-1])
    found: dict[str, list[Tensor]] = {}
    for x in kept:
        logprobs = log_probabilities(model, x)
        top = logprobs.topk(k)
        target = logprobs.gather(1, following[:, None])
        values = {
            "ids": top.indices, "logprobs": top.values, "entropy": -(logprobs.exp() * logprobs).nansum(1),
            "kl": (last.exp() * (last - logprobs)).nansum(1),
            "next_logprob": target[:, 0].masked_fill(ends, torch.nan),
            "next_rank": (logprobs > target).sum(1).masked_fill(ends, -1),
        }  # fmt: skip
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def log_probabilities(model: Model, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """What the end of the model makes of vectors of the stream; its own norm, unembedding, bias and soft cap."""
    norm = model.site_map["final_norm"].module
    weight = next(norm.parameters(), x)
    # by its forward alone: hooks on it belong to runs of the model
    return model.head.all(norm.forward(x.to(weight.device, model.dtype))).log_softmax(-1).to(x.device)


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenMap(Shown):
    """Tokens with a number each; coloured in a notebook, orange above zero and blue below.

    Attributes:
        batch: the tokens.
        values: one per token; what stands at padding is not used.
        name: what the numbers are.
    """

    batch: TokenBatch
    values: Float[Tensor, "batch pos"]
    name: str = "value"

    def frame(self) -> pd.DataFrame:
        """One row per real token, labelled by the row of the batch, with its number."""
        return self.batch.frame().assign(**{self.name: self.values[self.batch.mask].float().cpu().numpy()})

    def _shown_line(self) -> str:
        return f"{self.name} of {self.batch.n_tokens} tokens"

    def _shown_parts(self) -> Iterable[Markup]:
        shown = self.batch.mask[: 2 * ROWS_SHOWN]
        for row, mask in enumerate(shown):
            values = self.values[row][mask].float().tolist()
            titles = [f"position {i}: {number(v)}" for i, v in enumerate(values)]
            yield tokens_line(_texts(self.batch, row), values, titles)
        yield from _left_out(len(shown), len(self.batch))


@checked
def show_tokens(batch: TokenBatch, values: Float[Tensor, "batch pos"], name: str = "value") -> TokenMap:
    """Tokens coloured by a number each, such as a loss, a projection or the activation of a feature.

    Raises:
        MismatchError: if there is not one number per token of the batch, padding included.
    """
    if values.shape != batch.ids.shape:
        raise MismatchError(
            f"show_tokens: values {tuple(values.shape)} for tokens {tuple(batch.ids.shape)}. Give (batch, pos)."
        )
    return TokenMap(batch=batch, values=values.detach(), name=name)


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionMap(Shown):
    """Attention patterns of one row, one heat map per head in a notebook.

    Attributes:
        patterns: share of attention by site, from each token (first axis after heads) to each earlier one.
        tokens: texts of the tokens.
    """

    patterns: dict[str, Float[Tensor, "heads q_pos k_pos"]]
    tokens: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """One row per site, head, query and key up to it."""
        import pandas as pd

        return pd.concat([self._frame(site, pattern) for site, pattern in self.patterns.items()], ignore_index=True)

    def _frame(self, site: str, pattern: Float[Tensor, "heads q_pos k_pos"]) -> pd.DataFrame:
        import pandas as pd

        head, query, key = torch.ones_like(pattern).tril().nonzero(as_tuple=True)
        weights = pattern[head, query, key].float().cpu().numpy()
        texts = {"query_token": [self.tokens[i] for i in query], "key_token": [self.tokens[i] for i in key]}
        numbers = {"head": head, "query": query, "key": key}
        columns = {name: values.cpu().numpy() for name, values in numbers.items()} | texts
        return pd.DataFrame({"site": site, **columns, "weight": weights})

    def _shown_line(self) -> str:
        heads = sum(len(pattern) for pattern in self.patterns.values())
        return f"{counted(heads, 'heads')} of {', '.join(self.patterns)} on {counted(len(self.tokens), 'tokens')}"

    def _shown_parts(self) -> Iterable[Markup]:
        yield grids(_head_maps(self))


def _head_maps(attention: AttentionMap) -> Iterator[Markup]:
    """Heat maps of the first heads; attention to the first token, which is often a sink, is coloured like any."""
    heads = [(site, h) for site, pattern in attention.patterns.items() for h in range(len(pattern))]
    names = [clipped(text, 12) for text in attention.tokens[:TOKENS_SHOWN]]
    shown = heads[: max(1, min(HEADS_SHOWN, MOST_CELLS // max(len(names) ** 2, 1)))]
    for site, head in shown:
        shares = attention.patterns[site][head, : len(names), : len(names)].float().tolist()
        titles = [
            [f"{query} to {key}: {number(shares[q][k])}" for k, key in enumerate(names)]
            for q, query in enumerate(names)
        ]
        caption = f"{site} head {head}: from row to column"
        yield grid(names, names, shares, titles=titles, caption=caption)
    if len(attention.tokens) > len(names) or len(heads) > len(shown):
        yield preformatted(
            f"{counted(len(heads), 'heads')} and {counted(len(attention.tokens), 'tokens')} in all; frame() has every "
            "weight"
        )


HEADS_SHOWN, TOKENS_SHOWN = 6, 24
"""Heads and tokens that are shown in a notebook at most; a frame has all."""


@checked
def show_attention(acts: Activations, row: int = 0) -> AttentionMap:
    """Attention patterns that were captured, as heat maps.

    Args:
        acts: from `model.capture(text, ["pattern.3"])` or `["pattern.3.h1"]`, of whole rows.
        row: of the batch.

    Raises:
        MismatchError: if no pattern was captured, or only of chosen tokens.
        InvalidInputError: for a row that is not there.
    """
    sites = [site for site in map(Site.parse, acts) if site.kind == "pattern"]
    if not sites or acts.tokens is None or acts.rows is not None:
        raise MismatchError(
            f"show_attention: no whole pattern among {', '.join(acts)}. Capture one, as model.capture(text, "
            "['pattern.3'])."
        )
    if not 0 <= row < len(acts.tokens):
        raise InvalidInputError(f"show_attention(row={row}): the batch has rows 0 to {len(acts.tokens) - 1}.")
    real = acts.tokens.mask[row]
    patterns = {}
    for site in sites:
        pattern = acts[site][row]
        pattern = pattern[None] if site.head is not None else pattern
        patterns[str(site)] = pattern[:, real][:, :, real]
    return AttentionMap(patterns=patterns, tokens=_texts(acts.tokens, row))


def _left_out(shown: int, n: int) -> Iterator[Markup]:
    """What is said where not every row of a batch is shown."""
    if n > shown:
        yield preformatted(f"the first {shown} of {counted(n, 'rows')}; frame() has all")


def _texts(batch: TokenBatch, row: int) -> tuple[str, ...]:
    """The texts of the real tokens of a row; their ids without a tokenizer."""
    return batch.str_tokens[row] if batch.str_tokens else tuple(f"⟨{i}⟩" for i in batch.rows()[row].tolist())
