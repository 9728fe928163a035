"""The bases that a SHIFT study reads along with the SAEs: neurons at the same sites, and the embeddings of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.decomposition import neurons
from workbench.bases.base import Basis, FeatureRows
from workbench.core.precision import precise
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model

EMBED = "embed"
ROUNDING = 1e-3
"""Share of a token's norm by which it may differ from the embedding that it is taken for."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenEmbeddings(Basis):
    """Every token that occurs in some texts is a feature of the embedding: 1 where it stands, 0 elsewhere.

    A row leads from the mean embedding to that of the token, so a token that is ablated gets the mean embedding.

    Attributes:
        table: embedding of each token.
    """

    table: Float[Tensor, "d_sae d_in"]

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """1 for the token whose embedding each row is; all 0 for a token that did not occur."""
        x = precise(x)
        table = self.table.to(x)
        nearest = (x @ table.T - 0.5 * table.square().sum(1)).argmax(dim=1)
        is_same = (x - table[nearest]).norm(dim=1) <= ROUNDING * table[nearest].norm(dim=1)
        return torch.nn.functional.one_hot(nearest, self.d_sae).to(x) * is_same[:, None]

    def rows(self, features: FeatureRows | None = None) -> Float[Tensor, "*f d_out"]:
        """What a token's embedding has beyond the mean."""
        rows = self.table - self.bias
        return rows if features is None else rows[torch.as_tensor(features)]

    @property
    def bias(self) -> Float[Tensor, " d_out"]:
        """The mean embedding of the tokens."""
        return self.table.mean(dim=0)


def token_embeddings(model: Model, texts: Sequence[str], batch_size: int = 32) -> TokenEmbeddings:
    """The basis of the tokens that occur in these texts."""
    ids: set[int] = set()
    for start in range(0, len(texts), batch_size):
        batch = model.tokens(list(texts[start : start + batch_size]))
        ids |= set(batch.ids[batch.mask].tolist())
    table = model.capture(TokenBatch.of_rows(torch.tensor([sorted(ids)])), [EMBED]).flat(EMBED)[0].float().cpu()
    return TokenEmbeddings(
        name="token embeddings", architecture="tokens", d_in=table.shape[1], d_sae=len(table), d_out=table.shape[1],
        site=EMBED, site_out=EMBED, table=table,
    )  # fmt: skip


def read_along(
    needs: set[str], model: Model, bases: Mapping[str, Basis], texts: Sequence[str]
) -> dict[str, Mapping[str, Basis]]:
    """The bases that methods need besides the SAEs, by the name of the need."""
    made: dict[str, Mapping[str, Basis]] = {}
    if "neurons" in needs:
        made["neurons"] = neurons(model, list(bases))
    if "tokens" in needs:
        made["tokens"] = {EMBED: token_embeddings(model, texts)}
    return made
