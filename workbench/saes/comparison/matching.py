"""Do two SAEs have the same features? By what they do on the same tokens, and by their directions beside a null."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.bases.base import Basis
from workbench.bases.sae import SAELike, as_basis
from workbench.controls.overlap import RESAMPLES
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.numbers import number
from workbench.core.similarity import Assignment, SparseMatrix, assign_candidates, entries
from workbench.core.stats import SIGNED_SHARE, Estimate, sample_mean, wilson
from workbench.report.base import Headline, Metric, Report, Says, Section, Table
from workbench.saes.comparison.shared import SHARED_COSINE


@runtime_checkable
class Encoder(Protocol):
    """Anything whose features can be matched by activations."""

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations."""
        ...


MIN_FIRED = 10
"""Tokens on which a feature must fire before its correlation counts: two that fire once together correlate fully."""
CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Agreement:
    """How two sets of features fire on the same tokens; pairs that never fire together are not stored.

    Attributes:
        n_tokens: tokens that were compared.
        fired_a: tokens on which each feature of A fired.
        fired_b: tokens on which each feature of B fired.
        correlation: scipy sparse matrix: Pearson correlation of the activations, zeros included.
        jaccard: scipy sparse matrix: tokens on which both fire over tokens on which one fires.
    """

    n_tokens: int
    fired_a: Int[Tensor, " n"]
    fired_b: Int[Tensor, " m"]
    correlation: SparseMatrix
    jaccard: SparseMatrix

    def best(self) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """Largest correlation of each feature of A with one of B, and which; 0 if none fires together with it."""
        values = np.asarray(self.correlation.max(axis=1).todense()).ravel()
        return torch.from_numpy(values).float(), torch.from_numpy(np.asarray(self.correlation.argmax(axis=1)).ravel())

    def assignment(self) -> Assignment:
        """One-to-one matching of the largest sum of correlations; negative ones count as 0."""
        return assign_candidates(self.correlation, 0.0)


class CoActivation:
    """Streaming sums from which `Agreement` is made; memory grows with the pairs that fire together, not with tokens.

    >>> sums = CoActivation(1, 2)
    >>> sums.add(torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    >>> sums.result().jaccard.toarray()
    array([[1., 0.]])
    """

    def __init__(self, n_a: int, n_b: int) -> None:
        from scipy.sparse import csr_array

        self.n_tokens = 0
        self._products: SparseMatrix = csr_array((n_a, n_b))
        self._together: SparseMatrix = csr_array((n_a, n_b))
        self._sides = [np.zeros((3, n_a)), np.zeros((3, n_b))]

    def add(self, a: Float[Tensor, "rows n"], b: Float[Tensor, "rows_b m"]) -> None:
        """Counts the activations of both sides on the same tokens.

        Raises:
            ShapeError: if the rows do not pair up, or a side has another number of features.
        """
        if len(a) != len(b) or (a.shape[1], b.shape[1]) != self._products.shape:
            raise ShapeError(
                f"CoActivation.add: activations {tuple(a.shape)} and {tuple(b.shape)}; give as many tokens on both "
                f"sides and {self._products.shape} features."
            )
        sparse = [_sparse(x) for x in (a, b)]
        fired = [(x != 0).astype(np.float64) for x in sparse]
        self._products = self._products + sparse[0].T @ sparse[1]
        self._together = self._together + fired[0].T @ fired[1]
        for sums, x, f in zip(self._sides, sparse, fired, strict=True):
            sums += np.stack([x.sum(axis=0), (x * x).sum(axis=0), f.sum(axis=0)])
        self.n_tokens += len(a)

    def result(self) -> Agreement:
        """Correlations and overlaps of all pairs that fired together.

        Raises:
            DegenerateInputError: if there were fewer than two tokens.
        """
        if self.n_tokens < 2:
            raise DegenerateInputError(f"CoActivation: {self.n_tokens} tokens have no correlation. Add more.")
        n = self.n_tokens
        means = [sums[0] / n for sums in self._sides]
        stds = [np.sqrt(np.maximum(s[1] / n - m * m, 0)) for s, m in zip(self._sides, means, strict=True)]
        products, together = self._products.tocoo(), self._together.tocoo()
        i, j = products.coords
        spread = stds[0][i] * stds[1][j]
        covariance = products.data / n - means[0][i] * means[1][j]
        correlation = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0)
        p, q = together.coords
        either = self._sides[0][2][p] + self._sides[1][2][q] - together.data
        counts = [torch.from_numpy(s[2]).long() for s in self._sides]
        return Agreement(n, counts[0], counts[1], _like(products, correlation), _like(together, together.data / either))


