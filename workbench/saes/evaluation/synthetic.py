"""SAEs on data whose true features are known: how many are found, how well each is detected, and what is shrunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.bases.base import Basis, Dictionary
from workbench.bases.kinds.random import random_like
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, ShapeError
from workbench.core.metrics import fvu
from workbench.core.similarity import assign_directions, max_cosines
from workbench.core.stats import SHARE, SIGNED_SHARE, Estimate, sample_mean
from workbench.report.base import Headline, Report, Says, Section, Table

FIRST_SEED = 2**32
"""Of the directions: an SAE of the same shape that is initialised from seed 0 must not begin at the truth."""


@dataclass(frozen=True, kw_only=True)
class SyntheticOptions:
    """The toy world: sparse positive codes of unit features in fewer dimensions.

    Attributes:
        mean_active: features per token, on average; each is drawn by itself.
        seed: of the directions.
    """

    n_features: int = 256
    d_in: int = 64
    mean_active: float = 4.0
    low: float = 0.5
    high: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.n_features > 0 and self.d_in > 1 and 0 < self.mean_active <= self.n_features):
            raise InvalidInputError(f"{self}: needs features, two dimensions, and 0 < mean_active <= n_features.")
        if not 0 < self.low <= self.high:
            raise InvalidInputError(f"{self}: magnitudes need 0 < low <= high.")


@dataclass(frozen=True, eq=False)
class SyntheticTruth:
    """Unit vectors, one per true feature, and tokens made of them."""

    directions: Float[Tensor, "n_true d_in"]
    options: SyntheticOptions

    @classmethod
    def make(cls, options: SyntheticOptions | None = None) -> SyntheticTruth:
        """Random directions, uniform on the sphere."""
        options = options or SyntheticOptions()
        random = torch.Generator().manual_seed(FIRST_SEED + options.seed)
        directions = torch.randn(options.n_features, options.d_in, generator=random)
        return cls(directions / directions.norm(dim=1, keepdim=True), options)

    def codes(self, n: int, seed: int = 0) -> Float[Tensor, "n n_true"]:
        """Magnitudes of the features of `n` tokens; zero where a feature is absent."""
        o, random = self.options, torch.Generator().manual_seed(seed)
        size = (n, o.n_features)
        present = torch.rand(size, generator=random) < o.mean_active / o.n_features
        return present * (o.low + (o.high - o.low) * torch.rand(size, generator=random))

    def tokens(self, n: int, seed: int = 0) -> Float[Tensor, "n d_in"]:
        """Activations of `n` tokens."""
        return self.codes(n, seed) @ self.directions

    def oracle(self) -> Dictionary:
        """The control that knows the answer: true dictionary and, for the tokens of any seed, near-true codes.

        The encoder is the pseudo-inverse with a cut at half the smallest magnitude; exact where features don't
        overlap, an upper reference elsewhere.
        """
        D, cut = self.directions, self.options.low / 2
        inverse = torch.linalg.pinv(D.double()).float()

        def encode(x: Tensor) -> Tensor:
            acts = x @ inverse
            return acts * (acts > cut)

        return Dictionary.of(encode, D, name="true dictionary")


@dataclass(frozen=True, kw_only=True)
class SyntheticScores:
    """One SAE against the truth; per-feature means are over true features, each judged by its matched SAE feature.

    Attributes:
        mmcs: mean over true features of the largest signed cosine with a decoder row.
        mcc: mean signed cosine under the best one-to-one matching.
        precision: share of the tokens where the SAE feature fires on which the true one is present.
        recall: share of the tokens with the true feature on which the SAE feature fires.
        shrinkage: norm of the reconstruction over norm of the token, mean.
        dead: share of SAE features that never fired.
    """

    mmcs: Estimate
    mcc: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate
    shrinkage: float
    fvu: float
    l0: float
    dead: float


_SCORES = ("mmcs", "mcc", "precision", "recall", "f1", "shrinkage", "fvu", "l0", "dead")


@dataclass(frozen=True)
class SyntheticReport(Report):
    """An SAE on the toy world beside an untrained one of the same shape.

    Attributes:
        controls: "random SAE" of the same shape and L0.
        trained: architecture of an SAE that was trained for this; empty for one that was given.
    """

    scores: SyntheticScores
    controls: dict[str, SyntheticScores]
    n_true: int
    n_tokens: int
    trained: str = ""

    def findings(self) -> tuple[str, ...]:
        """What was found, beside the control."""
        s, random = self.scores, self.controls["random SAE"]
        who = f"A {self.trained} SAE, trained for this on data of known features, reaches " if self.trained else ""
        return (
            f"{who}MMCS {s.mmcs} and MCC {s.mcc} over the true features; a random one of the same shape reaches "
            f"{random.mmcs} and {random.mcc}.",
            f"As detectors of their true features, matched SAE features have F1 {s.f1} on {self.n_tokens} tokens.",
        )

    def headline(self) -> Headline:
        """Cosine with the true features beside a random SAE's."""
        table = self._table()
        return Headline.read(
            Says(*(
                f"The SAE finds the true features {how} a random one of the same shape."
                for how in ("better than", "no better than", "worse than")
            )),
            value=(table, "mmcs", "this SAE"), control=(table, "mmcs", "random SAE"), measure="MMCS",
            control_name="random SAE",
        )  # fmt: skip

    def section(self) -> Section:
        """One table, one column per SAE."""
        metrics = {name: getattr(self.scores, name) for name in _SCORES}
        return Section("SAE on synthetic data", (self._table(),), self.findings(), metrics, self.headline())

    def _table(self) -> Table:
        every = {"this SAE": self.scores, **self.controls}
        rows = tuple((name, *(getattr(scores, name) for scores in every.values())) for name in _SCORES)
        return Table(("number", *every), rows, "Agreement with the true features. Intervals are over true features.")


