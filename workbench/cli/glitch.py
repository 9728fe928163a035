"""Commands that use a glitch-token scan: lint, diff, export, sanitize, adt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from workbench.cli.base import BaseCommand, model_words, typed
from workbench.cli.places import SCANS, any_run, named_run
from workbench.cli.study import Begin, R, RunFolderStudy, Study
from workbench.core.errors import DegenerateInputError
from workbench.core.numbers import number

if TYPE_CHECKING:
    from workbench.glitch.scanning.differences import DiffReport
    from workbench.glitch.text.adt_run import AdtReport
    from workbench.glitch.text.lint_report import LintReport
    from workbench.glitch.text.sanitize import Sanitizer, SanitizeReport

FOUND = 1
"""Exit code of `glitch lint` if something was found."""
_LINES = 40
FINDINGS, ITEMS = "findings.csv", "items.jsonl"


class _KeepsAll(RunFolderStudy[R]):
    """A study whose `--json` is its whole report, which the run folder keeps too."""

    keeps_json = True

    def summary(self, report: R, folder: Path) -> Mapping[str, object]:
        return report.to_json()

    def scan_run(self, asked: Path | None) -> Path | None:
        """The scan that was named, if one was."""
        return None if asked is None else named_run(asked, SCANS, self.out)


@dataclass(frozen=True, kw_only=True)
class GlitchLint(_KeepsAll["LintReport"]):
    """Find tokens that a model stumbles over in text files.

    Prompts or data sets; with places, counts and text that is lost. Exit code: 0 if nothing was found, 1 if something
    was, 2 for wrong input.

    Example: workbench glitch lint prompts.txt --scan latest
    """

    run_name, step = "glitch-lint", "lint"

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Text files, .jsonl or .parquet files, folders or patterns."""
    model: str = "embedded"
    """Model: "embedded", a Hugging Face id, a folder or a .gguf file."""
    scan: Path | None = None
    """Run of `workbench glitch scan`: folder, name or latest; by default the model's weights are scanned now."""
    column: str = "text"
    """Name of the text in .jsonl and .parquet files."""
    kinds: tuple[str, ...] = ()
    """Any of verified borderline candidate reference no_row lost not_utf8 special fragment; by default all."""
    limit: int = 10_000
    """Places to keep; all are counted."""
    no_fail: bool = False
    """End with exit code 0 also if something was found."""

    def measure(self, begin: Begin) -> LintReport:
        from workbench.glitch.text.linter import KINDS, linter_for

        if not self.files:
            raise DegenerateInputError("glitch lint: no file was named. Give text, .jsonl or .parquet files.")
        run = begin()
        linter = linter_for(self.model, self.scan_run(self.scan), self.kinds or tuple(KINDS))
        report = linter.files(self.files, self.column, self.limit)
        report.to_csv(run.artifacts / FINDINGS)
        return report

    def details(self, report: LintReport, folder: Path) -> Iterator[str]:
        yield from (str(place) for place in report.places[:_LINES])
        if report.n_findings > _LINES:
            yield f"… {number(report.n_findings - _LINES)} more: {folder / 'artifacts' / FINDINGS}"
        for row in report.counts[:20]:
            yield f"{number(row.count):>9} x {row.kind:<10} {row.token_id:>8}  '{row.text}'"

    def following(self, report: LintReport, folder: Path) -> str:
        scan = [] if self.scan is None else ["--scan", self.scan]
        return typed("glitch", "sanitize", *self.files, *model_words(self.model), *scan)

    def exit_code(self, report: LintReport) -> int:
        return 0 if self.no_fail or not report.n_findings else FOUND