def _sparse(acts: Tensor) -> SparseMatrix:
    from scipy.sparse import csr_array

    return csr_array(acts.detach().cpu().double().numpy())


def _like(pattern: SparseMatrix, values: np.ndarray) -> SparseMatrix:
    from scipy.sparse import coo_array

    return coo_array((values, pattern.coords), shape=pattern.shape).tocsr()


@dataclass(frozen=True, kw_only=True)
class ActivationMatch(Report):
    """How many features of A are in B, by their activations on the same tokens.

    Attributes:
        alive: features of A that fired on at least `min_fired` of them; the others are not counted.
        correlation: mean over the alive features of the largest correlation with a feature of B.
        null: the same after the tokens of B were shuffled: what the firing rates alone give.
        jaccard: mean firing overlap of these pairs.
        shared: share of the alive features whose one-to-one partner correlates above the threshold.
        null_shared: the same after the tokens of B were shuffled.
    """

    n_tokens: int
    alive: int
    d_sae: int
    correlation: Estimate
    null: Estimate
    jaccard: Estimate
    shared: Estimate
    null_shared: Estimate
    threshold: float
    min_fired: int

    @property
    def better(self) -> bool:
        """Whether the mean correlation lies above that of shuffled tokens, intervals apart."""
        return self.correlation.low > self.null.high

    @property
    def verdict(self) -> str:
        """Either "better than null" or "no better than null"."""
        return "better than null" if self.better else "no better than null"

    def findings(self) -> tuple[str, ...]:
        """The mean correlation and the share of matched features, beside shuffled tokens."""
        return (
            f"By activations on the same {self.n_tokens} tokens the best partners correlate by {self.correlation} "
            f"({self.null} after shuffling the tokens: {self.verdict}), and {self.shared} of the features that fired "
            f"at least {self.min_fired} times have a one-to-one partner above {self.threshold} "
            f"(shuffled: {number(self.null_shared.value)}).",
        )

    def headline(self) -> Headline:
        """Mean largest correlation beside shuffled tokens."""
        table, column = self._table(), "largest correlation"
        how = ("more than", "no more than", "less than")
        says = Says(*(f"Features of the two SAEs fire together {word} their rates alone give." for word in how))
        return Headline.read(says, value=(table, "the same", column), control=(table, "shuffled", column))

    def section(self) -> Section:
        """The numbers beside those of shuffled tokens."""
        metrics: dict[str, Metric] = {
            "correlation": self.correlation,
            "jaccard": self.jaccard,
            "shared_by_activation": self.shared,
        }
        title = "Features matched by their activations"
        return Section(title, (self._table(),), self.findings(), metrics, self.headline())

    def _table(self) -> Table:
        return Table(
            ("tokens", "largest correlation", "firing overlap", "one-to-one above threshold"),
            (
                ("the same", self.correlation, self.jaccard, self.shared),
                ("shuffled", self.null, None, self.null_shared),
            ),
            f"{self.alive} of {self.d_sae} features fired on at least {self.min_fired} of {self.n_tokens} tokens; "
            f"threshold {self.threshold}.",
        )


@dataclass(frozen=True, kw_only=True)
class MatchOptions:
    """How features are matched by activations.

    Attributes:
        max_tokens: tokens that are read at most.
        min_fired: tokens on which a feature must fire to be counted.
        threshold: correlation above which a one-to-one pair counts as shared.
        seed: of the shuffled tokens and the bootstrap.
    """

    max_tokens: int = 65_536
    min_fired: int = MIN_FIRED
    threshold: float = SHARED_COSINE
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 2 or self.min_fired < 1:
            raise InvalidInputError(f"{self}: read at least 2 tokens, and count features that fired at least once.")


