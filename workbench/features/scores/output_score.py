"""Output score: whether steering with a feature writes the tokens that the logit lens predicts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.html import Shown
from workbench.core.metrics import Standing, standing
from workbench.core.progress import Task, task
from workbench.features.scores.last_token import LastToken, fp32_copy
from workbench.features.scores.logit_lens import LensTokens, feature_ids, lens_tokens, slab_rows, target_site
from workbench.hooks.sites import Site
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd


@checked
@dataclass(frozen=True)
class OutputOptions(OneLine):
    """How output scores are measured.

    Attributes:
        prompt: neutral text whose last token is steered, or several, over which scores are averaged.
        strength: factor s on `a_max`, the largest feature activation at that token.
        k: number of lens tokens per feature.
        rows: edits per forward pass.
        precision: "float32" scores a model of lower precision on a copy in fp32; "model" uses it as it is.
        screen: features whose score is provably below this get an upper bound instead of a score; 0 scores all. With
            several prompts a feature is scored on each prompt where its bound reaches this.
        confidence_k: most probable tokens that the confidence is taken over.
    """

    prompt: str | tuple[str, ...] = "From my experience,"
    strength: float = 10.0
    k: int = 20
    rows: int = 256
    precision: Literal["float32", "model"] = "float32"
    screen: float = 0.0
    confidence_k: int = 1

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise InvalidInputError(
                f"OutputOptions(prompt={self.prompt!r}): give at least one text, none of them empty."
            )
        if self.confidence_k < 1:
            raise InvalidInputError(f"OutputOptions(confidence_k={self.confidence_k}): take at least 1 token.")
        if not 0 < self.strength < math.inf or self.rows < 1 or not 0 <= self.screen <= 1:
            raise InvalidInputError(
                f"OutputOptions(strength={self.strength}, rows={self.rows}, screen={self.screen}): "
                "strength must be positive and finite, rows at least 1, screen between 0 and 1."
            )

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts."""
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputScores(Shown):
    """Output scores of some directions.

    Attributes:
        score: `(1 - r/|V|) p(t*)` of the steered model, mean over prompts; nan where screening stopped on any prompt.
        delta: the same minus the score of the unsteered model; nan where screening stopped.
        confidence: confidence of the steered minus that of the unsteered model (`confidence`), mean over prompts; nan
            where screening stopped.
        bound: an upper bound on `score`; the score itself where it was computed.
        token: t* on the first prompt, the most probable lens token of the steered model (by the bound's partial logits
            where screened).
        a_max: factor of strengths, the largest activation (times the scale of the SAE's output, where it normalises its
            input); mean over prompts.
        lens: the lens tokens of each direction.
        skipped_blocks: whether the blocks before the site were computed once instead of per edit.
        by_prompt: `score` on each prompt.
    """

    score: Float[Tensor, " directions"]
    delta: Float[Tensor, " directions"]
    confidence: Float[Tensor, " directions"]
    bound: Float[Tensor, " directions"]
    token: Int[Tensor, " directions"]
    a_max: float
    lens: LensTokens
    skipped_blocks: bool
    by_prompt: Float[Tensor, "prompts directions"]

    def frame(self) -> pd.DataFrame:
        """One row per direction: its scores, their bound, and t* with its id."""
        import pandas as pd

        names = ("score", "delta", "confidence", "bound", "token")
        return pd.DataFrame({name: getattr(self, name).detach().cpu().numpy() for name in names})


@checked
def confidence(logits: Float[Tensor, "rows d_vocab"], k: int = 1) -> Float[Tensor, " rows"]:
    """`-(1/k) sum log p` over the k most probable tokens, in nats: 0 is certain, larger is less sure.

    The change that a feature makes to it is a second way to choose features to steer with: those that change it most,
    in either direction.

    Source: Wang et al. 2025 (arXiv 2510.03659), who take k = 1.

    >>> confidence(torch.zeros(1, 4)).item() == torch.tensor(4.0).log().item()  # p = 1/4
    True
    """
    top = logits.amax(dim=1)
    return _confidence(logits, standing(logits, top), k)


def _confidence(logits: Tensor, known: Standing, k: int) -> Tensor:
    """`confidence` with a known sum over the vocabulary."""
    if k == 1:  # the largest logit is at log p = -log_total
        return known.log_total
    top = logits.topk(min(k, logits.shape[1]), dim=1).values.float()
    return known.log_total - (top - known.top[:, None]).mean(dim=1)


@checked
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
    score, token, _ = _rank_score(logits, lens_ids)
    return score, token


def _rank_score(logits: Tensor, lens_ids: Tensor) -> tuple[Tensor, Tensor, Standing]:
    best, place = logits.gather(1, lens_ids).max(dim=1)
    known = standing(logits, best)
    p = (best.float() - known.top - known.log_total).exp()
    return (1 - known.above / logits.shape[1]) * p, lens_ids.gather(1, place[:, None]).squeeze(1), known


