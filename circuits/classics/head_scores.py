"""What each attention head does: its pattern on random text that repeats itself, and what its weights copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.classics.head_weights import (
    Circuit,
    Ends,
    beside_null,
    circuit,
    copied,
    copying,
    ends,
    families,
    final_norm,
    middle,
    succeeded,
    turns,
)
from circuits.classics.tables import TableReport
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, UnknownSiteError
from workbench.core.numbers import number
from workbench.core.precision import precise
from workbench.core.progress import track
from workbench.core.stats import ANY, POSITIVE, SHARE, Estimate, sample_mean, wilson
from workbench.core.tokenizer import special_ids, start_ids
from workbench.engine.keeper import Keeper
from workbench.hooks.sites import Site
from workbench.interventions.scopes import Last
from workbench.models.model import Model
from workbench.report.base import Grid, Headline, Heat, Metric, Says, Section, Table, beside
from workbench.report.blocks import MOST_CELLS

if TYPE_CHECKING:
    import pandas as pd

PATTERN_SCORES = ("previous", "duplicate", "induction", "bos", "self", "entropy")
WEIGHT_SCORES = ("copying", "copied tokens", "successor")
_DRAWN = ("induction", "previous", "duplicate", "copying", "successor", "copied tokens", "bos", "self", "entropy")
_FEWEST = 4
_ROTATIONS, _FEW_ROTATIONS = 8, 2
"""For the null; few where each takes a product of all sampled tokens with all."""
_ROWS_IN_REPORT = 60


@dataclass(frozen=True, kw_only=True)
class HeadScore(OneLine):
    """One score of one head.

    Attributes:
        kv_head: the head of keys and values that it shares.
        score: name of the score.
        value: an interval over sequences or tokens; of "copying", which is read from weights, of no width.
        null: the same for text without repetition, for uniform attention, or with the head's output rotated.
        null_kind: which of the three.
    """

    layer: int
    head: int
    kv_head: int
    score: str
    value: Estimate
    null: float
    null_kind: str


@checked
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HeadScores(TableReport):
    """Scores of all heads.

    Attributes:
        scores: layer by layer, head by head.
        repeated: tokens of the part that is repeated.
        note: what was left out, in words.
    """

    scores: tuple[HeadScore, ...]
    repeated: int
    note: str = ""

    def frame(self) -> pd.DataFrame:
        """One row per layer, head and score: value with its 95 % interval, and the null."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "layer": s.layer, "head": s.head, "kv_head": s.kv_head, "score": s.score, "value": s.value.value,
                    "ci_low": s.value.low, "ci_high": s.value.high, "null": s.null, "null_kind": s.null_kind,
                    "n": s.value.n,
                }
                for s in self.scores
            ]
        )  # fmt: skip

    def strongest(self, score: str) -> HeadScore:
        """The head with the largest value of a score.

        Raises:
            InvalidInputError: if the score was not measured.
        """
        measured = [s for s in self.scores if s.score == score]
        if not measured:
            raise InvalidInputError(
                f"strongest({score!r}): measured were {', '.join(dict.fromkeys(s.score for s in self.scores))}."
            )
        return max(measured, key=lambda s: s.value.value)

    def headline(self) -> Headline:
        """The strongest induction head beside text without repetition."""
        says = Says(
            "There is an induction head: on repeated text it attends to what followed last time.",
            "No head attends to what followed last time more than on text without repetition.",
            "The strongest head attends less to what followed last time than on text without repetition.",
        )
        return Headline.of(says, self._beside())

    def _beside(self) -> Table:
        best = self.strongest("induction")
        return beside("attention", (f"induction, {_name(best)}", best.value), ("text without repetition", best.null))

    def findings(self) -> tuple[str, ...]:
        """The strongest head of each score."""
        found = []
        for score in dict.fromkeys(s.score for s in self.scores):
            best = self.strongest(score)
            found.append(f"Largest {score}: {_name(best)} with {best.value}; {best.null_kind}: {number(best.null)}.")
        return (*found, *([self.note] if self.note else []))

    def section(self) -> Section:
        """Layers by heads, a heat map per score, and the strongest heads."""
        names = dict.fromkeys(s.score for s in self.scores)
        most = max(3, _ROWS_IN_REPORT // len(names))
        rows = tuple(
            (f"{score}: {_name(s)}", s.value, s.null, s.null_kind)
            for score in names
            for s in sorted((s for s in self.scores if s.score == score), key=lambda s: -s.value.value)[:most]
        )
        table = Table(("head", "value", "null", "null is"), rows, "Strongest heads. Attention on a random text of "
                      f"{self.repeated} tokens and its repetition; what weights copy; entropy in nats.")  # fmt: skip
        picture = self._picture(sorted(names, key=_DRAWN.index))
        metrics: dict[str, Metric] = {f"largest {score}": self.strongest(score).value for score in names}
        return Section("Attention heads", (picture, self._beside(), table), self.findings(), metrics, self.headline())

    def _picture(self, names: Sequence[str]) -> Heat:
        """As many heat maps as can be drawn whole."""
        n_heads = len({(s.layer, s.head) for s in self.scores})
        drawn = names[: max(1, MOST_CELLS // n_heads)]
        caption = "Layers by heads, the last layer on top; each map is scaled by its own largest value."
        left_out = f" Not drawn: {', '.join(names[len(drawn) :])}." if len(drawn) < len(names) else ""
        return Heat("Scores of heads", tuple(map(self._grid, drawn)), caption + left_out)

    def _grid(self, score: str) -> Grid:
        found = {(s.layer, s.head): s.value.value for s in self.scores if s.score == score}
        layers, heads = (sorted({key[i] for key in found}) for i in (0, 1))
        largest = max(map(abs, found.values())) or 1.0
        values = tuple(tuple(found[layer, head] / largest for head in heads) for layer in reversed(layers))
        name = f"{score} (full colour: {number(largest)})"
        return Grid(name, tuple(map(str, reversed(layers))), tuple(f"h{head}" for head in heads), values)


def _name(score: HeadScore) -> str:
    return f"{score.layer}.h{score.head}"


def pattern_scores(pattern: Float[Tensor, "heads q_pos k_pos"], repeated: int) -> dict[str, Float[Tensor, " heads"]]:
    """The scores of patterns on one prefix token and two copies of a text of `repeated` tokens.

    previous: mean attention to the token before, from the second text token on. duplicate: from the second copy to the
    same token in the first. induction: to the token that followed it there, `q - N + 1`. bos: to the first token. self:
    to the token itself. entropy: of the attention of each token behind the first, in nats.
    """
    q = torch.arange(pattern.shape[-1], device=pattern.device)
    text, second = q[1:], q[1 + repeated : 1 + 2 * repeated]
    p = pattern[:, text].clamp_min(1e-30)
    return {
        "previous": pattern[:, q[2:], q[2:] - 1].mean(1), "duplicate": pattern[:, second, second - repeated].mean(1),
        "induction": pattern[:, second, second - repeated + 1].mean(1), "bos": pattern[:, text, 0].mean(1),
        "self": pattern[:, text, text].mean(1), "entropy": -(p * p.log()).sum(-1).mean(1),
    }  # fmt: skip


@checked
@torch.no_grad()
def head_scores(
    model: Model,
    *,
    repeated: int = 50,
    sequences: int = 8,
    weights: bool = True,
    tokens: int = 2000,
    seed: int = 0,
    keep: Keeper | None = None,
) -> HeadScores:
    """What each head attends to on repeated random text, and what its value-output map copies.

    Patterns are read on a prefix token and two copies of `repeated` random ordinary tokens. Null of duplicate and
    induction: the same places in a text whose second half is new; of the others: uniform attention. From weights:
    "copying", `sum Re l / sum |l|` over the eigenvalues of the map from tokens to tokens; "copied tokens", the share of
    sampled tokens whose own logit is among the five largest of the sample; "successor", the share of days, months,
    numbers and letters that name the next one first. Their null: what the head writes, rotated at random.

    Args:
        model: the model.
        repeated: tokens of the text; fewer where the model takes no longer row.
        sequences: random texts.
        weights: whether to read the weights too.
        tokens: how many tokens are sampled for "copied tokens".
        seed: of texts, samples and rotations.
        keep: of finished layers, which a stopped call continues; its key must hold all arguments.

    Raises:
        DegenerateInputError: if the model takes rows of fewer than 9 tokens.
        UnknownSiteError: if its patterns can't be read.

    Source: Olsson et al. 2022 (arXiv 2209.11895), Elhage et al. 2021, Gould et al. 2023 (arXiv 2312.09230).
    """
    if repeated < _FEWEST or sequences < 1 or tokens < 1:
        raise InvalidInputError(
            f"head_scores(repeated={repeated}, sequences={sequences}, tokens={tokens}): at least {_FEWEST}, 1 and 1."
        )
    room = model.max_tokens
    repeated = repeated if room is None else min(repeated, (room - 1) // 2)
    ordinary = _ordinary(model, 2 * repeated, seed)
    if repeated < _FEWEST:
        raise DegenerateInputError(f"head_scores: {model.name} takes rows of {room} tokens; at least 9 are needed.")
    scores, note = list(_of_patterns(model, ordinary, repeated, sequences, seed)), ""
    if weights:
        try:
            drawn = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(seed))[:tokens]
            scores += _of_weights(model, ordinary[drawn], seed, keep)
        except (MismatchError, UnknownSiteError) as error:
            note = f"Scores from weights are left out. {error}"
    order = {name: i for i, name in enumerate((*PATTERN_SCORES, *WEIGHT_SCORES))}
    scores.sort(key=lambda s: (s.layer, s.head, order[s.score]))
    return HeadScores(scores=tuple(scores), repeated=repeated, note=note)


def _ordinary(model: Model, least: int, seed: int) -> Int[Tensor, " tokens"]:
    """Ids that are not special, in random order."""
    ids = torch.arange(model.d_vocab)
    if model.tokenizer:
        ids = ids[~torch.isin(ids, torch.tensor(special_ids(model.tokenizer), dtype=torch.long))]
    if len(ids) < least:
        raise DegenerateInputError(f"head_scores: {len(ids)} ordinary tokens; {least} different ones are needed.")
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]


def _texts(model: Model, ordinary: Tensor, repeated: int, sequences: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A prefix and a text with its repetition, and the same with a new second half: `(1, 1 + 2 * repeated)` ids."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.tensor(list(start_ids(model.tokenizer))[-1:] if model.tokenizer else [0])
    for _ in range(sequences):
        drawn = ordinary[torch.randperm(len(ordinary), generator=generator)[: 2 * repeated]]
        again = torch.cat([first, drawn[:repeated], drawn[:repeated]])
        yield again[None].to(model.device), torch.cat([first, drawn])[None].to(model.device)


def _of_patterns(model: Model, ordinary: Tensor, repeated: int, sequences: int, seed: int) -> Iterator[HeadScore]:
    layers = [site.layer for site in model.site_map.named(["pattern"])]
    real: dict[str, list[Tensor]] = {}
    null: dict[str, list[Tensor]] = {}
    texts = track(
        _texts(model, ordinary, repeated, sequences, seed), total=sequences, description="texts", unit="texts"
    )
    for pair in texts:
        for ids, kept in zip(pair, (real, null), strict=True):
            acts = model.capture(ids, ["pattern"])
            each = [pattern_scores(precise(acts[f"pattern.{layer}"][0]), repeated) for layer in layers]
            for name in each[0]:
                kept.setdefault(name, []).append(torch.stack([scores[name].cpu() for scores in each]))
    values = {name: torch.stack(parts) for name, parts in real.items()}  # (sequences, layers, heads)
    uniform = pattern_scores(_uniform(1 + 2 * repeated), repeated)
    kv_heads = {layer: model.site_map[Site("pattern", layer)].heads or 1 for layer in layers if layer is not None}
    for place, layer in enumerate(layers):
        assert layer is not None
        for head in range(values["self"].shape[2]):
            for name, found in values.items():
                repeats = name in ("duplicate", "induction")
                within = POSITIVE if name == "entropy" else SHARE
                yield HeadScore(
                    layer=layer, head=head, kv_head=_kv(model, layer, head, kv_heads[layer]), score=name,
                    value=_estimate(found[:, place, head], within),
                    null=float(torch.stack(null[name])[:, place, head].mean()) if repeats else float(uniform[name][0]),
                    null_kind="text without repetition" if repeats else "uniform attention",
                )  # fmt: skip


def _kv(model: Model, layer: int, head: int, n_heads: int) -> int:
    point = model.site_map.points.get(Site("v", layer))
    return head if point is None else head // max(1, n_heads // (point.heads or n_heads))


def _uniform(n: int) -> Float[Tensor, "1 q_pos k_pos"]:
    """Each token attends equally to itself and all before."""
    pattern = torch.ones(n, n).tril()
    return (pattern / pattern.sum(1, keepdim=True))[None]


def _estimate(values: Tensor, within: tuple[float, float]) -> Estimate:
    # a softmax may add up to a little more than 1
    kept = values.double().clamp(*within)
    return sample_mean(kept.numpy(), unit="sequences", within=within if float(kept.min()) >= 0 else ANY)


def _of_weights(model: Model, sampled: Tensor, seed: int, keep: Keeper | None) -> Iterator[HeadScore]:
    final = final_norm(model, model.capture(sampled[None, :6].to(model.device), ["resid_post.-1"], positions=Last())
                       [f"resid_post.{model.n_layers - 1}"])  # fmt: skip
    between, both = middle(model, final), ends(model, sampled, final)
    words = list(families(model, final))
    layers = [site.layer for site in model.site_map.named(["z"])]
    for layer in track(layers, description="weights", unit="layers"):
        assert layer is not None

        def measure(layer: int = layer) -> list[HeadScore]:
            return list(_of_layer(layer, circuit(model, layer), between, both, words, seed))

        yield from measure() if keep is None else keep.once(f"layer-{layer}", list[HeadScore], measure)


def _of_layer(
    layer: int, maps: Circuit, between: Tensor, both: Ends, words: Sequence[tuple[Tensor, Ends]], seed: int
) -> Iterator[HeadScore]:
    rotations = turns(_ROTATIONS, maps.writes.shape[1], maps.writes, seed)
    n, n_words = len(both.embedded), sum(len(x) - 1 for x, _ in words)

    def row(head: int, score: str, value: Estimate, null: float) -> HeadScore:
        return HeadScore(layer=layer, head=head, kv_head=maps.kv(head), score=score, value=value, null=null,
                         null_kind="output rotated at random")  # fmt: skip

    for head in range(len(maps.writes)):
        value, null = beside_null(partial(copying, maps, head, between), rotations)
        yield row(head, "copying", Estimate(value, value, value, 1, "eigenvalues", "heads"), null)
        count, by_chance = beside_null(partial(copied, maps, head, both), rotations[:_FEW_ROTATIONS])
        yield row(head, "copied tokens", wilson(int(count), n, unit="tokens"), by_chance / n)
        if words:
            count, by_chance = beside_null(partial(succeeded, maps, head, words), rotations)
            yield row(head, "successor", wilson(int(count), n_words, unit="words"), by_chance / n_words)
