"""Is a corpus what the model would write? First tokens against the model's own distribution, and repetition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted, number, setting
from workbench.core.stats import Estimate
from workbench.core.tokenizer import special_ids, start_ids
from workbench.models.model import Model
from workbench.report.base import Headline, Metric, Report, Says, Section, Table, beside

CENTRAL = 1 - 0.05 / 3
"""Share of the draws in a null's range: three ranges decide together, with 95 % for the model's own text."""
LABELS = {
    "kl_model_data": "KL(model, corpus)",
    "kl_data_model": "KL(corpus, model)",
    "mean_kl": "mean of the two",
    "cross_entropy": "cross-entropy of the corpus under the model",
    "unique_first": "different first tokens",
}


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """How a corpus is checked.

    Attributes:
        pseudo_count: added to the counts of first tokens, in total, spread evenly: without it KL(model, corpus) is
            infinite for every finite corpus. The null is smoothed alike.
        draws: corpora that are drawn from the model's distribution for the null.
        ngrams: lengths of the n-grams whose repetition is counted.
        shown: first tokens that are listed.
        seed: of the null.
    """

    pseudo_count: float = 1.0
    draws: int = 500
    ngrams: tuple[int, ...] = (4, 8, 16)
    shown: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pseudo_count <= 0 or self.draws < 100 or not self.ngrams or min(self.ngrams) < 1 or self.shown < 1:
            raise InvalidInputError(f"{self}: needs a positive pseudo_count, 100 draws, n-grams of at least 1 token.")


@dataclass(frozen=True)
class NGrams:
    """Repetition of n-grams within rows.

    Attributes:
        repeated: share of the n-grams of the corpus that had occurred before, in any row.
        looping_rows: share of the rows that hold one n-gram at least twice.
    """

    n: int
    repeated: float
    looping_rows: float


@dataclass(frozen=True, kw_only=True)
class CorpusReport(Report):
    """A corpus beside what the model itself would write.

    Attributes:
        found: by measure, see `LABELS`; nats, and a count for "unique_first".
        null: the same for as many first tokens drawn from the model: median and central range of the draws. Even the
            model's own text does not reach a divergence of 0.
        entropy: of the model's next token after its start token, in nats.
        unique_sequences: rows that differ from all rows before them, over all rows.
        top: most frequent first tokens: text, share in the corpus, probability under the model.
    """

    n_sequences: int
    n_tokens: int
    found: dict[str, float]
    null: dict[str, Estimate]
    entropy: float
    unique_sequences: float
    ngrams: tuple[NGrams, ...]
    top: tuple[tuple[str, float, float], ...]
    options: CorpusOptions

    @property
    def like_the_model(self) -> bool:
        """Whether both divergences and the number of different first tokens are within the null."""
        keys = ("kl_model_data", "kl_data_model", "unique_first")
        return all(self.null[key].low <= self.found[key] <= self.null[key].high for key in keys)

    def findings(self) -> tuple[str, ...]:
        """Whether first tokens are as the model draws them, and how much the corpus repeats itself."""
        kl, null = self.found["mean_kl"], self.null["mean_kl"]
        said = "as drawn from the model" if self.like_the_model else "not as drawn from the model"
        again = "".join(
            f" A share of {number(part.repeated)} of the {part.n}-grams had occurred before, and "
            f"{number(part.looping_rows)} of the rows repeat one."
            for part in self.ngrams[-1:]
        )
        firsts = self.null["unique_first"]
        return (
            f"The first tokens of {self.n_sequences} sequences are {said}: mean KL {number(kl)} nats, and "
            f"{' '.join(null.shown())} for as many draws from the model itself; "
            f"{round(self.found['unique_first'])} different ones ({number(firsts.low)} to {number(firsts.high)} "
            "in those "
            "draws).",
            f"A share of {number(self.unique_sequences)} of the rows is unique.{again}",
        )

    def headline(self) -> Headline:
        """Divergence of the first tokens beside the largest that draws from the model have."""
        return Headline.of(
            Says(
                "The first tokens of the text diverge from the model no more than draws from it do.", "",
                "The first tokens of the text diverge from the model more than draws from it do.",
            ),
            self._beside(),
            "at most",
        )  # fmt: skip

    def _beside(self) -> Table:
        limit = ("draws from the model, at most", self.null["mean_kl"].high)
        return beside("mean KL of the first tokens (nats)", ("this text", self.found["mean_kl"]), limit)

    def section(self) -> Section:
        """Divergences with their null, first tokens, repetition."""
        divergences = Table(
            ("measure", "corpus", "drawn from the model (null)"),
            tuple((label, self.found[key], self.null[key]) for key, label in LABELS.items()),
            f"First tokens. In nats; entropy of the model's next token {number(self.entropy)}. Pseudo-count "
            f"{setting(self.options.pseudo_count)} in all; null: median and central {setting(CENTRAL)} of "
            f"{counted(self.options.draws, 'draws')} of {counted(self.n_sequences, 'tokens')}.",
        )
        first = Table(("first token", "share in the corpus", "probability under the model"), self.top)
        repetition = Table(
            ("n", "n-grams that had occurred before", "rows that repeat one"),
            tuple((part.n, part.repeated, part.looping_rows) for part in self.ngrams),
            f"{self.n_tokens} tokens.",
        )
        metrics: dict[str, Metric] = {
            **self.found,
            **{f"null_{key}": value for key, value in self.null.items()},
            "unique_sequences": self.unique_sequences,
            **{f"repeated_{part.n}grams": part.repeated for part in self.ngrams},
        }
        blocks = (divergences, first, repetition, self._beside())
        return Section("Corpus", blocks, self.findings(), metrics, self.headline())


@checked
def check_corpus(
    model: Model,
    rows: Int[Tensor, "rows context"],
    first: Int[Tensor, " sequences"] | None = None,
    *,
    options: CorpusOptions | None = None,
) -> CorpusReport:
    """First tokens of a corpus against the model's own distribution, and how much the corpus repeats itself.

    `rows` are packed rows of tokens, such as `store.token_rows("all")`, held in memory with 8 bytes per token and
    n-gram. Without `first`, texts start behind start and end tokens, see `first_tokens`.

    Raises:
        DegenerateInputError: if there is no first token.

    Source: the checks of FaithfulSAE (arXiv 2506.17673). Their mean of both divergences is called that here, and the
    sampling noise, which they do not give, stands beside it.
    """
    options = options or CorpusOptions()
    first = first_tokens(model, rows) if first is None else first
    if not len(first):
        raise DegenerateInputError(
            f"check_corpus: no text starts in {len(rows)} rows (no token follows a start or end token). Give first=."
        )
    p = start_distribution(model).numpy()
    counts = torch.bincount(first.cpu(), minlength=len(p)).numpy()
    random = np.random.default_rng(options.seed)
    draws = [_measures(random.multinomial(len(first), p), p, options) for _ in range(options.draws)]
    best = np.argsort(-counts, kind="stable")[: min(options.shown, int((counts > 0).sum()))]
    return CorpusReport(
        n_sequences=len(first), n_tokens=rows.numel(),
        found=_measures(counts, p, options),
        null={key: _central([draw[key] for draw in draws]) for key in LABELS},
        entropy=float(-(p[p > 0] * np.log(p[p > 0])).sum()),
        unique_sequences=len(np.unique(rows.cpu().numpy(), axis=0)) / len(rows),
        ngrams=tuple(repeated_ngrams(rows, n) for n in options.ngrams if n < rows.shape[1]),
        top=tuple((model.tokenizer.decode([i]), int(counts[i]) / len(first), float(p[i])) for i in best.tolist()),
        options=options,
    )  # fmt: skip


def start_distribution(model: Model) -> Float[Tensor, " d_vocab"]:
    """The model's distribution of the first token of a text, in fp64; sums to 1."""
    logits = model.logits(torch.tensor([start_ids(model.tokenizer)]))[0].double().cpu()
    p = logits.softmax(0)
    return p / p.sum()


