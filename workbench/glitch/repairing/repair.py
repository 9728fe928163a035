"""New rows for tokens that training left out: made from the rows of other tokens, as an edit or as weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.codec import token_bytes
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, require, require_known
from workbench.core.html import Shown
from workbench.glitch.ranking.weights import Matrix, TokenMatrices, in_memory
from workbench.glitch.vocabulary.segments import Pieces, Speller
from workbench.glitch.vocabulary.tokenizer import Vocabulary, vocabulary_of
from workbench.hooks.ends import embedding, unembedding
from workbench.hooks.sites import Site
from workbench.interventions.bytoken import MixEntries, ReplaceTokens
from workbench.interventions.intervention import Edit, Intervention
from workbench.interventions.scopes import All, TokenIs
from workbench.models.model import Model

Sources = Literal["subtokens", "neighbours"]
Control = Literal["shuffled", "random"]
CHOICES = {
    "sources": ("subtokens", "neighbours"), "reading": ("mean", "keep"), "writing": ("mean", "block", "keep"),
}  # fmt: skip
BLOCKED = -1e4
"""Logit of a blocked token: its probability is zero in every dtype, and the value is finite in every dtype."""


@checked
@dataclass(frozen=True, kw_only=True)
class RepairOptions(OneLine):
    """What the new rows are made of.

    Attributes:
        sources: "subtokens": the other tokens that spell the token's text; "neighbours": the ordinary tokens with the
            input rows closest to the token's own by cosine, all that is left for a token that nothing else spells.
        reading: "mean" sets the input row to the mean of the source rows; "keep" leaves it.
        writing: "mean" does the same to the output row; "block" makes the token impossible to write; "keep" leaves it.
        match_norm: the mean of several rows is short; scale it, about the mean row of the matrix, to the mean length of
            its sources. About the mean row, because what all rows share raises no token's probability.
    """

    sources: Sources = "subtokens"
    reading: Literal["mean", "keep"] = "mean"
    writing: Literal["mean", "block", "keep"] = "mean"
    neighbours: int = 8
    match_norm: bool = True

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            require_known(f"choice of {name},", getattr(self, name), choices)
        changes = not self.reading == self.writing == "keep"
        require(self.neighbours >= 1 and changes, self, "change reading or writing, with at least 1 neighbour.")


@dataclass(frozen=True, eq=False, kw_only=True)
class Repair(Shown):
    """New rows for some tokens of one model.

    Attributes:
        spellings: the other tokens that spell each; empty where none do.
        sources: the tokens whose rows each new row is the mean of.
        skipped: tokens that were asked for and have no new row, with the reason.
        scale: factor of each output row about the mean row.
        embed_scale: what the model multiplies input rows by.
    """

    model: str
    made_for: str
    tied: bool
    options: RepairOptions
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    spellings: tuple[Pieces, ...]
    sources: tuple[Pieces, ...]
    skipped: tuple[tuple[int, str], ...]
    E_in: Float[Tensor, "k d"] | None
    E_out: Float[Tensor, "k d"] | None
    scale: Float[Tensor, " k"]
    bias: Float[Tensor, " k"] | None
    embed_scale: float
    head: str
    control: Control | None = None

    def intervention(self, required: bool = True) -> Intervention:
        """The repair as an edit: at the embedding for reading, at the logits for writing.

        The logits of a repaired token become those of its new output row, exactly: a mean of rows gives the mean of
        their logits. If `required`, a run in which none of the tokens occurs raises, as any edit that touches nothing.
        """
        edits: list[Edit] = []
        if self.E_in is not None:
            op = ReplaceTokens(torch.tensor(self.ids), self.E_in * self.embed_scale)
            edits.append(Edit(Site("embed"), op, TokenIs(*self.ids) if required else All()))
        if self.options.writing != "keep":
            edits.append(Edit(Site("logits"), self._mixed(), All()))
        return Intervention(tuple(edits), self.made_for)

    def _mixed(self) -> MixEntries:
        block = self.options.writing == "block"
        k, width = len(self.ids), max(map(len, self.sources))
        sources, weights = torch.zeros(k, width, dtype=torch.long), torch.zeros(k, width)
        for row, pieces in enumerate(self.sources):
            sources[row, : len(pieces)] = torch.tensor(pieces)
            weights[row, : len(pieces)] = 0.0 if block else float(self.scale[row]) / len(pieces)
        rest, bias = (torch.zeros(k), torch.full((k,), BLOCKED)) if block else (1 - self.scale, torch.zeros(k))
        return MixEntries(torch.tensor(self.ids), sources, weights, rest, bias)


@checked
def repair(
    model: Model, tokens: Sequence[int], options: RepairOptions | None = None, *,
    vocabulary: Vocabulary | None = None, avoid: Sequence[int] = (),
) -> Repair:  # fmt: skip
    """New rows for tokens; nothing is changed yet.

    Args:
        model: a `Model`.
        tokens: ids of the tokens to repair.
        options: what the new rows are made of.
        vocabulary: the analysis of the model's tokenizer, if it is at hand.
        avoid: further ids whose rows must not be used, such as all that a scan suspects.

    Raises:
        InvalidInputError: for ids without a row, or an embedding that does more than scale its rows.
        DegenerateInputError: if no token can be repaired.
    """
    options, vocabulary = options or RepairOptions(), vocabulary or vocabulary_of(model)
    matrices = in_memory(model.hf)
    wanted, n = list(dict.fromkeys(map(int, tokens))), min(matrices.E_in.n_rows, matrices.E_out.n_rows, len(vocabulary))
    bad = [i for i in wanted if not 0 <= i < n]
    rule = f"{bad[:8]} have no row; give ids from 0 to {n - 1}."
    require(bool(wanted and not bad), f"repair(tokens={wanted[:8]})", rule)
    texts, plain = token_bytes(model.tokenizer), vocabulary.is_category("ok", "partial_utf8") & ~vocabulary.reserved
    spell = Speller(texts, _usable(vocabulary, matrices, {*wanted, *avoid})[: len(texts)])
    spellings = sources = {i: spell(texts[i], i) or () for i in wanted if plain[i]}
    if options.sources == "neighbours":
        pool = np.flatnonzero(_usable(vocabulary, matrices, {*wanted, *avoid}, ("ok",)))
        sources = _neighbours(matrices.E_in, wanted, pool, options.neighbours)
    kept = [i for i in wanted if sources.get(i)]
    skipped = tuple((i, _why(vocabulary, i, options)) for i in wanted if not sources.get(i))
    if not kept:
        raise DegenerateInputError(
            f"repair({wanted[:8]}): none of these {len(wanted)} tokens can be repaired ({skipped[0][1]}). Give "
            "tokens of ordinary text, or sources='neighbours' for bytes and half characters."
        )
    plan = Repair(
        model=str(model.name), made_for=model.fingerprint, tied=matrices.tied, options=options, ids=tuple(kept),
        texts=tuple(vocabulary.text[i] for i in kept), spellings=tuple(spellings.get(i, ()) for i in kept),
        sources=(), skipped=skipped, E_in=None, E_out=None, scale=torch.ones(len(kept)), bias=None,
        embed_scale=embed_scale(model),
        head=next(path for path, module in model.hf.named_modules() if module is unembedding(model.hf)),
    )  # fmt: skip
    return with_sources(plan, matrices, [sources[i] for i in kept])


def control_of(
    model: Model, made: Repair, kind: Control, seed: int = 0, vocabulary: Vocabulary | None = None
) -> Repair:
    """The same repair with the wrong sources: those of another token ("shuffled"), or as many random ordinary tokens.

    Raises:
        DegenerateInputError: to shuffle fewer than two tokens.
        UnknownNameError: for another kind.
    """
    random, matrices = np.random.default_rng(seed), in_memory(model.hf)
    require_known("control", kind, ("shuffled", "random"))
    if kind == "shuffled":
        if len(made.ids) < 2:
            raise DegenerateInputError("control 'shuffled': one token alone has nobody to swap with. Use 'random'.")
        order = random.permutation(len(made.ids))
        sources: list[Pieces] = [()] * len(order)
        for mine, other in zip(order, np.roll(order, 1), strict=True):
            sources[mine] = made.sources[other]
    else:
        pool = np.flatnonzero(_usable(vocabulary or vocabulary_of(model), matrices, set(made.ids), ("ok",)))
        sources = [tuple(random.choice(pool, min(len(s), len(pool)), replace=False).tolist()) for s in made.sources]
    return dataclasses.replace(with_sources(made, matrices, sources), control=kind)


def with_sources(plan: Repair, matrices: TokenMatrices, sources: Sequence[Pieces]) -> Repair:
    """The same repair with rows made from these sources."""
    options = plan.options
    E_in = E_out = bias = None
    scale = torch.ones(len(sources))
    if options.reading == "mean":
        E_in, _ = _mixtures(matrices.E_in, sources, options.match_norm)
    if options.writing == "mean":
        E_out, scale = _mixtures(matrices.E_out, sources, options.match_norm)
        if matrices.bias is not None:
            means = torch.stack([matrices.bias[list(pieces)].mean() for pieces in sources])
            bias = scale * means + (1 - scale) * float(matrices.bias.mean())
    elif options.writing == "block":
        bias = torch.full((len(sources),), BLOCKED)
    return dataclasses.replace(plan, sources=tuple(sources), E_in=E_in, E_out=E_out, scale=scale, bias=bias)


def mixture(
    rows: Float[Tensor, "m d"], mean_row: Float[Tensor, " d"], match_norm: bool = True
) -> tuple[Float[Tensor, " d"], float]:
    """The mean of some rows, scaled about the mean row to their mean distance from it; and the factor.

    >>> rows = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    >>> row, factor = mixture(rows, torch.zeros(2))  # mean (1.5, 1.5) of length 2.12; its sources have length 3
    >>> row, round(factor, 4)
    (tensor([2.1213, 2.1213]), 1.4142)
    """
    centred = rows - mean_row
    mean = centred.mean(0)
    length = float(mean.norm())
    factor = float(centred.norm(dim=1).mean()) / length if match_norm and length > 0 else 1.0
    return mean_row + factor * mean, factor


def embed_scale(model: Model) -> float:
    """What the embedding multiplies its rows by (Gemma: the square root of `d_model`); 1 for most models.

    Raises:
        InvalidInputError: if it does more than that.
    """
    module = embedding(model.hf)
    ids = torch.arange(min(256, module.weight.shape[0]), device=module.weight.device)
    ids = ids[torch.isfinite(module.weight[ids]).all(1)]
    with torch.no_grad():
        out, rows = module(ids).double(), module.weight[ids].double()
    total = float((rows * rows).sum())
    factor = float((out * rows).sum()) / total if total > 0 else 1.0
    if float((out - factor * rows).norm()) > 1e-2 * float(out.norm()) or factor == 0:
        raise InvalidInputError(
            f"{type(module).__name__} does more to its rows than to scale them, so a new row can't be put in its "
            "output. Repair the weights of such a model before they are loaded."
        )
    return 1.0 if abs(factor - 1) < 1e-6 else factor


def _mixtures(
    matrix: Matrix, sources: Sequence[Pieces], match_norm: bool
) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    total = torch.stack([block.sum(0, dtype=torch.float64) for _, block in matrix.blocks()]).sum(0)
    if not bool(torch.isfinite(total).all()):
        raise DegenerateInputError(
            f"{matrix.name} of {matrix.n_rows} rows holds NaN or infinity, so it has no mean row. Correct those first."
        )
    mean_row = (total / matrix.n_rows).float()
    made = [mixture(matrix.rows(pieces), mean_row, match_norm) for pieces in sources]
    return torch.stack([row for row, _ in made]), torch.tensor([factor for _, factor in made])


def _usable(
    vocabulary: Vocabulary, matrices: TokenMatrices, avoid: set[int], categories: Sequence[str] = ("ok", "partial_utf8")
) -> np.ndarray:
    """Boolean per row of the input matrix: whether it may be a source."""
    n = matrices.E_in.n_rows
    shared = min(n, len(vocabulary), matrices.E_out.n_rows)
    fits = np.zeros(n, dtype=bool)
    fits[:shared] = (vocabulary.is_category(*categories) & ~vocabulary.reserved)[:shared]
    return fits & ~np.isin(np.arange(n), list(avoid))


def _neighbours(matrix: Matrix, wanted: Sequence[int], pool: np.ndarray, n: int) -> dict[int, Pieces]:
    """The tokens of the pool whose rows have the highest cosine with each token's own."""
    own = torch.nn.functional.normalize(matrix.rows(wanted), dim=1)
    cosines = torch.full((len(wanted), matrix.n_rows), -2.0)
    for start, block in matrix.blocks():
        cosines[:, start : start + len(block)] = own @ torch.nn.functional.normalize(block, dim=1).T
    closed = torch.ones(matrix.n_rows, dtype=torch.bool)
    closed[pool] = False
    top = cosines.masked_fill(closed, -2.0).topk(min(n, len(pool)), dim=1).indices
    return {i: tuple(row) for i, row in zip(wanted, top.tolist(), strict=True)}


def _why(vocabulary: Vocabulary, i: int, options: RepairOptions) -> str:
    if vocabulary.reserved[i] or vocabulary.category[i] not in ("ok", "partial_utf8"):
        return f"{vocabulary.text[i]!r} is {vocabulary.category[i].replace('_', ' ')}: its name is not its meaning"
    return f"no other tokens spell {vocabulary.text[i]!r}" if options.sources == "subtokens" else "it has no neighbours"
