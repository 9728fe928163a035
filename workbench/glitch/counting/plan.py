"""What a census is asked for and plans: prompts, order of the tokens, and the type of number it computes in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from workbench.core.arguments import checked
from workbench.core.counts import pace
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, require
from workbench.core.numbers import counted
from workbench.core.progress import clock
from workbench.glitch.counting.sampling import by_rank, draw
from workbench.glitch.scanning.glitch_report import GlitchReport
from workbench.glitch.scanning.scanner import ScanOptions, scan
from workbench.glitch.verification.probing import AGAIN, SHORT, DtypeChoice, Prober, choose_dtype, dtype_name
from workbench.glitch.verification.prompts import PROMPTS, Forms, Template, TokenPrompt, prompt_hash, prompt_set
from workbench.glitch.verification.scoring import VerifyOptions
from workbench.glitch.vocabulary.tokenizer import vocabulary_of
from workbench.models.model import Model

NO_TEST = ("no_token", "no_row")
"""Categories of ids that cannot be tested: rows without a token, tokens without a row."""


@checked
@dataclass(frozen=True, kw_only=True)
class CensusOptions(OneLine):
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

    def __str__(self) -> str:
        n, dtype = len(self.ids), self.dtype
        speed = pace(dtype.tokens_per_second[dtype.dtype], "tokens")
        return (
            f"{counted(n, 'tokens')} x {self.n_own} positions at {speed}: about {clock(dtype.seconds(n))}, and more "
            f"for tokens that fail ({dtype.why})"
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


def plan_census(model: Model, *, options: CensusOptions | None = None, measure_both: bool = True) -> CensusPlan:
    """Ranks the tokens, makes the prompts and measures the speed; runs a few batches only.

    With `measure_both` bfloat16 may be chosen; the caller then makes the model in it, by `in_dtype`.
    """
    options = options or CensusOptions()
    report = scan(model, options=options.scan)
    vocabulary = vocabulary_of(model)
    steps, confirm = VerifyOptions().steps, ()
    (short,) = prompt_set(model, vocabulary, [options.short], "raw", strict=True).templates
    if options.confirm:
        confirm = prompt_set(model, vocabulary, options.confirm, options.forms, steps=steps).templates
    if options.confirm and options.again:
        confirm = (*prompt_set(model, vocabulary, options.again, "raw", steps=steps).templates, *confirm)
    if options.sample is not None:
        ids = draw(by_rank(ranking(report), options.shares), options.sample, options.seed)
    else:
        every = np.flatnonzero(~np.isin(report.table.category, NO_TEST))
        ids = np.random.default_rng(options.seed).permutation(every)
    plain = np.flatnonzero(report.table.ordinary)
    some = np.random.default_rng(options.seed).permutation(plain).tolist()
    return CensusPlan(report, short, confirm, ids, choose_dtype(model, short, some, both=measure_both), options)


def prober_of(model: Model, plan: CensusPlan, folder: Path | None = None) -> Prober:
    """What tests the tokens of a plan, and remembers.

    Raises:
        InvalidInputError: if the model is not in the plan's dtype.
        MismatchError: if the folder holds results of another model, dtype or prompt.
    """
    if dtype_name(model) != plan.dtype.dtype:
        raise InvalidInputError(
            f"The plan is for {plan.dtype.dtype}, the model is in {dtype_name(model)}. Load it in the plan's dtype."
        )
    return Prober(
        model, plan.short, len(plan.scan.table), confirm=plan.confirm, folder=folder,
        batch_size=plan.options.batch_size,
    )  # fmt: skip


def in_dtype(model: Model, choice: DtypeChoice) -> Model:
    """The model in the chosen dtype; its own weights are converted, so there is no second copy."""
    if dtype_name(model) == choice.dtype:
        return model
    return Model(model.hf.to(getattr(torch, choice.dtype)), model.tokenizer, model.name)
