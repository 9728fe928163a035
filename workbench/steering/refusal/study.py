"""Can a model be steered to refuse? A direction and SAE features from given replies, beside their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.bases.saecode import refuse_transcoder
from workbench.controls.directions import random_directions
from workbench.core.errors import InvalidInputError
from workbench.core.progress import track
from workbench.core.stats import Estimate, paired_difference, sample_mean, wilson
from workbench.core.tokens import TokenBatch
from workbench.interventions.ops import Add, ProjectOut
from workbench.interventions.saes import SAEClamp
from workbench.saes.formats.load import check_sae_fits
from workbench.steering.directions.contrast import TwoByTwo, cosine, mean_activations
from workbench.steering.refusal.arms import Applied, Arm, distinct_bigrams, replies_of, reply_nats, text_loss
from workbench.steering.refusal.contrast_features import (
    EVERY_TOKEN_BUT_THE_FIRST,
    FeatureContrast,
    FeatureRow,
    find_refusal_features,
    matched_features,
    screen_features,
)
from workbench.steering.refusal.data import Exchange, PromptPair, RefusalData, Split, as_chats, exchanges, refusal_data
from workbench.steering.refusal.measures import first_token_kl, is_refusal, refusal_log_odds, refusal_token_ids
from workbench.steering.refusal.refusal_report import RefusalReport
from workbench.steering.refusal.result import ArmResult, Contrast

SCOPE = EVERY_TOKEN_BUT_THE_FIRST


@dataclass(frozen=True)
class RefusalOptions:
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


def refusal_study(
    model: Any,
    sae: Any | None = None,
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
    arms = _arms(effects.reply, sae, rows[: options.n_features], matched, options)
    text = _text_rows(model, data.plain_texts if texts is None else texts, options.text_tokens)
    measured = _measure(model, arms, prompts, text, tokens, site, options)
    return RefusalReport(
        model=model.name,
        site=site,
        n_train=options.n_train,
        n_val=options.n_val,
        seed=options.seed,
        refusal_tokens=tuple(model.tokenizer.decode([t]) for t in tokens),
        contrast=contrast,
        features=rows,
        arms=tuple(_result(arm, measured, data.phrases, options.seed) for arm in arms),
        new_tokens=options.new_tokens,
        note=prompts.note,
    )


def _site(model: Any, sae: Any | None, site: str | None) -> str:
    if sae is None and site is None:
        raise InvalidInputError(
            "refusal_study: neither an SAE nor a site was given. Name one, such as site='resid_post.15'."
        )
    if sae is not None:
        refuse_transcoder(sae, "refusal_study")
    own = None if sae is None else check_sae_fits(model, sae)
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


def _cells(model: Any, train: Sequence[PromptPair], data: RefusalData) -> _Cells:
    """The 2x2: the i-th harmful and the i-th harmless prompt get the same replies."""
    harmful, harmless = [p.harmful for p in train], [p.harmless for p in train]
    return _Cells(
        exchanges(model, harmful, data.refusals),
        exchanges(model, harmful, data.compliant),
        exchanges(model, harmless, data.refusals),
        exchanges(model, harmless, data.compliant),
    )


def _direction(model: Any, site: str, cells: _Cells) -> tuple[TwoByTwo, Contrast]:
    order = (cells.harmful_refusal, cells.harmful_compliant, cells.harmless_refusal, cells.harmless_compliant)
    means = [mean_activations(model, cell.tokens, [site], cell.is_reply)[site] for cell in order]
    effects = TwoByTwo.of(*means)
    norms = [float(v.norm()) for v in (effects.reply, effects.prompt, effects.interaction, effects.simple)]
    alike = float(cosine(effects.simple, effects.reply))
    return effects, Contrast(*norms, cosine_simple_reply=alike, n=len(means[0]))


def _features(
    model: Any,
    sae: Any | None,
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
    return rows, matched_features(contrast, chosen, 2 * options.n_test, seed=options.seed)


def _arms(
    direction: Float[Tensor, " d"],
    sae: Any,
    features: Sequence[FeatureRow],
    matched: Sequence[tuple[int, ...]],
    options: RefusalOptions,
) -> tuple[Arm, ...]:
    random = random_directions(direction, 2 * options.n_test, seed=options.seed, orthogonal=True)
    arms = [Arm("unsteered", "unsteered", 0.0)]
    for strength in options.strengths:
        control = f"random direction x{strength:g}"
        arms.append(
            Arm(f"refusal direction x{strength:g}", "refusal direction", strength, (Add(direction, strength),), control)
        )
        arms.append(Arm(control, "random direction", strength, tuple(Add(v, strength) for v in random)))
    for clamp in options.clamps if features else ():
        control, ids = f"random features at {clamp:g} max", [row.feature for row in features]
        # The control gets the same activations, so that with matched decoder norms it pushes as hard.
        value = torch.tensor([clamp * row.max_act for row in features])
        arms.append(
            Arm(f"refusal features at {clamp:g} max", "refusal features", clamp, (SAEClamp(sae, ids, value),), control)
        )
        arms.append(Arm(control, "random features", clamp, tuple(SAEClamp(sae, draw, value) for draw in matched)))
    arms.append(
        Arm("refusal direction removed", "direction removed", 1.0, (ProjectOut(direction),), "random direction removed")
    )
    arms.append(Arm("random direction removed", "random removed", 1.0, tuple(ProjectOut(v) for v in random)))
    return tuple(arms)


def _text_rows(model: Any, texts: Sequence[str] | TokenBatch, width: int) -> TokenBatch:
    batch = texts if isinstance(texts, TokenBatch) else model.tokens(list(texts))
    return TokenBatch.pad([row[:width].tolist() for row in batch.rows()], pad_id=0).to(model.device)


@dataclass(frozen=True, eq=False)
class _Measured:
    """What was measured in one arm; the first half of the prompts is harmful, the second harmless."""

    odds: np.ndarray
    kl_harmless: np.ndarray
    applied: Applied
    texts: tuple[str, ...]
    nats: np.ndarray
    distinct: np.ndarray
    loss: np.ndarray


def _measure(
    model: Any,
    arms: Sequence[Arm],
    prompts: TokenBatch,
    text: TokenBatch,
    tokens: Sequence[int],
    site: str,
    options: RefusalOptions,
) -> dict[str, _Measured]:
    n, found, base = len(prompts) // 2, {}, None
    part = min(n, options.n_scored)
    scored = [*range(part), *range(n, n + part)]
    for arm in track(arms, description="refusal: replies", unit="arms"):
        said = replies_of(model, arm, prompts, site, SCOPE, options.new_tokens)
        base = said.logits if base is None else base
        found[arm.name] = _Measured(
            odds=refusal_log_odds(said.logits, tokens).cpu().numpy(),
            kl_harmless=first_token_kl(base[n:], said.logits[n:]).cpu().numpy(),
            applied=said.applied,
            texts=said.texts,
            nats=reply_nats(model, prompts[torch.tensor(scored)], [said.ids[i] for i in scored]),
            distinct=distinct_bigrams(said.ids),
            loss=text_loss(model, arm, text, site, SCOPE),
        )
    return found


def _result(arm: Arm, measured: Mapping[str, _Measured], phrases: Sequence[str], seed: int) -> ArmResult:
    mine = measured[arm.name]
    odds, applied, n = mine.odds, mine.applied, len(mine.odds) // 2
    refused = [is_refusal(text, phrases) for text in mine.texts]
    return ArmResult(
        name=arm.name,
        family=arm.family,
        strength=arm.strength,
        norm=applied.norm,
        share=applied.share,
        control=arm.control,
        log_odds_harmful=sample_mean(odds[:n], unit="harmful prompts", seed=seed),
        log_odds_harmless=sample_mean(odds[n:], unit="harmless prompts", seed=seed),
        refused_harmful=wilson(sum(refused[:n]), n, unit="harmful prompts"),
        refused_harmless=wilson(sum(refused[n:]), n, unit="harmless prompts"),
        text_loss=sample_mean(mine.loss, unit="texts", seed=seed),
        reply_nats=_over_known(mine.nats, seed),
        distinct_2=_over_known(mine.distinct, seed),
        example_harmful=mine.texts[0],
        example_harmless=mine.texts[n],
        **_comparisons(arm, measured, n, seed),
    )


def _comparisons(arm: Arm, measured: Mapping[str, _Measured], n: int, seed: int) -> dict[str, Estimate | None]:
    """Differences from the unsteered model and from the control, paired by prompt; none for the unsteered model."""
    if not arm.ops:
        return {}

    def by_kind(name: str, against: np.ndarray) -> dict[str, Estimate | None]:
        kinds = (("harmful", slice(0, n)), ("harmless", slice(n, 2 * n)))
        return {
            f"{name}_{kind}": paired_difference(odds[part], against[part], unit=f"{kind} prompts", seed=seed)
            for kind, part in kinds
        }

    mine, unsteered = measured[arm.name], measured["unsteered"]
    odds, base = mine.odds, unsteered.odds
    shift = odds - base
    found = by_kind("change", base) | {
        "selective": paired_difference(shift[:n], shift[n:], unit="pairs of prompts", seed=seed),
        "kl_harmless": sample_mean(mine.kl_harmless, unit="harmless prompts", seed=seed),
        "text_change": paired_difference(mine.loss, unsteered.loss, unit="texts", seed=seed),
        "reply_change": _reply_change(mine.nats, unsteered.nats, seed),
    }
    return found if arm.control is None else found | by_kind("control", measured[arm.control].odds)


def _over_known(values: np.ndarray, seed: int) -> Estimate | None:
    known = values[np.isfinite(values)]
    return sample_mean(known, unit="replies", seed=seed) if len(known) else None


def _reply_change(mine: np.ndarray, base: np.ndarray, seed: int) -> Estimate | None:
    both = np.isfinite(mine) & np.isfinite(base)
    return paired_difference(mine[both], base[both], unit="replies", seed=seed) if both.any() else None
