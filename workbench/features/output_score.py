"""Output score: whether steering with a feature writes the tokens that the logit lens says it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import DegenerateInputError, InvalidInputError
from workbench.features.lens import LensTokens, feature_ids, lens_tokens, slab_rows, target_site
from workbench.features.resume import LastToken, fp32_copy
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.progress import task


@dataclass(frozen=True)
class OutputOptions:
    """How output scores are measured.

    Attributes:
        prompt: neutral text whose last token is steered.
        strength: factor s on `a_max`, the largest feature activation at that token.
        k: number of lens tokens per feature.
        rows: edits per forward pass.
        precision: "float32" scores a model of lower precision on a copy in fp32; "model" uses it as it is.
        screen: features whose score is provably below this get an upper bound instead of a score; 0 scores all.
    """

    prompt: str = "From my experience,"
    strength: float = 10.0
    k: int = 20
    rows: int = 256
    precision: Literal["float32", "model"] = "float32"
    screen: float = 0.0

    def __post_init__(self) -> None:
        if self.strength <= 0 or self.rows < 1 or not 0 <= self.screen <= 1:
            raise InvalidInputError(
                f"OutputOptions(strength={self.strength}, rows={self.rows}, screen={self.screen}): "
                "strength must be positive, rows at least 1, screen between 0 and 1."
            )


@dataclass(frozen=True, eq=False)
class OutputScores:
    """Output scores of some directions.

    Attributes:
        score: `(1 - r/|V|) p(t*)` of the steered model; nan where screening stopped.
        delta: the same minus the score of the unsteered model; nan where screening stopped.
        bound: an upper bound on `score`; the score itself where it was computed.
        token: t*, the most probable lens token of the steered model (by the bound's partial logits where screened).
        a_max: the activation that strengths multiply, in the SAE's units.
        lens: the lens tokens of each direction.
        skipped_blocks: whether the blocks before the site were computed once instead of per edit.
    """

    score: Float[Tensor, " directions"]
    delta: Float[Tensor, " directions"]
    bound: Float[Tensor, " directions"]
    token: Int[Tensor, " directions"]
    a_max: float
    lens: LensTokens
    skipped_blocks: bool


def rank_score(
    logits: Float[Tensor, "rows d_vocab"], lens_ids: Int[Tensor, "rows k"]
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """`(1 - r/|V|) p(t*)` and t*: t* is the most probable lens token, r the number of tokens strictly more probable.

    With ties r does not depend on any order of the tokens. In [0, 1].

    Source: Arad, Mueller, Belinkov 2025, equation of the output score; their code ranks by argsort, where ties are
    arbitrary.

    >>> score, token = rank_score(torch.tensor([[0.0, 0.0]]), torch.tensor([[1]]))  # p = 1/2, nothing more probable
    >>> score.item(), token.item()
    (0.5, 1)
    """
    best, place = logits.gather(1, lens_ids).max(dim=1)
    rank = (logits > best[:, None]).sum(dim=1)
    p = (best - logits.logsumexp(dim=1)).exp()
    return (1 - rank / logits.shape[1]) * p, lens_ids.gather(1, place[:, None]).squeeze(1)


def output_scores(
    model: Model,
    sae: Any,
    features: Any = None,
    site: str | Site | None = None,
    options: OutputOptions | None = None,
) -> OutputScores:
    """Output scores of SAE features: one forward pass of the prompt with the last token steered by each feature.

    The edit is `x + s a_max W_dec[f]`, a_max being the largest activation of any feature at the token; the SAE's error
    is kept. `score` is what the paper's code computes (steered model only), `delta` what the paper's text defines
    (steered minus unsteered). The sweep equals one hooked forward pass per feature: in fp32 within 1e-5.

    Raises:
        MismatchError: if the SAE belongs to another model or site.
        DegenerateInputError: if no feature of the SAE is active at the prompt's last token.

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063): s = 10, k = 20, prompt "From my experience,".
    """
    ids = feature_ids(sae, features)
    return direction_scores(model, sae, sae.W_dec.detach()[ids], site, options)


def output_score(model: Model, sae: Any, feature: int, **kwargs: Any) -> float:
    """Output score of one feature, of the steered model alone; see `output_scores`."""
    return float(output_scores(model, sae, [feature], **kwargs).score)


def output_score_delta(model: Model, sae: Any, feature: int, **kwargs: Any) -> float:
    """Output score of one feature, steered minus unsteered; see `output_scores`."""
    return float(output_scores(model, sae, [feature], **kwargs).delta)


def direction_scores(
    model: Model,
    sae: Any,
    directions: Float[Tensor, "directions d_model"],
    site: str | Site | None = None,
    options: OutputOptions | None = None,
) -> OutputScores:
    """Output scores of any directions, each with its own lens tokens; the SAE only says how large `a_max` is."""
    options = options or OutputOptions()
    where = target_site(model, sae, site)
    batch = model.tokens(options.prompt)
    scored = fp32_copy(model) if options.precision == "float32" else model
    run = LastToken(scored, batch.ids, where, min(options.rows, len(directions)))
    a_max = _largest_activation(sae, run.x, options.prompt)
    directions = directions.to(model.device).float()
    lens = lens_tokens(scored, directions, options.k)
    base = torch.cat([rank_score(run.logits.expand(len(ids), -1), ids)[0] for ids in lens.ids.split(options.rows)])
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with task(total=len(directions), description="output scores", unit="features") as progress:
        for part, part_ids in zip(directions.split(options.rows), lens.ids.split(options.rows), strict=True):
            found.append(_score_part(run, options.strength * a_max * part, part_ids, options))
            progress.advance(len(part))
    score, bound, token = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    lens = LensTokens(lens.ids.cpu(), lens.values.cpu())
    return OutputScores(score, score - base.cpu(), bound, token, a_max, lens, run.skips_blocks)


def _largest_activation(sae: Any, x: Tensor, prompt: str) -> float:
    with torch.no_grad():
        acts = sae.encode(x[None].to(sae.W_dec))
    a_max = float(acts.max())
    if not a_max > 0:
        raise DegenerateInputError(
            f"No feature of this SAE is active at the last token of {prompt!r}, so there is no scale to steer with. "
            "Use another prompt."
        )
    return a_max


def _score_part(
    run: LastToken, change: Tensor, lens_ids: Tensor, options: OutputOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, upper bound and best token of one batch of edits."""
    hidden = run.hidden(change)
    if options.screen > 0:
        bound, token = _upper_bound(run, hidden, lens_ids)
        survivors = (bound >= options.screen).nonzero().flatten()
    else:
        bound, token = torch.ones(len(hidden), device=hidden.device), lens_ids[:, 0].clone()
        survivors = torch.arange(len(hidden), device=hidden.device)
    score = torch.full((len(hidden),), float("nan"), device=hidden.device)
    for some in survivors.split(slab_rows(run.logits.shape[0])):
        score[some], token[some] = rank_score(run.head.all(hidden[some]), lens_ids[some])
    bound[survivors] = score[survivors]
    return score, bound, token


def _upper_bound(run: LastToken, hidden: Tensor, lens_ids: Tensor, likely: int = 2048) -> tuple[Tensor, Tensor]:
    """`exp(z* - logsumexp over some tokens)`: never below the score, because fewer terms make a smaller sum.

    The tokens are those most probable without the edit; z* itself is always in the sum.
    """
    z = run.head.some(hidden, lens_ids)
    best, place = z.max(dim=1)
    common = run.logits.topk(min(likely, len(run.logits))).indices
    partial = run.head.shared(hidden, common).logsumexp(dim=1)
    in_sum = (lens_ids.gather(1, place[:, None]) == common).any(dim=1)
    lse = torch.where(in_sum, partial, torch.logaddexp(partial, best))
    # The two products round differently; the slack keeps the bound above the score.
    bound = ((best - lse).exp() * (1 + 1e-4)).clamp_max(1.0)
    return bound, lens_ids.gather(1, place[:, None]).squeeze(1)