@checked
def evaluate_on_synthetic(
    sae: AnySAE, truth: SyntheticTruth, *, n_tokens: int = 20_000, seed: int = 1
) -> SyntheticReport:
    """An SAE against the features that made its data.

    Raises:
        ShapeError: if the SAE reads another width.
    """
    basis = as_basis(sae)
    if basis.d_out != truth.directions.shape[1]:
        raise ShapeError(
            f"The SAE writes width {basis.d_out}; the true features have {truth.directions.shape[1]} "
            "dimensions. Train it on truth.tokens(...)."
        )
    codes = truth.codes(n_tokens, seed)
    x = codes @ truth.directions
    scores = _scores(basis, x, codes > 0, truth)
    control = random_like(basis, round(scores.l0), seed)
    return SyntheticReport(
        scores, {"random SAE": _scores(control, x, codes > 0, truth)}, len(truth.directions), n_tokens
    )


def _scores(
    basis: Basis, x: Float[Tensor, "n d"], present: Bool[Tensor, "n n_true"], truth: SyntheticTruth
) -> SyntheticScores:
    pairs = assign_directions(truth.directions, basis.rows().cpu())
    true = (pairs.columns >= 0).nonzero().flatten()
    partners = pairs.columns[true]
    n_true = len(truth.directions)
    hits, fires = np.zeros(n_true), np.zeros(n_true)
    fired, active = torch.zeros(basis.d_sae, dtype=torch.bool), 0
    for rows, acts in basis.chunks(x):
        on = (acts > 0).cpu()
        matched = on[:, partners]
        hits[true] += (matched & present[rows][:, true]).sum(0).numpy()
        fires[true] += matched.sum(0).numpy()
        fired |= on.any(0)
        active += int(on.sum())
    there = present.sum(0).numpy()
    x_hat = basis.reconstruct(x).cpu()
    norms = x.norm(dim=1)
    filled = norms > 0
    return SyntheticScores(
        mmcs=_over_features(max_cosines(truth.directions, basis.rows().cpu()).values.numpy(), SIGNED_SHARE),
        mcc=_over_features(pairs.scores.numpy(), SIGNED_SHARE),
        precision=_over_features(hits / np.maximum(fires, 1)),
        recall=_over_features((hits / np.maximum(there, 1))[there > 0]),
        f1=_over_features((2 * hits / np.maximum(fires + there, 1))[there > 0]),
        shrinkage=float((x_hat.norm(dim=1) / norms)[filled].mean()),
        fvu=fvu(x, x_hat), l0=active / len(x), dead=float((~fired).double().mean()),
    )  # fmt: skip


def _over_features(values: np.ndarray, within: tuple[float, float] = SHARE) -> Estimate:
    return sample_mean(values.clip(*within), unit="true features", within=within)  # a cosine may be rounded beyond 1
