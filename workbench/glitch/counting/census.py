"""A census: every token of the vocabulary is asked for, so that the recall of a ranking is measured, not guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from workbench.core.errors import InvalidInputError
from workbench.glitch.counting.census_report import CensusReport
from workbench.glitch.counting.census_result import NO_TEST, CensusOptions, CensusPlan, ranking
from workbench.glitch.counting.sampling import by_rank, draw
from workbench.glitch.scanning.scanner import scan
from workbench.glitch.verification.chat import prompt_set
from workbench.glitch.verification.probing import DtypeChoice, Prober, choose_dtype, dtype_name
from workbench.glitch.verification.prompts import Template
from workbench.glitch.verification.scoring import VerifyOptions
from workbench.glitch.vocabulary.tokenizer import vocabulary_of
from workbench.models.model import Model


def plan_census(model: Model, *, options: CensusOptions | None = None, measure_both: bool = True) -> CensusPlan:
    """Ranks the tokens, makes the prompts and measures the speed; runs a few batches only.

    With `measure_both` bfloat16 may be chosen; the caller then makes the model in it, by `in_dtype`.
    """
    options = options or CensusOptions()
    report = scan(model, options=options.scan)
    vocabulary = vocabulary_of(model)
    steps = VerifyOptions().steps
    (short,) = prompt_set(model, vocabulary, [options.short], "raw", strict=True).templates
    confirm: tuple[Template, ...] = ()
    if options.confirm:
        confirm = prompt_set(model, vocabulary, options.confirm, options.forms, steps=steps).templates
    if options.confirm and options.again:
        confirm = (*prompt_set(model, vocabulary, options.again, "raw", steps=steps).templates, *confirm)
    if options.sample is not None:
        ids = draw(by_rank(ranking(report), options.shares), options.sample, options.seed)
    else:
        every = np.flatnonzero(~np.isin(np.asarray(report.table.category), NO_TEST))
        ids = np.random.default_rng(options.seed).permutation(every)
    plain = np.flatnonzero(report.table.ordinary)
    some = np.random.default_rng(options.seed).permutation(plain).tolist()
    return CensusPlan(report, short, confirm, ids, choose_dtype(model, short, some, both=measure_both), options)


def run_census(model: Model, plan: CensusPlan, folder: Path | None = None) -> CensusReport:
    """Tests the planned tokens with the model in the plan's dtype; what the folder holds is not run again.

    Results are kept in the folder, batch after batch; None keeps them in memory.

    Raises:
        InvalidInputError: if the model is not in the plan's dtype.
        MismatchError: if the folder holds results of another model, dtype or prompt.
    """
    prober = prober_of(model, plan, folder)
    prober.best_probabilities(plan.ids)
    return CensusReport(model.name, model.fingerprint, plan, prober.short, prober.best)


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