@checked
@torch.no_grad()
def match_by_activations(
    a: Encoder, b: Encoder, acts: ActivationStore | Iterable[Tensor], *, options: MatchOptions | None = None
) -> ActivationMatch:
    """Features of two SAEs of one site, matched by what they do on the same tokens.

    `acts` are held-out activations: a store of one site (its held-out rows are read), or blocks `(tokens, d_in)`.

    Raises:
        ShapeError: if an SAE reads another width than the activations have.
        DegenerateInputError: if no feature of A fires often enough.
    """
    options = options or MatchOptions()
    same: CoActivation | None = None
    shuffled: CoActivation | None = None
    random = torch.Generator().manual_seed(options.seed)
    for x in _chunks(acts, options.max_tokens):
        # The sums are kept on the CPU, wherever the SAEs are.
        mine, theirs = (_encoded(name, sae, x).cpu() for name, sae in (("a", a), ("b", b)))
        if same is None or shuffled is None:
            same, shuffled = (CoActivation(mine.shape[1], theirs.shape[1]) for _ in range(2))
        same.add(mine, theirs)
        shuffled.add(mine, theirs[torch.randperm(len(x), generator=random)])
    if same is None or shuffled is None:
        raise DegenerateInputError("match_by_activations: there are no activations. Give a store or blocks of them.")
    return _matched(same.result(), shuffled.result(), options)


def _encoded(name: str, encoder: Encoder, x: Tensor) -> Tensor:
    if not isinstance(encoder, SAELike | Basis):
        return encoder.encode(x)
    basis = as_basis(encoder)
    if x.ndim != 2 or basis.d_in != x.shape[1]:
        raise ShapeError(
            f"match_by_activations: {name} reads d_in={basis.d_in}, and the activations have shape {tuple(x.shape)}. "
            "Give (tokens, d_in) of the site that both SAEs read."
        )
    return basis.encode(x)


def _chunks(acts: ActivationStore | Iterable[Tensor], limit: int) -> Iterable[Tensor]:
    blocks = acts.read(split="heldout") if isinstance(acts, ActivationStore) else acts
    for block in blocks:
        for part in block[:limit].split(CHUNK):
            yield part.float()
        limit -= len(block)
        if limit <= 0:
            return


def _matched(same: Agreement, shuffled: Agreement, options: MatchOptions) -> ActivationMatch:
    alive = same.fired_a >= options.min_fired
    n_alive = int(alive.sum())
    if not n_alive:
        raise DegenerateInputError(
            f"match_by_activations: no feature fired on {options.min_fired} of {same.n_tokens} tokens. Give more "
            "tokens, or lower min_fired."
        )

    def mean(values: Tensor) -> Estimate:
        x = values[alive].double().clamp(-1, 1).numpy()
        return sample_mean(x, unit="features", seed=options.seed, resamples=RESAMPLES, within=SIGNED_SHARE)

    def shared(agreement: Agreement) -> Estimate:
        often = _with_enough(agreement, options.min_fired)
        hits = assign_candidates(often, 0.0).scores[alive] > options.threshold
        return wilson(int(hits.sum()), n_alive, unit="features")

    best, partner = _best(same, options.min_fired)
    overlaps = entries(same.jaccard, np.arange(len(partner)), partner.numpy())
    return ActivationMatch(
        n_tokens=same.n_tokens, alive=n_alive, d_sae=len(alive), correlation=mean(best),
        null=mean(_best(shuffled, options.min_fired)[0]), jaccard=mean(torch.from_numpy(overlaps)),
        shared=shared(same), null_shared=shared(shuffled), threshold=options.threshold, min_fired=options.min_fired,
    )  # fmt: skip


def _with_enough(agreement: Agreement, min_fired: int) -> SparseMatrix:
    """The correlations with features of B that fired often enough."""
    from scipy.sparse import dia_array

    often = (agreement.fired_b >= min_fired).double().numpy()
    n = len(often)
    return (agreement.correlation @ dia_array((often[None], [0]), shape=(n, n))).tocsr()


def _best(agreement: Agreement, min_fired: int) -> tuple[Tensor, Tensor]:
    kept = Agreement(
        agreement.n_tokens, agreement.fired_a, agreement.fired_b, _with_enough(agreement, min_fired), agreement.jaccard
    )
    return kept.best()
