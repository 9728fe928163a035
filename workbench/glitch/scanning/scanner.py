"""Glitch-token scan: which tokens has this model probably never been trained on?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from workbench.core.arguments import checked
from workbench.core.codec import Codec, codec_in, codec_of, codec_of_gguf
from workbench.core.display import OneLine
from workbench.core.errors import (
    DegenerateInputError,
    InvalidInputError,
    MissingFileError,
    ModelUnavailableError,
    require,
    require_known,
)
from workbench.core.gguffile import read_gguf
from workbench.engine.log import Log
from workbench.glitch.ranking.indicators import (
    INDICATORS,
    RowFacts,
    Separation,
    find_threshold,
    held_out_values,
    measure,
    pick,
    read_rows,
    separation,
)
from workbench.glitch.ranking.reference import MIN_MEMBERS, Reference, choose, given, judge, merge_duplicates, propose
from workbench.glitch.ranking.weights import BLOCK_ROWS, TokenMatrices, in_folder, in_gguf, in_memory
from workbench.glitch.scanning.glitch_report import GlitchReport
from workbench.glitch.scanning.result import TokenizerFacts, TokenTable
from workbench.glitch.verification.contexts import Contexts, in_contexts, line_options, make_lines
from workbench.glitch.verification.prompts import FORMS, PROMPTS, Forms, PromptSet, Template, prompt_set, prompts_from
from workbench.glitch.verification.scoring import VerifyOptions
from workbench.glitch.verification.sides import Sides, measure_sides
from workbench.glitch.verification.symptoms import Symptoms, symptoms
from workbench.glitch.verification.verify import journal_key, verify, with_spliced
from workbench.glitch.vocabulary.taxonomy import natures, same_text
from workbench.glitch.vocabulary.tokenizer import CATEGORIES, Vocabulary, analyse, draw_controls
from workbench.models.model import Model

_N_ORDINARY = 2000
_NO_WORDS = 100
"""So many of the most suspicious tokens are not taken as words that other tokens may be made of."""


@checked
@dataclass(frozen=True, kw_only=True)
class ScanOptions(OneLine):
    """What a scan looks for and how much it tests.

    Attributes:
        controls: random ordinary tokens to verify beside them; None means as many as `top`.
        percentile: share of ordinary tokens, in percent, that become candidates (2 in the literature); None takes as
            many as exceed what the bulk explains, see `workbench.glitch.ranking.indicators.find_threshold`.
        reference: ids known to be unused; None finds them.
        indicator: which indicator to rank by; None chooses by measured separation.
        prompts: JSON file with prompts to use instead of the built-in ones.
        forms: prompts as raw text, through the chat template, or both; "auto" is both where there is a template.
        spliced: suspicious tokens that no text gives (parts of characters, unreachable ones) to test by their ids; they
            are in no count of the candidates.
        sides: also find out whether tested tokens can be read, and whether they can be written.
        contexts: also ask for each tested token in so many lines of random ordinary tokens.
        symptoms: also ask the model to repeat, spell and measure the tested tokens.
        journal: file in which test results are kept while they come; an interrupted test continues from it.
        block_rows: rows of a matrix held in memory at a time.
    """

    top: int = 40
    controls: int | None = None
    percentile: float | None = None
    reference: tuple[int, ...] | None = None
    indicator: str | None = None
    prompts: Path | None = None
    forms: Forms = "auto"
    spliced: int = 16
    sides: bool = True
    contexts: int = 0
    symptoms: bool = False
    journal: Path | None = None
    seed: int = 0
    block_rows: int = BLOCK_ROWS
    verification: VerifyOptions = VerifyOptions()

    def __post_init__(self) -> None:
        rule = "top and block_rows are at least 1, spliced, contexts and controls at least 0."
        least = min(self.spliced, self.contexts, self.controls or 0)
        require(min(self.top, self.block_rows) >= 1 and least >= 0, self, rule)
        require_known("prompt form", self.forms, ("auto", *FORMS))
        rule = "must lie between 0 and 100; the literature takes 2. Leave it out to have the threshold found."
        require(self.percentile is None or 0 < self.percentile < 100, f"percentile={self.percentile}", rule)
        if self.indicator is not None:
            INDICATORS.check(self.indicator)


def scan(model: object, verify: Literal["top"] | None = None, *, options: ScanOptions | None = None) -> GlitchReport:
    """`workbench.glitch.scan` without the census: the ranking of every token, and on request tests of the first ones.

    Raises:
        DegenerateInputError: if there is nothing to verify because no ranking could be trusted.
        ModelUnavailableError: for a hub id that is not in the local cache.

    Source: Land and Bartolo 2024. Departs from it by finding the reference and choosing the indicator itself, by
    refusing to rank when it cannot, and by testing random controls beside the candidates.
    """
    options = options or ScanOptions()
    name, matrices, codec = _open(model)
    vocabulary = analyse(codec)
    report = _weights_only(name, matrices, vocabulary, options)
    candidates = report.candidates()
    suspects = {*candidates[: max(options.top, _NO_WORDS)], *report.reference.members}
    report = dataclasses.replace(report, natures=natures(vocabulary, [*candidates, *report.unwritable()], suspects))
    return report if verify is None else _examined(model, report, codec, vocabulary, options)


@checked
def examine(model: Model | str | Path, report: GlitchReport, *, options: ScanOptions | None = None) -> GlitchReport:
    """The second half of `scan(model, "top")`, for a report that was made of the same model's weights.

    Raises:
        DegenerateInputError: if there is nothing to verify, or the model gives no numbers.
    """
    codec = codec_for(model)
    return _examined(model, report, codec, analyse(codec), options or ScanOptions())


def codec_for(model: object) -> Codec:
    """The tokenizer of a model, or of what names one; see `scan`."""
    return codec_of(model.tokenizer) if isinstance(model, Model) else codec_in(local_path(str(model)))


def loaded(model: object, *, dtype: str = "auto") -> Model:
    """The model, loaded if it is named; see `scan`."""
    if isinstance(model, Model):
        return model
    from workbench.models.loading import load_model

    return load_model(str(model), dtype=dtype)


def _open(model: object) -> tuple[str, TokenMatrices, Codec]:
    if isinstance(model, Model):
        return model.name, in_memory(model.hf), codec_of(model.tokenizer)
    if not isinstance(model, str | Path):
        raise InvalidInputError(
            f"scan({type(model).__name__}): give a Model, a folder, a .gguf file, a hub id or 'embedded'."
        )
    path = local_path(model)
    if path.suffix == ".gguf":
        file = read_gguf(path)
        return path.stem, in_gguf(file), codec_of_gguf(file)
    return "SmolLM2-135M-Instruct" if str(model) == "embedded" else str(model), in_folder(path), codec_in(path)


def local_path(name: str | Path) -> Path:
    """The folder or file that holds a model's weights; nothing is downloaded except the embedded model.

    Raises:
        MissingFileError: if a path does not exist.
        ModelUnavailableError: if a hub id is not in the local cache.
    """
    if str(name) == "embedded":
        from workbench.models.embedded import embedded_folder

        return embedded_folder()
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".gguf":
        return path
    if path.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise MissingFileError(
            f"{name} is not a model folder or .gguf file. Give one, 'embedded', or a hub id such as org/name."
        )
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(str(name), "config.json")
    if not isinstance(config, str):
        raise ModelUnavailableError(
            f"{name} is not in the local Hugging Face cache. Download it first (hf download {name}), or name a folder."
        )
    return Path(config).parent


def _weights_only(name: str, matrices: TokenMatrices, vocabulary: Vocabulary, options: ScanOptions) -> GlitchReport:
    component = options.indicator is not None and INDICATORS[options.indicator].needs_component
    outer = read_rows(matrices.E_out, options.block_rows, matrices.bias, component=component)
    inner = outer if matrices.tied else read_rows(matrices.E_in, options.block_rows, identical=False)
    ordinary = _ordinary(vocabulary, outer)
    chosen, witnesses = _reference(vocabulary, matrices, outer, ordinary, options)
    values = measure(matrices, inner, outer, chosen.members, options.block_rows)
    measured = _separations(matrices, outer, chosen.members or witnesses, values, ordinary)
    picked, why = pick(measured, options.indicator, insist=options.reference is not None)
    table = _table(vocabulary, outer, chosen, values, picked)
    plain = table.ordinary & np.isfinite(table.indicator)
    line = find_threshold(table.indicator[plain] if picked is not None else np.zeros(0), options.percentile)
    zero = tuple(np.flatnonzero(outer.finite & (outer.norm == 0)).tolist())
    bad = tuple(sorted({*np.flatnonzero(~outer.finite).tolist(), *np.flatnonzero(~inner.finite).tolist()}))
    return GlitchReport(
        model=name, tied=matrices.tied, tied_why=matrices.tied_why, n_rows=matrices.E_out.n_rows,
        d_model=matrices.E_out.width, stored=matrices.E_out.stored, has_bias=matrices.bias is not None,
        tokenizer=_facts(vocabulary, table), reference=chosen, separations=measured, indicator=picked,
        indicator_why=why, same_text=same_text(vocabulary), threshold=line.value, percentile=line.percentile,
        threshold_why=line.why, identical=outer.classes, zero_rows=zero, bad_rows=bad, table=table, verification=None,
        seed=options.seed,
    )  # fmt: skip


def _ordinary(vocabulary: Vocabulary, outer: RowFacts) -> np.ndarray:
    """Ids of reachable text tokens with a usable row: what the reference is compared with."""
    shared = min(len(vocabulary), len(outer.norm))
    plain = vocabulary.ordinary[:shared] & outer.usable[:shared]
    if not plain.any():
        raise DegenerateInputError(
            f"None of the {len(vocabulary)} tokens is ordinary text with a usable row among {len(outer.norm)} rows. "
            "Check that the tokenizer belongs to the model."
        )
    return np.flatnonzero(plain)


def _reference(
    vocabulary: Vocabulary, matrices: TokenMatrices, outer: RowFacts, ordinary: np.ndarray, options: ScanOptions
) -> tuple[Reference, Sequence[int]]:
    """The reference, and the ids that names or places alone call unused (for an untied model without a reference)."""
    if options.reference is not None:
        return given(options.reference, outer.usable), ()
    E_out = matrices.E_out
    duplicates = merge_duplicates(outer.classes, E_out)
    proposed = propose(vocabulary, E_out.n_rows, duplicates)
    sample = E_out.rows(ordinary[:: -(-len(ordinary) // _N_ORDINARY)].tolist())
    judged = [judge(name, why, ids, E_out, outer.usable, sample, outer.mean) for name, (why, ids) in proposed.items()]
    named = ("padding rows", "unused bytes", "reserved names")
    witnesses = [i for name in named for i in proposed.get(name, ("", []))[1]]
    return choose(judged, E_out), witnesses if len(witnesses) >= MIN_MEMBERS else ()


def _separations(
    matrices: TokenMatrices, outer: RowFacts, unused: Sequence[int], values: dict[str, np.ndarray], ordinary: np.ndarray
) -> tuple[Separation, ...]:
    others = np.setdiff1d(ordinary, unused)
    return tuple(
        separation(name, values[name], others, held_out_values(name, matrices, outer, values[name], unused))
        for name in INDICATORS if unused and name in values
    )  # fmt: skip


def _facts(vocabulary: Vocabulary, table: TokenTable) -> TokenizerFacts:
    return TokenizerFacts(
        n_tokens=vocabulary.n_tokens, style=vocabulary.style, adds_space=vocabulary.adds_space,
        counts={name: count for name in CATEGORIES if (count := table.category.count(name))},
        n_byte_tokens=int((vocabulary.byte >= 0).sum()), missing_bytes=vocabulary.missing_bytes, lossy=vocabulary.lossy,
        vocabulary=vocabulary.digest,
    )  # fmt: skip


def _table(
    vocabulary: Vocabulary, outer: RowFacts, chosen: Reference, values: dict[str, np.ndarray], picked: str | None
) -> TokenTable:
    n_rows, n_ids = len(outer.norm), len(vocabulary)
    n = max(n_rows, n_ids)
    category = list(vocabulary.category) + ["no_token"] * (n - n_ids)
    for i in range(n_rows, n_ids):
        category[i] = "no_token" if vocabulary.raw[i] is None else "no_row"
    group: list[list[str]] = [[] for _ in range(n)]
    for judged in chosen.groups:
        for i in judged.members:
            group[i].append(judged.name)
    copies = np.ones(n, dtype=np.int64)
    for ids in outer.classes:
        copies[list(ids)] = len(ids)
    every = {name: _padded(column, n) for name, column in values.items()}
    return TokenTable(
        token=tuple(vocabulary.text) + ("",) * (n - n_ids), category=tuple(category),
        group=tuple("; ".join(names) for names in group), is_reference=np.isin(np.arange(n), chosen.members),
        is_byte=_padded(vocabulary.byte >= 0, n, False), reserved=_padded(vocabulary.reserved, n, False),
        copies=copies, norm=_padded(outer.norm, n), indicators=every,
        indicator=every[picked] if picked else np.full(n, np.nan),
    )  # fmt: skip


def _padded(values: np.ndarray, n: int, fill: float | bool = np.nan) -> np.ndarray:
    return np.concatenate([values, np.full(n - len(values), fill)])[:n].astype(values.dtype)


def _examined(
    source: object, report: GlitchReport, codec: Codec, vocabulary: Vocabulary, options: ScanOptions
) -> GlitchReport:
    candidates = report.candidates()[: options.top]
    if not candidates:
        raise DegenerateInputError(
            f"verify='top': there is nothing to test in {report.model}, because {report.indicator_why}. "
            "Give ScanOptions(reference=(ids of tokens known to be unused,)), or read the weights-only report."
        )
    model, table = loaded(source), report.table
    pool = np.flatnonzero(table.ordinary & (table.indicator > report.threshold) & ~table.is_reference)
    controls = draw_controls(pool, options.top if options.controls is None else options.controls, options.seed)
    made = _prompts(model, vocabulary, options)
    journal = _journal(options.journal, model, made.templates, options.verification)
    done = verify(model, codec, made.templates, candidates, controls, options.verification, journal)
    if spliced := report.unwritable()[: options.spliced]:
        done = with_spliced(done, model, made.templates, spliced, journal)
    report = dataclasses.replace(report, verification=dataclasses.replace(done, notes=made.notes))
    more: dict[str, Callable[[], Sides | Contexts | Symptoms]] = {}
    if options.sides:
        suspects = report.candidates()
        more["sides"] = lambda: measure_sides(model, codec, vocabulary, candidates, controls, suspects)
    if options.contexts:
        words = np.setdiff1d(pool, [*candidates, *controls]).tolist()
        more["contexts"] = lambda: _among_others(model, vocabulary, words, candidates, controls, options)
    if options.symptoms:
        more["symptoms"] = lambda: symptoms(model, vocabulary, candidates, controls, forms=options.forms)
    for name, measure_more in more.items():
        try:
            report = dataclasses.replace(report, **{name: measure_more()})
        except DegenerateInputError as error:
            report = dataclasses.replace(report, notes=(*report.notes, f"Not measured: {name}. {error}"))
    return report


def _journal(path: Path | None, model: Model, templates: Sequence[Template], how: VerifyOptions) -> Log | None:
    return None if path is None else Log(path, journal_key(model, templates, how))


def _prompts(model: Model, vocabulary: Vocabulary, options: ScanOptions) -> PromptSet:
    own = None if options.prompts is None else prompts_from(options.prompts)
    steps = options.verification.steps
    return prompt_set(model, vocabulary, own or PROMPTS, options.forms, strict=own is not None, steps=steps)


def _among_others(
    model: Model, vocabulary: Vocabulary, words: Sequence[int], candidates: Sequence[int], controls: Sequence[int],
    options: ScanOptions,
) -> Contexts:  # fmt: skip
    lines = make_lines(model, vocabulary, words, options.contexts, options.seed)
    how = line_options(options.verification)
    path = options.journal and options.journal.with_name(f"{options.journal.stem}-lines{options.journal.suffix}")
    return in_contexts(model, lines, candidates, controls, how, _journal(path, model, lines.templates, how))