def first_tokens(model: Model, rows: Int[Tensor, "rows context"]) -> Int[Tensor, " sequences"]:
    """The first token of the corpus, and every token that follows a special token; special tokens themselves not.

    In the model's own text a text that has ended is followed by another one without a new start token. Only what
    follows the start tokens at the beginning of a row is drawn from the start distribution, so if all rows begin with
    them, these are taken alone.
    """
    start = torch.tensor(start_ids(model.tokenizer))
    if rows.shape[1] > len(start) and bool((rows[:, : len(start)] == start).all()):
        return rows[:, len(start)]
    special = torch.isin(rows, torch.tensor(special_ids(model.tokenizer)))
    flat, before = rows.flatten(), torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), special[:, :-1]], dim=1)
    before[1:, 0] = False
    return flat[(before & ~special).flatten()]


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p, q) in nats; tokens without mass under p count nothing.

    >>> round(divergence(np.array([0.5, 0.5]), np.array([0.25, 0.75])), 4)  # 0.5 ln 2 + 0.5 ln (2 / 3)
    0.1438
    """
    used = p > 0
    return float((p[used] * (np.log(p[used]) - np.log(q[used]))).sum())


def _measures(counts: np.ndarray, p: np.ndarray, options: CorpusOptions) -> dict[str, float]:
    n = counts.sum()
    plain = counts / n
    smooth = (counts + options.pseudo_count / len(p)) / (n + options.pseudo_count)
    there = plain > 0
    model_data, data_model = divergence(p, smooth), divergence(plain, np.maximum(p, 1e-300))
    return {
        "kl_model_data": model_data,
        "kl_data_model": data_model,
        "mean_kl": (model_data + data_model) / 2,
        "cross_entropy": float(-(plain[there] * np.log(np.maximum(p[there], 1e-300))).sum()),
        "unique_first": float(there.sum()),
    }


def _central(values: list[float]) -> Estimate:
    low, middle, high = np.quantile(values, [(1 - CENTRAL) / 2, 0.5, (1 + CENTRAL) / 2])
    method = "simulation from the model"
    return Estimate(float(middle), float(low), float(high), len(values), method, "draws", CENTRAL)


def repeated_ngrams(rows: Int[Tensor, "rows context"], n: int) -> NGrams:
    """How much n-grams repeat; they do not reach across rows. Compared by a 64-bit hash.

    >>> repeated_ngrams(torch.tensor([[1, 2, 1, 2], [3, 1, 2, 4]]), 2)  # 1 2 comes 3 times among 6
    NGrams(n=2, repeated=0.3333333333333333, looping_rows=0.5)
    """
    if not 1 <= n <= rows.shape[1]:
        raise InvalidInputError(f"repeated_ngrams(n={n}): rows hold {rows.shape[1]} tokens; choose 1 <= n <= that.")
    factors = np.random.default_rng(0).integers(1, 2**63, size=n, dtype=np.uint64) | np.uint64(1)
    ids = rows.cpu().numpy().astype(np.uint64)
    width = ids.shape[1] - n + 1
    hashes = np.zeros((len(ids), width), dtype=np.uint64)
    for i in range(n):
        # Mixed before it is added: products alone would let sums of small ids collide.
        hashes += _mixed(ids[:, i : i + width] * factors[i] + factors[i])
    repeated = (hashes.size - len(np.unique(hashes))) / hashes.size
    ordered = np.sort(hashes, axis=1)
    looping = (ordered[:, 1:] == ordered[:, :-1]).any(1).mean()
    return NGrams(n, float(repeated), float(looping))


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return x ^ (x >> np.uint64(29))
