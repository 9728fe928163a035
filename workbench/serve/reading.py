"""Which features are active on a prompt, token by token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.base import Basis
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import rounded
from workbench.core.tokenizer import special_ids
from workbench.core.tokens import TokenBatch
from workbench.saes.formats.load import sae_keep_rule
from workbench.serve.ask import Ask
from workbench.serve.playground import Playground

N_STRONGEST = 5
"""Features that are named at each token."""
REASONS = ("", "first token", "special token", "norm of an attention sink")
"""Why a token is left out, by the numbers of `TokenPolicy.reasons`; SAEs are not trained on these."""
_MAX_ACTIVATIONS = 2**26


@torch.no_grad()
def active_features(playground: Playground, ask: Ask) -> Mapping[str, object]:
    """The strongest features at each token of a prompt in the unedited model, and how many are active there.

    Tokens that the SAE's keep rule drops, or without one a rule estimated from the prompt, have a reason instead.

    Raises:
        InvalidInputError: without an SAE, or for a prompt that is too long.
    """
    if playground.basis is None or playground.sae is None:
        raise InvalidInputError("Active features: no SAE was given. Start again with --sae FOLDER.")
    batch, site = playground.prompt(ask), str(playground.site)
    x = playground.model.capture(batch, [site])[site]
    policy = sae_keep_rule(playground.sae) or _estimated(batch, x)
    reasons = policy.reasons(x, batch.ids.to(x.device))[0].tolist()
    strongest = _strongest(playground.basis, x[0])
    tokens = [
        {
            "text": playground.shown(token), "left_out": REASONS[reason],
            "n_active": 0 if reason else n, "active": [] if reason else features,
        }
        for token, reason, (n, features) in zip(batch.ids[0].tolist(), reasons, strongest, strict=True)
    ]  # fmt: skip
    return {"tokens": tokens, "note": batch.note, "strongest": N_STRONGEST}


def _estimated(batch: TokenBatch, x: Float[Tensor, "1 pos d"]) -> TokenPolicy:
    """The rule with the sink limit of this prompt; a prompt without an ordinary token has no limit."""
    policy = TokenPolicy(special_ids=() if batch.tokenizer is None else special_ids(batch.tokenizer))
    ids: Int[Tensor, "1 pos"] = batch.ids.to(x.device)
    return TokenPolicy.estimate(x, ids, policy.special_ids) if bool(policy.ordinary(ids).any()) else policy


def _strongest(basis: Basis, x: Float[Tensor, "pos d"]) -> list[tuple[int, list[tuple[int, float]]]]:
    """At each token the number of active features, and the strongest with their activations, strongest first."""
    found = []
    for part in x.split(max(1, _MAX_ACTIVATIONS // basis.d_sae)):
        acts = basis.encode(part)
        top = acts.topk(min(N_STRONGEST, basis.d_sae), dim=1)
        for n, ids, values in zip((acts > 0).sum(1).tolist(), top.indices.tolist(), top.values.tolist(), strict=True):
            pairs = zip(ids, values, strict=True)
            found.append((n, [(feature, rounded(value)) for feature, value in pairs if value > 0]))
    return found