def _one_row_scores(logits: Float[Tensor, " d_vocab"], lens_ids: Int[Tensor, "rows k"]) -> Float[Tensor, " rows"]:
    """`rank_score` of one row of logits for many choices of lens tokens: the row is sorted once."""
    best = logits[lens_ids].amax(dim=1)
    above = len(logits) - torch.searchsorted(logits.sort().values, best, right=True)
    known = standing(logits[None], logits.amax()[None])
    return (1 - above / len(logits)) * (best.float() - known.top - known.log_total).exp()


@checked
def output_scores(
    model: Model,
    sae: AnySAE,
    features: Iterable[int | float] | None = None,
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

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063): s = 10, k = 20, prompt "From my experience," (code) or
    "In my experience," (text).
    """
    ids = feature_ids(sae, features)
    return direction_scores(model, sae, as_basis(sae).rows(ids), site, options)


@checked
def output_score(model: Model, sae: AnySAE, feature: int, **kwargs: Any) -> float:
    """Output score of one feature, of the steered model alone; see `output_scores`."""
    return float(output_scores(model, sae, [feature], **kwargs).score)


@checked
def output_score_delta(model: Model, sae: AnySAE, feature: int, **kwargs: Any) -> float:
    """Output score of one feature, steered minus unsteered; see `output_scores`."""
    return float(output_scores(model, sae, [feature], **kwargs).delta)


@checked
def direction_scores(
    model: Model,
    sae: AnySAE,
    directions: Float[Tensor, "directions d_model"],
    site: str | Site | None = None,
    options: OutputOptions | None = None,
) -> OutputScores:
    """Output scores of any directions, each with its own lens tokens; only `a_max` comes from the SAE."""
    options = options or OutputOptions()
    where = target_site(model, sae, site)
    scored = fp32_copy(model) if options.precision == "float32" else model
    directions = directions.to(model.device).float()
    lens = lens_tokens(scored, directions, options.k)
    with task(total=len(directions) * len(options.prompts), description="output scores", unit="features") as progress:
        by_prompt = []
        for prompt in options.prompts:
            run = LastToken(scored, scored.tokens(prompt).ids, where, min(options.rows, len(directions)))
            a_max = _largest_activation(as_basis(sae), run.x, prompt)
            by_prompt.append(_score_edits(run, a_max, directions, lens, options, progress))

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(one, name) for one in by_prompt]).mean(0)

    return OutputScores(
        score=mean("score"), delta=mean("delta"), confidence=mean("confidence"), bound=mean("bound"),
        token=by_prompt[0].token, a_max=sum(one.a_max for one in by_prompt) / len(by_prompt), lens=by_prompt[0].lens,
        skipped_blocks=all(one.skipped_blocks for one in by_prompt),
        by_prompt=torch.stack([one.score for one in by_prompt]),
    )  # fmt: skip


def _score_edits(
    run: LastToken, a_max: float, directions: Tensor, lens: LensTokens, options: OutputOptions, progress: Task
) -> OutputScores:
    """The scores on one prompt, on the CPU."""
    parts: list[tuple[Tensor, ...]] = []
    for part, lens_ids in zip(directions.split(options.rows), lens.ids.split(options.rows), strict=True):
        parts.append(score_hidden(run, run.hidden(options.strength * a_max * part), lens_ids, options))
        progress.advance(len(part))
    score, change, bound, token = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    unsteered = float(confidence(run.logits[None], options.confidence_k))
    return OutputScores(
        score=score, delta=score - _one_row_scores(run.logits, lens.ids).cpu(), confidence=change - unsteered,
        bound=bound, token=token, a_max=a_max, lens=LensTokens(lens.ids.cpu(), lens.values.cpu()),
        skipped_blocks=run.skips_blocks, by_prompt=score[None],
    )  # fmt: skip


def _largest_activation(basis: Basis, x: Tensor, prompt: str) -> float:
    a_max = float(basis.coefficients(x[None].detach()).max())
    if not a_max > 0:
        raise DegenerateInputError(
            f"No feature of this SAE is active at the last token of {prompt!r}, so there is no scale to steer with. "
            "Use another prompt."
        )
    return a_max


def score_hidden(
    run: LastToken, hidden: Float[Tensor, "rows d_model"], lens_ids: Int[Tensor, "rows k"], options: OutputOptions
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"], Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Score, confidence, upper bound and best token of edits, from what reaches the unembedding."""
    if options.screen > 0:
        bound, token = _upper_bound(run, hidden, lens_ids)
        survivors = (bound >= options.screen).nonzero().flatten()
    else:
        bound, token = torch.ones(len(hidden), device=hidden.device), lens_ids[:, 0].clone()
        survivors = torch.arange(len(hidden), device=hidden.device)
    score = torch.full((len(hidden),), float("nan"), device=hidden.device)
    sure = score.clone()
    for some in survivors.split(slab_rows(run.logits.shape[0])):
        logits = run.head.exact(hidden[some])
        score[some], token[some], known = _rank_score(logits, lens_ids[some])
        sure[some] = _confidence(logits, known, options.confidence_k)
    bound[survivors] = score[survivors]
    return score, sure, bound, token


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