@dataclass(frozen=True, kw_only=True)
class GlitchDiff(_KeepsAll["DiffReport"]):
    """Compare two scans, models or tokenizers, token by token.

    Flags, ids, categories, verdicts, lost bytes.

    Example: workbench glitch diff embedded latest
    """

    run_name, step = "glitch-diff", "diff"

    a: tyro.conf.Positional[str]
    """Scan: run folder, name of a run, latest or glitch.json; or a model: folder, .gguf, embedded, cached hub id."""
    b: tyro.conf.Positional[str]
    """The same, to compare with."""
    tokenizer_only: bool = False
    """Compare the tokenizers of models alone; their weights are not read."""

    def measure(self, begin: Begin) -> DiffReport:
        from workbench.glitch import diff

        a, b = (str(any_run(Path(side), self.out) or side) for side in (self.a, self.b))
        run = begin()
        report = diff(a, b, tokenizer_only=self.tokenizer_only)
        report.to_csv(run.artifacts / "changes.csv")
        return report

    def details(self, report: DiffReport, folder: Path) -> Iterator[str]:
        for c in report.changes[:_LINES]:
            yield f"{c.kind:<15} {c.id_a:>8} {c.id_b:>8}  '{c.text}'  {c.before} -> {c.after}"


@dataclass(frozen=True, kw_only=True)
class GlitchExport(BaseCommand):
    """Write the flagged tokens of a scan as a ban list.

    Lists are for inference engines: transformers, vLLM, llama.cpp, and servers like OpenAI's.

    Example: workbench glitch export latest --format vllm
    """

    writes_a_file: ClassVar[bool] = True

    scan: tyro.conf.Positional[Path]
    """Run of `workbench glitch scan`: folder, name, latest, or its glitch.json."""
    format: Literal["transformers", "vllm", "openai", "llamacpp", "llamacpp-cli"] = "transformers"
    """transformers: bad_words_ids; vllm, openai: logit_bias; llamacpp: logit_bias of its server, -cli: its options."""
    grades: tuple[str, ...] = ("verified",)
    """Which flags: verified borderline candidate reference."""
    top: int | None = None
    """Only so many, those with the strongest evidence."""
    keep: tuple[int, ...] = ()
    """Ids that are not banned."""
    include_special: bool = False
    """Ban special tokens too; a model without its end tokens can't stop."""
    include_bytes: bool = False
    """Ban single bytes and incomplete characters too; some characters then can't be written."""
    out: Path | None = None
    """File to write; by default banlist-FORMAT.json in the current folder."""

    def run(self) -> None:
        """Writes the list and what is in it, and says so."""
        from workbench.glitch.scanning.saved import load_scan
        from workbench.glitch.text.banlist import FORMATS, ban_list

        bans = ban_list(
            load_scan(named_run(self.scan, SCANS)), self.grades, top=self.top, keep=self.keep,
            include_special=self.include_special, include_bytes=self.include_bytes,
        )  # fmt: skip
        ending = "txt" if self.format == "llamacpp-cli" else "json"
        file, contents = bans.save(self.out or Path(f"banlist-{self.format}.{ending}"), self.format)
        said = [f"- {line}" for line in bans.said(self.format)]
        lines = [*said, f"Use: {FORMATS[self.format].use}", f"Wrote {file}; what is in it: {contents}"]
        summary = {"file": file, "contents": contents, "ids": bans.ids, "left_out": bans.left_out}
        self.emit(
            summary, lines, typed("report", self.scan, "--open") if self.scan.suffix != ".json" else typed("runs")
        )


