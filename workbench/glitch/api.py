"""The glitch-token calls of one line: scan, census, lint, diff."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, overload

from workbench.core.arguments import checked
from workbench.core.errors import UnknownNameError
from workbench.glitch.counting.census import CensusReport, run_census
from workbench.glitch.counting.plan import CensusOptions, in_dtype, plan_census
from workbench.glitch.scanning.differences import DiffReport, between, side
from workbench.glitch.scanning.glitch_report import GlitchReport
from workbench.glitch.scanning.scanner import ScanOptions, loaded
from workbench.glitch.scanning.scanner import scan as scan_rows
from workbench.glitch.text.lint_report import LintReport
from workbench.glitch.text.linter import KINDS, linter_for
from workbench.glitch.verification.prompts import PROMPTS, prompts_from
from workbench.models.model import Model


@overload
def scan(
    model: Model | str | Path, verify: Literal["top"] | None = None, *, options: ScanOptions | None = None
) -> GlitchReport: ...
@overload
def scan(
    model: Model | str | Path, verify: Literal["census"], *, options: ScanOptions | None = None
) -> CensusReport: ...
@checked
def scan(
    model: Model | str | Path, verify: str | None = None, *, options: ScanOptions | None = None
) -> GlitchReport | CensusReport:
    """Ranks every token of a model by how untrained its row looks, and on request asks the model for tokens.

    Args:
        model: a `Model`, a model folder, a .gguf file, "embedded", or a hub id in the local cache.
        verify: None reads two weight matrices only, without loading the model; "top" tests the most suspicious tokens
            beside random ordinary ones; "census" tests every token, see `census`.
        options: which reference and indicator, how many tokens to test, which prompts.

    Raises:
        UnknownNameError: for another `verify`.
        DegenerateInputError: if there is nothing to verify because no ranking could be trusted.
        ModelUnavailableError: for a hub id that is not in the local cache.
    """
    if verify == "census":
        how = options or ScanOptions()
        return census(model, options=CensusOptions(
            confirm=PROMPTS if how.prompts is None else prompts_from(how.prompts), forms=how.forms,
            batch_size=how.verification.batch_size, seed=how.seed, scan=how,
        ))  # fmt: skip
    if verify not in (None, "top"):
        raise UnknownNameError(
            f"verify={verify!r} does not exist. There are None (weights only), 'top' (tests the most suspicious "
            "tokens) and 'census' (tests every token)."
        )
    return scan_rows(model, verify, options=options)


@checked
def census(
    model: Model | str | Path, *, options: CensusOptions | None = None, folder: str | Path | None = None
) -> CensusReport:
    """Asks a model for every token of its vocabulary, or for a sample of them.

    Args:
        model: a `Model`, tested in its own dtype, or what `load_model` takes, tested in the faster of float32 and
            bfloat16 if both give the same on a sample of tokens.
        options: a sample's size, the prompts, the ranking whose recall is measured.
        folder: where results are kept while they come; the same call continues from there. None keeps them in memory.

    Raises:
        MismatchError: if the folder holds results of another model, dtype or prompt.
    """
    loaded_model = loaded(model, dtype="float32")
    plan = plan_census(loaded_model, options=options, measure_both=not isinstance(model, Model))
    return run_census(in_dtype(loaded_model, plan.dtype), plan, None if folder is None else Path(folder))


@checked
def lint(
    model: Model | str | Path, text: str, *, scan: str | Path | None = None, kinds: Iterable[str] = tuple(KINDS)
) -> LintReport:
    """Where a text holds tokens that a model is likely to stumble over, and characters that its tokenizer loses.

    Args:
        model: a `Model`, a folder, a .gguf file, "embedded", or a hub id in the local cache.
        text: one text; for files, or many texts, make a `Linter` once with `workbench.glitch.text.linter.linter_for`.
        scan: run folder or glitch.json of `workbench glitch scan`; without it the weights are scanned now, which gives
            candidates that nobody has tested.
        kinds: what to look for, keys of `workbench.glitch.text.linter.KINDS`.

    Raises:
        UnknownNameError: for a kind that does not exist.
        MismatchError: if the scan is of another tokenizer.
    """
    return linter_for(model, scan, kinds).text(text)


@checked
def diff(a: Model | str | Path, b: Model | str | Path, *, tokenizer_only: bool = False) -> DiffReport:
    """What differs between two models, scans or tokenizers: flags, ids, categories, verdicts, lost bytes.

    Args:
        a: run folder or glitch.json of a scan, or a model (folder, .gguf file, "embedded", cached hub id).
        b: the same.
        tokenizer_only: compare the tokenizers of models alone; their weights are not read.
    """
    return between(side(a, tokenizer_only), side(b, tokenizer_only))
