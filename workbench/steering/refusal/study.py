"""Can a model be steered to refuse? A direction and SAE features from given replies, beside their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.fits import placed_at
from workbench.bases.sae import AnySAE, as_basis
from workbench.controls.arms import UNEDITED, Arm, InTurn, Sweep
from workbench.controls.directions import random_directions
from workbench.controls.matching import matched_features
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.progress import task
from workbench.core.stats import POSITIVE, SHARE, Estimate, paired_difference, sample_mean, wilson
from workbench.core.tokens import TokenBatch
from workbench.interventions.ops import Add, ProjectOut
from workbench.interventions.saes import SAEClamp
from workbench.models.model import Model
from workbench.steering.directions.contrast import TwoByTwo, cosine, mean_activations
from workbench.steering.refusal.contrast_features import (
    EVERY_TOKEN_BUT_THE_FIRST,
    FeatureContrast,
    FeatureRow,
    find_refusal_features,
    screen_features,
)
from workbench.steering.refusal.data import Exchange, PromptPair, RefusalData, Split, as_chats, exchanges, refusal_data
from workbench.steering.refusal.measures import first_token_kl, is_refusal, refusal_log_odds, refusal_token_ids
from workbench.steering.refusal.refusal_report import RefusalReport
from workbench.steering.refusal.result import Contrast, RefusalArm
from workbench.steering.sweep.arms import EditSummary
from workbench.steering.sweep.measures import distinct_2
from workbench.steering.sweep.rows import ArmRunner, Harm, Writing, Written

SCOPE = EVERY_TOKEN_BUT_THE_FIRST
STRONG_AUROC = 0.75
"""AUROC above which a candidate is no control."""


@checked
@dataclass(frozen=True, kw_only=True)
class RefusalOptions(OneLine):
    """Sizes and strengths of the refusal study.

    Attributes:
        n_train: pairs of prompts from which direction and features are made.
        n_val: pairs on which features are screened.
        n_test: pairs on which everything is reported.
        strengths: multiples of the difference of means that are added.
        clamps: activations that features are set to, in multiples of each feature's largest on the training replies.
        n_features: features clamped together.
        n_candidates: features screened one by one.
        min_tokens: tokens of one refusal on which a candidate has to be active.
        new_tokens: longest reply.
        text_tokens: longest row of plain text.
        n_scored: replies of each kind and arm whose loss under the unsteered model is taken.
        seed: of the split and of the random controls.
    """

    n_train: int = 16
    n_val: int = 8
    n_test: int = 12
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    clamps: tuple[float, ...] = (0.5, 1.0)
    n_features: int = 3
    n_candidates: int = 8
    min_tokens: int = 2
    new_tokens: int = 20
    text_tokens: int = 48
    n_scored: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strengths or min(self.strengths) <= 0 or (self.clamps and min(self.clamps) <= 0):
            raise InvalidInputError(
                f"RefusalOptions: strengths {self.strengths}, clamps {self.clamps}. Give positive numbers."
            )
        if self.n_features < 1 or self.n_candidates < self.n_features or self.new_tokens < 2 or self.text_tokens < 2:
            raise InvalidInputError(
                f"RefusalOptions: n_features={self.n_features}, n_candidates={self.n_candidates}, "
                f"new_tokens={self.new_tokens}, "
                f"text_tokens={self.text_tokens}. Give 1 <= n_features <= n_candidates and at least 2 tokens."
            )


@checked
def refusal_study(
    model: Model,
    sae: AnySAE | None = None,
    texts: Sequence[str] | TokenBatch | None = None,
    *,
    site: str | None = None,
    data: RefusalData | None = None,
    options: RefusalOptions | None = None,
) -> RefusalReport:
    """Steers refusal at one site and measures what it does to harmful and harmless prompts and to plain text.

    Prompts go through the model's chat template, default system prompt included. Every edit touches all tokens but the
    first. Prompts of the test part are seen by nothing but the final measurement.

    Args:
        model: the model.
        sae: its SAE; without one only the direction is studied.
        texts: plain text for the loss that steering costs; by default a few short passages that come with the package.
        site: where to steer; by default where the SAE reads.
        data: prompts and given replies; by default those of the package.
        options: sizes and strengths.

    Raises:
        MismatchError: if the SAE belongs to another model or another site, or is a transcoder.
        InvalidInputError: if neither SAE nor site is given, there are too few prompts, or the replies would be longer
            than the model was made for.
        EditError: if an edit changed nothing.
    """
    options, data = options or RefusalOptions(), data or refusal_data()
    site = _site(model, sae, site)
    split = data.split(options.n_train, options.n_val, options.n_test, options.seed)
    prompts = model.tokens(as_chats([p.harmful for p in split.test] + [p.harmless for p in split.test]))
    model.require_room(int(prompts.lengths.max()) + options.new_tokens)
    tokens = refusal_token_ids(model, data.refusals, data.compliant)
    cells = _cells(model, split.train, data)
    effects, contrast = _direction(model, site, cells)
    rows, matched = _features(model, sae, site, cells, effects.reply, split, tokens, options)
    sweep = _sweep(effects.reply, sae, rows[: options.n_features], matched, options)
    text = _text_rows(model, data.plain_texts if texts is None else texts, options.text_tokens)
    measured = _measure(model, sweep, prompts, text, tokens, site, options)
    return RefusalReport(
        model=model.name,
        site=site,
        n_train=options.n_train,
        n_val=options.n_val,
        seed=options.seed,
        refusal_tokens=tuple(model.tokenizer.decode([t]) for t in tokens),
        contrast=contrast,
        features=rows,
        arms=tuple(_result(arm, sweep, measured, data.phrases, options.seed) for arm in sweep),
        new_tokens=options.new_tokens,
        note=prompts.note,
    )


def _site(model: Model, sae: AnySAE | None, site: str | None) -> str:
    if sae is None and site is None:
        raise InvalidInputError(
            "refusal_study: neither an SAE nor a site was given. Name one, such as site='resid_post.15'."
        )
    if sae is not None:
        as_basis(sae).refuse_transcoder("refusal_study")
    own = None if sae is None else placed_at(sae, model).site
    asked = None if site is None else str(model.resolve(site))
    if own is not None and asked not in (None, own):
        raise InvalidInputError(
            f"refusal_study: site={asked}, but the SAE reads {own}. Leave the site out, or the SAE."
        )
    return str(own or asked)


@dataclass(frozen=True, eq=False)
class _Cells:
    harmful_refusal: Exchange
    harmful_compliant: Exchange
    harmless_refusal: Exchange
    harmless_compliant: Exchange

    def of_reply(self, kind: str) -> Exchange:
        """Both kinds of prompt with one kind of reply, as one batch."""
        parts = (
            [self.harmful_refusal, self.harmless_refusal]
            if kind == "refusal"
            else [self.harmful_compliant, self.harmless_compliant]
        )
        rows = [row.tolist() for part in parts for row in part.tokens.rows()]
        n_reply = torch.cat([part.is_reply.sum(1) for part in parts])
        tokens = TokenBatch.pad(rows, pad_id=0).to(parts[0].tokens.ids.device)
        width = tokens.ids.shape[1]
        return Exchange(tokens, torch.arange(width, device=n_reply.device)[None] >= width - n_reply[:, None])


def _cells(model: Model, train: Sequence[PromptPair], data: RefusalData) -> _Cells:
    """The 2x2: the i-th harmful and the i-th harmless prompt get the same replies."""
    harmful, harmless = [p.harmful for p in train], [p.harmless for p in train]
    return _Cells(
        exchanges(model, harmful, data.refusals),
        exchanges(model, harmful, data.compliant),
        exchanges(model, harmless, data.refusals),
        exchanges(model, harmless, data.compliant),
    )


def _direction(model: Model, site: str, cells: _Cells) -> tuple[TwoByTwo, Contrast]:
    order = (cells.harmful_refusal, cells.harmful_compliant, cells.harmless_refusal, cells.harmless_compliant)
    means = [mean_activations(model, cell.tokens, [site], cell.is_reply)[site] for cell in order]
    effects = TwoByTwo.of(*means)
    norms = [float(v.norm()) for v in (effects.reply, effects.prompt, effects.interaction, effects.simple)]
    alike = float(cosine(effects.simple, effects.reply))
    return effects, Contrast(*norms, cosine_simple_reply=alike, n=len(means[0]))


def _features(
    model: Model,
    sae: AnySAE | None,
    site: str,
    cells: _Cells,
    direction: Float[Tensor, " d"],
    split: Split,
    tokens: Sequence[int],
    options: RefusalOptions,
) -> tuple[tuple[FeatureRow, ...], tuple[tuple[int, ...], ...]]:
    """Screened candidates, best first, and random sets that match the ones that will be clamped."""
    if sae is None or not options.clamps:
        return (), ()
    contrast: FeatureContrast = find_refusal_features(
        model, sae, site, cells.of_reply("refusal"), cells.of_reply("compliant"), direction, options.min_tokens
    )
    if not contrast.candidates:
        return (), ()
    prompts = model.tokens(as_chats([p.harmful for p in split.val]))
    top = contrast.candidates[: options.n_candidates]
    rows = screen_features(model, sae, site, top, prompts, tokens, max(options.clamps))
    chosen = [row.feature for row in rows[: options.n_features]]
    strong = [row.feature for row in contrast.candidates if row.auroc > STRONG_AUROC]
    return rows, matched_features(
        chosen, contrast.frequency, 2 * options.n_test, norm=contrast.decoder_norm, excluded=strong, seed=options.seed
    )


def _sweep(
    direction: Float[Tensor, " d"],
    sae: AnySAE | None,
    features: Sequence[FeatureRow],
    matched: Sequence[tuple[int, ...]],
    options: RefusalOptions,
) -> Sweep:
    """The unsteered model, the direction and the features at every strength, and the direction removed."""
    random = random_directions(direction, 2 * options.n_test, seed=options.seed, orthogonal=True)
    sweep = Sweep((UNEDITED,)) + Sweep.over(
        options.strengths,
        {"refusal direction": lambda strength: InTurn((Add(direction, strength),))},
        {"random direction": lambda strength: InTurn(tuple(Add(v, strength) for v in random))},
    )
    if features and sae is not None:
        basis = as_basis(sae)
        ids, peaks = [row.feature for row in features], torch.tensor([row.max_act for row in features])
        # The control gets the same activations, so that with matched decoder norms it pushes as hard.
        sweep += Sweep.over(
            options.clamps,
            {"refusal features": lambda clamp: InTurn((SAEClamp(basis, ids, clamp * peaks),))},
            {"random features": lambda clamp: InTurn(tuple(SAEClamp(basis, draw, clamp * peaks) for draw in matched))},
            label="{kind} at {strength} max",
        )
    name = "refusal direction removed"
    return sweep + Sweep((
        Arm(name=name, kind="direction removed", strength=1.0, edits=InTurn((ProjectOut(direction),))),
        Arm(
            name="random direction removed", kind="random removed", strength=1.0,
            edits=InTurn(tuple(ProjectOut(v) for v in random)), control_for=(name,),
        ),
    ))  # fmt: skip


def _text_rows(model: Model, texts: Sequence[str] | TokenBatch, width: int) -> TokenBatch:
    batch = texts if isinstance(texts, TokenBatch) else model.tokens(list(texts))
    return TokenBatch.pad([row[:width].tolist() for row in batch.rows()], pad_id=0).to(model.device)


@dataclass(frozen=True, eq=False)
class _Measured:
    """What was measured in one arm; the first half of the prompts is harmful, the second harmless."""

    written: Written
    loss: Float[np.ndarray, " texts"]
    scored: Int[np.ndarray, " scored"]

    @property
    def odds(self) -> Float[np.ndarray, " prompts"]:
        return self.written.first["odds"].numpy()

    @property
    def nats(self) -> Float[np.ndarray, " scored"]:
        return self.written.nll.double().numpy()[self.scored]


def _measure(
    model: Model,
    sweep: Sweep,
    prompts: TokenBatch,
    text: TokenBatch,
    tokens: Sequence[int],
    site: str,
    options: RefusalOptions,
) -> dict[str, _Measured]:
    def first(logits: Tensor, base: Tensor, _rows: Tensor) -> dict[str, Tensor]:
        return {"odds": refusal_log_odds(logits, tokens), "kl": first_token_kl(base, logits)}

    n = len(prompts) // 2
    scored = np.array([kind + i for kind in (0, n) for i in range(min(n, options.n_scored))])
    writing = Writing(new_tokens=options.new_tokens, scope=SCOPE, edits_prompt=True, batch_size=len(prompts))
    runner, harm = ArmRunner(model, site, prompts, writing), Harm(model, site, text, SCOPE)
    measured = {}
    with task(total=len(sweep) * len(prompts), description="refusal", unit="replies") as progress:
        for arm in sweep:
            written = runner.write(arm, first, progress)
            loss = harm.base if arm.edits is None else harm.losses(arm.edits)[0]
            measured[arm.name] = _Measured(written, loss, scored)
    return measured


def _result(arm: Arm, sweep: Sweep, measured: Mapping[str, _Measured], phrases: Sequence[str], seed: int) -> RefusalArm:
    mine, control = measured[arm.name], sweep.control(arm)
    others = (measured[UNEDITED.name], None if control is None else measured[control.name])
    odds, texts, n = mine.odds, mine.written.texts, len(mine.odds) // 2
    refused = [is_refusal(text, phrases) for text in texts]
    edited = EditSummary.of(arm.strength, mine.written.reports)
    return RefusalArm(
        name=arm.name,
        family=arm.kind,
        strength=arm.strength,
        norm=edited.mean_norm,
        share=edited.share,
        control=None if control is None else control.name,
        log_odds_harmful=sample_mean(odds[:n], unit="harmful prompts", seed=seed),
        log_odds_harmless=sample_mean(odds[n:], unit="harmless prompts", seed=seed),
        refused_harmful=wilson(sum(refused[:n]), n, unit="harmful prompts"),
        refused_harmless=wilson(sum(refused[n:]), n, unit="harmless prompts"),
        text_loss=sample_mean(mine.loss, unit="texts", seed=seed, within=POSITIVE),
        reply_nats=_over_known(mine.nats, seed),
        distinct_2=_over_known(np.array([distinct_2(ids) for ids in mine.written.ids]), seed, SHARE),
        example_harmful=texts[0],
        example_harmless=texts[n],
        **({} if arm.edits is None else _comparisons(mine, *others, seed)),
    )


def _comparisons(
    mine: _Measured, unsteered: _Measured, control: _Measured | None, seed: int
) -> dict[str, Estimate | None]:
    """Differences from the unsteered model and from the control, paired by prompt."""
    n = len(mine.odds) // 2
    shift, kl = mine.odds - unsteered.odds, mine.written.first["kl"].numpy()
    differences: dict[str, Estimate | None] = {
        f"{name}_{kind}": paired_difference(mine.odds[part], other.odds[part], unit=f"{kind} prompts", seed=seed)
        for name, other in (("change", unsteered), ("control", control))
        if other is not None
        for kind, part in (("harmful", slice(0, n)), ("harmless", slice(n, 2 * n)))
    }
    return differences | {
        "selective": paired_difference(shift[:n], shift[n:], unit="pairs of prompts", seed=seed),
        "kl_harmless": sample_mean(kl[n:].clip(min=0.0), unit="harmless prompts", seed=seed, within=POSITIVE),
        "text_change": paired_difference(mine.loss, unsteered.loss, unit="texts", seed=seed),
        "reply_change": _reply_change(mine.nats, unsteered.nats, seed),
    }


def _over_known(values: np.ndarray, seed: int, within: tuple[float, float] = POSITIVE) -> Estimate | None:
    known = values[np.isfinite(values)]
    return sample_mean(known, unit="replies", seed=seed, within=within) if len(known) else None


def _reply_change(mine: np.ndarray, base: np.ndarray, seed: int) -> Estimate | None:
    both = np.isfinite(mine) & np.isfinite(base)
    return paired_difference(mine[both], base[both], unit="replies", seed=seed) if both.any() else None