@dataclass(frozen=True, kw_only=True)
class GlitchSanitize(_KeepsAll["SanitizeReport"], Study["SanitizeReport"]):
    """Write text files as token ids without flagged tokens.

    The same text in other tokens, one JSON line a document.

    Example: workbench glitch sanitize corpus.jsonl --scan latest
    """

    run_name, step = "glitch-sanitize", "sanitize"

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Text files, .jsonl or .parquet files, folders or patterns."""
    scan: Path | None = None
    """Run of `workbench glitch scan`: folder, name or latest; by default the model's weights are scanned now."""
    column: str = "text"
    """Name of the text in .jsonl and .parquet files."""
    grades: tuple[str, ...] = ("verified", "borderline", "candidate")
    """Which flagged tokens to cut."""
    check: int = 0
    """Ask the model to copy so many of the tokens, before and after, and as many ordinary ones; 0 asks nothing."""

    def measure(self, begin: Begin) -> SanitizeReport:
        from workbench.glitch.text.linter import scan_for
        from workbench.glitch.text.sanitize import Sanitizer, sanitize_files

        if not self.files:
            raise DegenerateInputError("glitch sanitize: no file was named. Give text, .jsonl or .parquet files.")
        run = begin()
        scan, codec = scan_for(self.model, self.scan_run(self.scan))
        sanitizer = Sanitizer.of(codec, scan.flags(self.grades))
        report = sanitize_files(sanitizer, self.files, run.artifacts / "ids.jsonl", self.column)
        if self.check and any(cut.replaced for cut in report.cuts):
            report = self._checked(report, sanitizer)
        return report

    def details(self, report: SanitizeReport, folder: Path) -> Iterator[str]:
        for c in report.cuts[:20]:
            yield f"{number(c.replaced):>9} x {c.token_id:>8}  '{c.text}' -> {'|'.join(c.pieces) or 'IMPOSSIBLE'}"
        yield f"Ids: {report.file}"

    def _checked(self, report: SanitizeReport, sanitizer: Sanitizer) -> SanitizeReport:
        import dataclasses

        import numpy as np

        from workbench.glitch.text.sanitize import copy_check

        tokens = [cut.token_id for cut in report.cuts if cut.replaced][: self.check]
        usable = sorted({i for ids in sanitizer.pieces.values() for odd, i in ids if not odd})
        ordinary = [i for i in usable if len(sanitizer.written[i]) > 2]
        rng = np.random.default_rng(self.seed)
        controls = rng.choice(ordinary, min(len(tokens), len(ordinary)), replace=False).tolist()
        model = self.load_model()
        return dataclasses.replace(report, check=copy_check(model, sanitizer, tokens, controls))


@dataclass(frozen=True, kw_only=True)
class GlitchAdt(_KeepsAll["AdtReport"], Study["AdtReport"]):
    """Test a model on words whose border its tokenizer hides.

    The control are the same pairs of words with a separator.

    Example: workbench glitch adt embedded --items 100
    """

    run_name, step = "glitch-adt", "adt"

    model: Annotated[str, tyro.conf.Positional] = "embedded"
    """Model: "embedded", a Hugging Face id, a folder or a .gguf file."""
    items: int = 100
    """Pairs with a hidden border; as many with a respected border are made."""
    lexicon: Path | None = None
    """File of words, one a line; by default the whole words of the vocabulary."""
    make_only: bool = False
    """Make and save the items; ask no model."""
    batch_size: int = 32
    """Prompts at a time."""

    def measure(self, begin: Begin) -> AdtReport | None:
        from workbench.core.codec import codec_of
        from workbench.glitch.text.adt import AdtOptions, make_items, read_lexicon
        from workbench.glitch.text.adt_run import run_adt, save_items
        from workbench.glitch.vocabulary.tokenizer import analyse
        from workbench.models.loading import load_tokenizer

        words = () if self.lexicon is None else read_lexicon(self.lexicon)
        model = None if self.make_only else self.load_model()
        codec = codec_of(load_tokenizer(self.model) if model is None else model.tokenizer)
        run = begin(model)
        items = make_items(codec, analyse(codec), words, AdtOptions(items=self.items, seed=self.seed))
        file = save_items(run.artifacts / ITEMS, items)
        if model is None:
            run.finish("Adversarial tokenization items")
            shown = [f"{i.text}  {'|'.join(i.tokens)}  = {i.first} + {i.second}" for i in items[:20]]
            self.emit({"run": run.path, "items": file, "n": len(items)}, [*shown, f"Items: {file}"])
            return None
        return run_adt(model, items, batch_size=self.batch_size, journal=run.artifacts / "answers.jsonl")

    def details(self, report: AdtReport, folder: Path) -> Iterator[str]:
        yield f"Items: {folder / 'artifacts' / ITEMS}"
