"""What a head's weights alone say: whether it copies the token that it attends to, or names its successor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.kinds.heads import heads
from workbench.core.arguments import checked
from workbench.core.precision import precise
from workbench.hooks.ends import embedding, unembedding
from workbench.hooks.sites import Site
from workbench.interventions.scopes import Last
from workbench.models.frozennorm import FrozenNorm, columns_of, norm_before
from workbench.models.model import Model

TOP = 5
"""A token counts as copied if its own logit is among so many largest of the sampled tokens."""
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "digits": tuple("0123456789"),
    "numbers": (
        "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    ),
    "weekdays": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "months": (
        "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
        "December",
    ),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}  # fmt: skip
"""Words in their order."""
_SMALLEST_FAMILY = 4


@dataclass(frozen=True, eq=False)
class Circuit:
    """The maps of one layer from a vector of the stream to what each head writes, without the norms' scales.

    Attributes:
        reads: from the stream behind the norm before attention to the value of each key-value head.
        writes: from the value of each head to the stream.
        norm: before attention; the identity where there is none.
    """

    reads: Float[Tensor, "kv_heads d_model d_head"]
    writes: Float[Tensor, "heads d_head d_model"]
    norm: FrozenNorm

    def kv(self, head: int) -> int:
        """The key-value head that a head uses."""
        return head // (len(self.writes) // len(self.reads))

    def value(self, head: int, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_head"]:
        """The value of some vectors of the stream, with scale 1 and without biases."""
        return (self.norm.centred(x) * self.norm.gain) @ self.reads[self.kv(head)]


@dataclass(frozen=True, eq=False)
class Ends:
    """Both ends of the model for some tokens.

    Attributes:
        embedded: their embeddings.
        unembedded: their columns of the unembedding, times the gain of the final norm.
    """

    embedded: Float[Tensor, "tokens d_model"]
    unembedded: Float[Tensor, "tokens d_model"]


def ends(model: Model, tokens: Int[Tensor, " tokens"], final: FrozenNorm) -> Ends:
    """Embeddings and folded unembeddings of some tokens."""
    rows = [end(model.hf).weight.detach()[tokens.to(end(model.hf).weight.device)] for end in (embedding, unembedding)]
    embedded, unembedded = (precise(x).to(final.gain) for x in rows)
    return Ends(embedded, final.centred(unembedded * final.gain))


def final_norm(model: Model, like: Float[Tensor, "rows d_model"]) -> FrozenNorm:
    """The final norm as a linear map."""
    return FrozenNorm.of(model.site_map["final_norm"].module, precise(like))


@checked
@torch.no_grad()
def circuit(model: Model, layer: int) -> Circuit:
    """The value and output maps of a layer's heads.

    Raises:
        MismatchError: if the layer has no plain value projection, or a norm of another kind before it.
    """
    written, point = heads(model, Site("z", layer)), model.site_map[Site("v", layer)]
    weight, _ = columns_of(point, "head_scores")
    reads = weight.unflatten(1, (point.heads or 1, -1)).transpose(0, 1)
    writes = (written.weight * written.gain).unflatten(0, (written.d_sae, -1))
    return Circuit(reads, writes.to(reads), norm_before(model, point, Site("resid_pre", layer), "head_scores"))


def middle(model: Model, final: FrozenNorm, step: int = 8192) -> Float[Tensor, "d_model d_model"]:
    """Sum over the vocabulary of the outer products of folded unembedding and embedding, a part at a time."""
    total = torch.zeros_like(final.gain).expand(len(final.gain), -1).clone()
    for part in torch.arange(min(model.d_vocab, len(embedding(model.hf).weight))).split(step):
        both = ends(model, part, final)
        total += both.unembedded.T @ both.embedded
    return total


def copying(
    layer: Circuit, head: int, between: Float[Tensor, "d_model d_model"], turn: Float[Tensor, "d d"] | None = None
) -> float:
    """`sum Re l / sum |l|` over the eigenvalues of the head's map from tokens to tokens; 1 copies, -1 suppresses.

    The map is V x V and has rank d_head; its eigenvalues other than 0 are those of a d_head x d_head matrix.

    Args:
        layer: of the head.
        head: the head.
        between: see `middle`.
        turn: an orthogonal matrix by which its output is rotated, for the null.
    """
    writes = layer.writes[head] if turn is None else turn @ layer.writes[head]
    normed = layer.norm.centred(torch.eye(len(between)).to(between)) * layer.norm.gain
    found = torch.linalg.eigvals(writes @ between @ normed @ layer.reads[layer.kv(head)])
    return float(found.real.sum() / found.abs().sum().clamp_min(1e-30))


def copied(layer: Circuit, head: int, both: Ends, turn: Float[Tensor, "d d"] | None = None) -> int:
    """How many tokens have their own logit among the `TOP` largest of all the tokens here."""
    writes = layer.writes[head] if turn is None else turn @ layer.writes[head]
    logits = layer.value(head, both.embedded) @ (writes @ both.unembedded.T)
    return int(((logits > logits.diagonal()[:, None]).sum(1) < TOP).sum())


def succeeded(
    layer: Circuit, head: int, families: Sequence[tuple[Tensor, Ends]], turn: Float[Tensor, "d d"] | None = None
) -> int:
    """How many words name their successor first among the words of their family."""
    writes = layer.writes[head] if turn is None else turn @ layer.writes[head]
    right = 0
    for x, both in families:
        logits = layer.value(head, x) @ (writes @ both.unembedded.T)
        right += int((logits[:-1].argmax(1).cpu() == torch.arange(1, len(x))).sum())
    return right


def families(model: Model, final: FrozenNorm) -> Iterator[tuple[Tensor, Ends]]:
    """For each family of words that are single tokens here: the stream behind block 0 at each, and their ends."""
    for words in FAMILIES.values():
        ids = [i for i in (_single(model, word) for word in words) if i is not None]
        if len(ids) >= _SMALLEST_FAMILY:
            tokens = torch.tensor(ids, device=model.device)
            x = model.capture(tokens[:, None], ["resid_post.0"], positions=Last())["resid_post.0"]
            yield precise(x).to(final.gain), ends(model, tokens, final)


def _single(model: Model, word: str) -> int | None:
    """The one token of a word, with a space in front where that is one token."""
    if not model.tokenizer:
        return None
    for text in (f" {word}", word):
        ids = model.tokens(text, bos=False).rows()[0].tolist()
        if len(ids) == 1:
            return int(ids[0])
    return None


def turns(n: int, d_head: int, like: Tensor, seed: int) -> list[Tensor]:
    """Random orthogonal matrices."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(d_head, d_head, generator=generator, dtype=torch.float64) for _ in range(n))
    return [torch.linalg.qr(x).Q.to(like) for x in drawn]


Score = Callable[[Tensor | None], float]


def beside_null(score: Score, rotations: Sequence[Tensor]) -> tuple[float, float]:
    """A score of a head, and its mean over rotations of what the head writes."""
    return float(score(None)), sum(score(turn) for turn in rotations) / len(rotations)
