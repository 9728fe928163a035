"""What a census is asked for, plans and measures, as values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workbench.core.errors import DegenerateInputError, require
from workbench.core.progress import clock
from workbench.glitch.counting.sampling import Stratum, by_rank, tally
from workbench.glitch.scanning.glitch_report import GlitchReport
from workbench.glitch.scanning.scanner import ScanOptions
from workbench.glitch.verification.chat import Forms
from workbench.glitch.verification.probing import AGAIN, SHORT, DtypeChoice
from workbench.glitch.verification.prompts import PROMPTS, Template, TokenPrompt, prompt_hash
from workbench.glitch.verification.verify import VERIFIED

NO_TEST = ("no_token", "no_row")
"""Categories of ids that cannot be tested: rows without a token, tokens without a row."""


@dataclass(frozen=True, kw_only=True)
class CensusOptions:
    """What a census runs.

    Attributes:
        sample: test so many ordinary tokens, drawn by strata of the ranking, and estimate the rest; None tests all.
        shares: shares of the ranking whose recall is wanted; they are the ends of the strata too.
        confirm: prompts for the tokens that fail it; empty trusts the short prompt alone.
        again: cheap prompts that come before these, as raw text; not run without `confirm`.
        forms: `confirm` as raw text, through the chat template, or both; "auto" is both where there is a template.
        seed: of the order of the tokens, and of a sample.
    """

    sample: int | None = None
    shares: tuple[float, ...] = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    short: TokenPrompt = SHORT
    confirm: tuple[TokenPrompt, ...] = PROMPTS
    again: tuple[TokenPrompt, ...] = (AGAIN,)
    forms: Forms = "auto"
    batch_size: int = 64
    seed: int = 0
    scan: ScanOptions = ScanOptions()

    def __post_init__(self) -> None:
        n = len(self.shares) + 1
        rule = f"too small for {n} strata. Ask for at least {2 * n}, or None for all tokens."
        require(self.sample is None or self.sample >= 2 * n, f"sample={self.sample}", rule)
        is_valid = self.batch_size >= 1 and self.shares and all(0 < share < 1 for share in self.shares)
        rule = "batch_size is at least 1, shares lie between 0 and 1, and there is at least one."
        require(bool(is_valid), f"batch_size={self.batch_size}, shares={self.shares}", rule)


@dataclass(frozen=True, eq=False)
class CensusPlan:
    """What a census will do, known before it starts.

    The `ids` are in the random order in which they are tested: an interrupted census is a random sample.
    """

    scan: GlitchReport
    short: Template
    confirm: tuple[Template, ...]
    ids: np.ndarray
    dtype: DtypeChoice
    options: CensusOptions

    @property
    def n_own(self) -> int:
        """Positions computed for each token, behind the beginning that all share."""
        return len(self.short.ids) - self.short.shared

    @property
    def prompts(self) -> str:
        """Hash of the prompts."""
        return prompt_hash([self.short, *self.confirm])

    @property
    def seconds(self) -> float:
        """How long the short prompts will take, from the measured speed; failing tokens take longer."""
        return self.dtype.seconds(len(self.ids))

    def __str__(self) -> str:
        speed = self.dtype.tokens_per_second[self.dtype.dtype]
        return (
            f"{len(self.ids):,} tokens x {self.n_own} positions at {speed:.0f} tokens/s: about {clock(self.seconds)}, "
            f"and more for tokens that fail ({self.dtype.why})"
        )


def ranking(report: GlitchReport) -> np.ndarray:
    """Ids of all ordinary tokens, the most suspicious first: zero rows, then by indicator, then those without one.

    Raises:
        DegenerateInputError: if the scan found no ranking that can be trusted.
    """
    if report.indicator is None:
        raise DegenerateInputError(
            f"{report.model} has no ranking, because {report.indicator_why}. Name unused ids with "
            "ScanOptions(reference=...), or test every token."
        )
    table = report.table
    value = np.nan_to_num(table.indicator, nan=np.inf)
    value[list(report.zero_rows)] = -np.inf
    plain = np.flatnonzero(table.ordinary)
    return plain[np.argsort(value[plain], kind="stable")]


@dataclass(frozen=True, eq=False)
class CensusResult:
    """What a census measured; arrays are indexed by token id.

    Attributes:
        short: probability of the token in the short prompt; nan where it was not tested.
        best: highest probability over all prompts; equal to `short` for a token that did not fail it.
    """

    model: str
    fingerprint: str
    plan: CensusPlan
    short: np.ndarray
    best: np.ndarray

    @property
    def tested(self) -> np.ndarray:
        """Whether the token was tested."""
        return ~np.isnan(self.best)

    @property
    def glitch(self) -> np.ndarray:
        """Whether the token is a glitch token: below the threshold in every prompt."""
        return self.best < VERIFIED

    @property
    def unconfirmed(self) -> np.ndarray:
        """Whether the token failed the short prompt and the others have not been run: it is not known what it is."""
        return ~np.isnan(self.short) & np.isnan(self.best)

    @property
    def is_complete(self) -> bool:
        """Whether every token was tested."""
        category = np.asarray(self.plan.scan.table.category)
        return bool(self.tested[~np.isin(category, NO_TEST)].all())

    def strata(self, probabilities: np.ndarray | None = None) -> tuple[Stratum, ...]:
        """Counts by rank of the ordinary tokens, from the most suspicious on."""
        ids = by_rank(ranking(self.plan.scan), self.plan.options.shares)
        return tally(ids, self.best if probabilities is None else probabilities, VERIFIED)
