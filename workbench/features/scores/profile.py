"""Output scores of the same directions at every layer: the depths at which they write their own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.controls.directions import random_directions
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.core.html import Shown
from workbench.core.progress import track
from workbench.features.scores.last_token import LastToken, fp32_copy
from workbench.features.scores.logit_lens import lens_tokens, slab_rows
from workbench.features.scores.output_score import rank_score
from workbench.hooks.sites import Site
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class DepthScores(Shown):
    """Output scores of directions by layer.

    Attributes:
        layers: after which blocks the directions were added.
        score: `(1 - r/|V|) p(t*)` of the steered model.
        random: the same for random directions, each with its own 20 lens tokens.
    """

    layers: tuple[int, ...]
    score: Float[Tensor, "layers directions"]
    random: Float[Tensor, "layers controls"]

    def frame(self) -> pd.DataFrame:
        """One row per layer: means over the directions and over the random ones."""
        import pandas as pd

        means = {name: getattr(self, name).float().mean(1).cpu().numpy() for name in ("score", "random")}
        return pd.DataFrame({"layer": self.layers, **means})


@checked
@torch.no_grad()
def depth_scores(
    model: Model,
    directions: Float[Tensor, "directions d_model"],
    *,
    share: float = 1.0,
    layers: Sequence[int] | None = None,
    prompt: str = "From my experience,",
    n_random: int = 128,
    seed: int = 0,
) -> DepthScores:
    """Output scores of the same directions after every block, for directions that belong to no SAE.

    `output_scores` takes the size of an edit from an SAE's activations, which exist only where an SAE does. Here the
    edit is `share` times the norm of the last token's residual stream at each layer, whatever the directions' norms.

    Args:
        model: the model.
        directions: any; only where they point counts.
        share: size of the edit relative to the residual stream.
        layers: after which blocks; all by default.
        prompt: neutral text whose last token is steered.
        n_random: random directions scored as control.
        seed: of these.

    Raises:
        ShapeError: if the directions have another width than the model.
        InvalidInputError: if `share` is not positive, or a layer does not exist.
        DegenerateInputError: for a direction that is zero or not finite.
    """
    if directions.shape[1] != model.d_model:
        raise ShapeError(
            f"depth_scores: directions of shape {tuple(directions.shape)}; {model.name} has width {model.d_model}."
        )
    if not share > 0:
        raise InvalidInputError(f"depth_scores(share={share}): the edit needs a size. Give a positive share.")
    sites = [model.resolve(Site("resid_post", layer)) for layer in (layers or range(model.n_layers))]
    noise = random_directions(torch.ones(model.d_model), n_random, seed=seed)
    both = torch.cat([directions.detach().float().cpu(), noise]).to(model.device)
    scored = fp32_copy(model)
    lens = lens_tokens(scored, both).ids
    unit = both / both.norm(dim=1, keepdim=True)
    ids = scored.tokens(prompt).ids
    scores = []
    for site in track(sites, description="depth", unit="layers"):
        run = LastToken(scored, ids, site, min(256, len(both)))
        hidden = run.hidden(share * run.x.norm() * unit)
        parts = torch.arange(len(both)).split(slab_rows(model.d_vocab))
        scores.append(torch.cat([rank_score(run.head.all(hidden[part]), lens[part])[0] for part in parts]).cpu())
    score, random = torch.stack(scores).split([len(directions), n_random], dim=1)
    return DepthScores(tuple(int(site.layer or 0) for site in sites), score, random)
