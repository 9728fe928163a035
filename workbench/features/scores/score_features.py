"""All scores of an SAE's features in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.bases.sae import AnySAE, as_basis
from workbench.controls.directions import random_directions
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError, did_you_mean
from workbench.core.jsontext import Record
from workbench.features.passes.contexts import MISSING, ContextOptions, TopContexts, top_contexts
from workbench.features.scores.input_score import input_score
from workbench.features.scores.logit_lens import feature_ids, lens_tokens, target_site
from workbench.features.scores.origin import origin
from workbench.features.scores.output_score import OutputOptions, OutputScores, direction_scores
from workbench.features.scores.table import COLUMNS, FeatureTable
from workbench.features.token_classes import TokenTexts
from workbench.hooks.sites import Site
from workbench.models.model import Model

SCORES = ("input", "output")
_OF_DECODER = ("input_score", "output_score", "output_score_delta", "confidence_delta")
"""Columns that have no value for a feature whose decoder row is zero."""


@checked
@dataclass(frozen=True)
class ScoreOptions(OneLine):
    """Details of scoring that rarely change; see `OutputOptions`.

    Attributes:
        k: lens tokens per feature.
        random_directions: number of random directions scored as control.
        seed: of the controls.
    """

    k: int = 20
    rows: int = 256
    precision: Literal["float32", "model"] = "float32"
    contexts: ContextOptions = field(default_factory=ContextOptions)
    random_directions: int = 256
    seed: int = 0


@checked
def score_features(
    model: Model,
    sae: AnySAE,
    store: ActivationStore | None = None,
    site: str | Site | None = None,
    features: Sequence[int] | None = None,
    scores: Sequence[str] = SCORES,
    prompt: str | Sequence[str] = "From my experience,",
    strength: float = 10.0,
    options: ScoreOptions | None = None,
) -> FeatureTable:
    """Input and output scores, frequency and top contexts of an SAE's features, with the controls of both scores.

    Without a store there are no contexts, so input scores are nan; output scores need none.

    Args:
        model: the model that the SAE was trained on.
        sae: an SAE in the sae_lens form.
        store: activations to find contexts in.
        site: where the SAE reads; its own site by default.
        features: which; all by default.
        scores: "input", "output" or both.
        prompt: neutral text whose last token is steered for the output score; of several the mean is taken.
        strength: factor on the largest activation at that token.
        options: details.

    Raises:
        MismatchError: if the SAE or the store belongs to another model.
        UnknownSiteError: if the site is not stored.
        InvalidInputError: for an unknown score, or input scores alone without a store.
    """
    options = options or ScoreOptions()
    if unknown := [str(name) for name in scores if name not in SCORES]:
        raise InvalidInputError(
            f"scores={tuple(scores)!r}: there is no score {unknown[0]!r}. {did_you_mean(unknown[0], SCORES)}"
        )
    if not scores or (store is None and "output" not in scores):
        raise InvalidInputError(f"scores={tuple(scores)!r}, store={store}: nothing to do. Input scores need a store.")
    where, ids = target_site(model, sae, site), feature_ids(sae, features)
    if store is not None:  # before anything is computed
        store.check_model(model)
        store.site(str(where))
    basis = as_basis(sae)
    rows = basis.rows(ids)
    zero = ~basis.writing()[ids.to(rows.device)]
    # A zero row writes nothing: any direction keeps the arrays in shape, and its scores become nan.
    rows = torch.where(zero[:, None], torch.ones_like(rows), rows)
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    outputs = random = contexts = None
    if "output" in scores:
        how = OutputOptions(
            prompts[0] if len(prompts) == 1 else prompts, strength, options.k, options.rows, options.precision
        )
        outputs = direction_scores(model, sae, rows, where, how)
        if options.random_directions and not bool(zero.all()):
            directions = random_directions(rows[~zero], options.random_directions, seed=options.seed)
            random = direction_scores(model, sae, directions, where, how)
    if store is not None:
        contexts = top_contexts(store, sae, model.tokenizer, ids, str(where), options.contexts)
    lens_ids = (outputs.lens if outputs else lens_tokens(model, rows, options.k)).ids.cpu()
    meta = _meta(model, sae, where, options, strength) | {
        "prompt": prompts[0] if len(prompts) == 1 else list(prompts),
        "a_max": outputs.a_max if outputs else None, "n_tokens": contexts.n_tokens if contexts else 0,
        "skipped_blocks": outputs.skipped_blocks if outputs else None, "scores": list(scores),
    }  # fmt: skip
    inputs, shuffled = _input_scores(contexts if "input" in scores else None, lens_ids, ~zero.cpu(), options)
    controls = {"shuffled_input_score": shuffled, "random_output_score": tuple(random.score.tolist()) if random else ()}
    vocabulary = TokenTexts.of(model.tokenizer).padded(model.d_vocab)
    frame = _frame(vocabulary, ids, lens_ids, inputs, outputs, contexts)
    frame.loc[zero.cpu().numpy(), list(_OF_DECODER)] = float("nan")
    for row in zero.nonzero().flatten().tolist():
        frame.at[row, "best_token"], frame.at[row, "top_tokens"], frame.at[row, "top_token_ids"] = "", [], []
    return FeatureTable(frame, meta, controls)


def _meta(model: Model, sae: AnySAE, site: Site, options: ScoreOptions, strength: float) -> Record:
    precision = "float32" if options.precision == "float32" else str(model.dtype).removeprefix("torch.")
    return {
        **origin(model, sae, site), "strength": strength, "k": options.k, "precision": precision,
        "min_contexts": options.contexts.min_contexts, "contexts": asdict(options.contexts), "seed": options.seed,
        "output_score": "steered model only (as in the paper's code); output_score_delta subtracts the unsteered model",
    }  # fmt: skip


def _input_scores(
    contexts: TopContexts | None, lens_ids: Tensor, writes: Tensor, options: ScoreOptions
) -> tuple[Tensor | None, tuple[float, ...]]:
    """Input scores, and those of the same contexts against the lens tokens of another feature with a decoder row."""
    if contexts is None:
        return None, ()
    least = options.contexts.min_contexts
    scores = input_score(contexts.tokens, lens_ids, least)
    n = int(writes.sum())
    if n < 2:
        return scores, ()
    shift = 1 + int(torch.randint(n - 1, (1,), generator=torch.Generator().manual_seed(options.seed)))
    shuffled = input_score(contexts.tokens[writes], lens_ids[writes].roll(shift, dims=0), least)
    return scores, tuple(shuffled[~shuffled.isnan()].tolist())


def _frame(
    texts: TokenTexts, ids: Tensor, lens_ids: Tensor, inputs: Tensor | None, outputs: OutputScores | None,
    contexts: TopContexts | None,
) -> Any:  # fmt: skip
    import pandas as pd

    decoded, n = {token: texts.text(token) for token in lens_ids.unique().tolist()}, len(ids)
    columns: dict[str, list[Any]] = dict.fromkeys(COLUMNS, [float("nan")] * n) | {
        "feature": ids.tolist(), "n_contexts": [0] * n, "best_token": [""] * n,
        "top_tokens": [[decoded[t] for t in row] for row in lens_ids.tolist()], "top_token_ids": lens_ids.tolist(),
        "contexts": [[] for _ in range(n)], "context_token_ids": [[] for _ in range(n)],
    }  # fmt: skip
    if inputs is not None:
        columns["input_score"] = inputs.tolist()
    if outputs:
        columns |= {
            "output_score": outputs.score.tolist(), "output_score_delta": outputs.delta.tolist(),
            "confidence_delta": outputs.confidence.tolist(),
            "best_token": [decoded[t] for t in outputs.token.tolist()],
        }  # fmt: skip
    if contexts:
        columns |= {
            "frequency": contexts.frequency.tolist(), "max_act": contexts.max_act.tolist(),
            "n_contexts": contexts.counts.tolist(), "contexts": [list(shown) for shown in contexts.texts],
            "context_token_ids": [[t for t in row if t != MISSING] for row in contexts.tokens.tolist()],
        }  # fmt: skip
    return pd.DataFrame(columns)
