"""A glitch report in words, tables and plots."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from workbench.core.display import first_few
from workbench.core.jsontext import Json
from workbench.core.numbers import counted, number, sample_size
from workbench.core.records import to_jsonable
from workbench.core.stats import Estimate
from workbench.glitch.reporting import TokenReport, finite, measured, rate, sentences, shown
from workbench.glitch.scanning.narrate_tests import kinds_table, say_tests, test_blocks, tests_table
from workbench.glitch.scanning.result import ScanResult
from workbench.glitch.vocabulary.tokenizer import CATEGORIES, IMPOSSIBLE_BYTES
from workbench.report.base import Bars, Block, Headline, Histogram, Metric, Says, Table, beside

TOP_ROWS = 40


@dataclass(frozen=True, eq=False)
class GlitchReport(ScanResult, TokenReport):
    """Result of `scan`. `df` has every token; `to_json` the facts, the suspicious tokens and everything tested."""

    _title = "Glitch tokens of {self.model}"

    def to_json(self) -> dict[str, Json]:
        """Everything except the table of all tokens, which `to_csv` writes: its suspicious and tested rows are here."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("table", "natures")]
        return to_jsonable({name: getattr(self, name) for name in names} | {
            "candidates": [self.row(i) for i in self.candidates()],
            "unwritable": [self.row(i) for i in self.unwritable()],
            "spare": self.spare(),
            "controls": [self.row(t.token_id) for t in (self.verification.controls if self.verification else ())],
            "findings": list(self.findings()),
        })  # fmt: skip

    def findings(self) -> tuple[str, ...]:
        """What was found, in sentences, with what is not known."""
        known, why = self.reference.members, self.reference.why
        reference = f"No reference: {why}." if self.reference.name is None else f"Reference: {len(known)} ids, {why}."
        said = (_tokenizer(self), _lossy(self), reference, _ranking(self), *_oddities(self))
        return sentences(*said, *say_tests(self), _recall(self))

    def metrics(self) -> dict[str, Metric]:
        """Flat numbers; those of verification only if it ran."""
        metrics: dict[str, Metric | None] = {
            "n_tokens": self.tokenizer.n_tokens, "n_candidates": len(self.candidates()),
            "n_reference": len(self.reference.members), "n_lossy_bytes": len(self.tokenizer.lossy),
            "n_identical_rows": sum(map(len, self.identical)), "indicator": self.indicator or "none",
            **{f"tokens.{name}": count for name, count in self.tokenizer.counts.items()},
            **{f"auc.{s.indicator}": s.auc for s in self.separations},
            "threshold": None if self.indicator is None else self.threshold,
        }  # fmt: skip
        if (done := self.verification) is not None:
            metrics |= {
                "n_tested": len(done.candidates), "n_verified": sum(t.verified for t in done.candidates),
                "control_failure_rate": done.control_failures, "expected_false": done.expected_false,
                **{f"control_failure_rate.{form}": share for form, share in done.failures_by_form.items()},
                **{f"control_p.{name}": p for name, p in done.control_quantiles.items()},
                "n_cleared_by_chat": sum(t.cleared_by_chat for t in done.candidates),
                "n_spliced_verified": sum(t.verified for t in done.spliced),
            }  # fmt: skip
        if (sides := self.sides) is not None:
            metrics |= {f"n_broken.{name}": sides.count(name) for name in ("both", "input", "output", "neither")}
            metrics |= {"auc.read": sides.read_auc, "auc.write": sides.write_auc}
        if (contexts := self.contexts) is not None:
            metrics["n_fail_in_context"] = sum(c.failed for c in contexts.candidates)
            metrics["context_control_failure_rate"] = contexts.control_failures
        if self.symptoms is not None:
            metrics |= {f"symptom.{task}": share for task, share in self.symptoms.candidate_failures.items()}
            metrics |= {f"symptom_control.{task}": share for task, share in self.symptoms.failures.items()}
        return measured(metrics)

    def headline(self) -> Headline:
        """Share of the most suspicious tokens that the model can't say, beside random ordinary tokens."""
        table = _beside_controls(self)
        if table is None:
            return Headline(sentence=(
                "Tokens were ranked from the weights alone; the model was not asked to say any."
                if self.indicator is not None else "There is no ranking: no tokens are known to be unused."
            ))  # fmt: skip
        return Headline.of(
            Says(
                "The model can't say many of the tokens that its weights make suspicious.",
                "The model says the suspicious tokens as well as random ordinary ones.",
                "The model says the suspicious tokens better than random ordinary ones.",
                "The test's own error rate is not known, because no control gave a number.",
            ),
            table,
        )  # fmt: skip

    def _blocks(self) -> tuple[Block, ...]:
        made: list[Block] = [*_picture(self), _categories(self), _groups(self)]
        if self.same_text:
            made.append(_same_text(self))
        if self.separations:
            made.append(_separations(self))
        if self.indicator is not None:
            made += [_top(self), kinds_table(self, TOP_ROWS), _histogram(self)]
        return (*made, *test_blocks(self))


def _beside_controls(report: ScanResult) -> Table | None:
    if (done := report.verification) is None:
        return None
    control = None if done.control_failures is None else ("random ordinary tokens", done.control_failures)
    tested = rate((t.verified for t in done.candidates), "tokens")
    return beside("share that fails every prompt", ("most suspicious tokens", tested), control)


def _picture(report: ScanResult) -> list[Block]:
    table = _beside_controls(report)
    if table is None:
        return []
    shares = {str(name): share for name, share in table.rows if isinstance(share, Estimate)}
    bars = Bars("Tokens that the model can't say", tuple(shares), tuple(shares.values()), table.columns[1])
    return [bars, table]


def _tokenizer(report: ScanResult) -> str:
    counts = report.tokenizer.counts
    kinds = [name for name in CATEGORIES if counts.get(name) and name != "no_token"]
    parts = ", ".join(f"{number(counts[name])} {name.replace('_', ' ')}" for name in kinds)
    bare = f"; {counted(counts['no_token'], 'ids')} without a token" if counts.get("no_token") else ""
    shape = f"{number(report.n_rows)} rows x {report.d_model} ({report.stored})"
    tied = f"{'tied' if report.tied else 'untied'} ({report.tied_why})"
    return f"{counted(report.tokenizer.n_tokens, 'tokens')}: {parts}{bare}. Output matrix: {shape}, {tied}."


def _lossy(report: ScanResult) -> str:
    lossy = report.tokenizer.lossy
    if not lossy:
        return "Every byte of valid UTF-8 survives encode and decode (checked on example characters of each byte)."
    names = " ".join(f"{item.byte:02X}" for item in lossy)
    return (
        f"NON-ENCODABLE BYTES: {len(lossy)} bytes of valid text are lost by this tokenizer ({names}); "
        f"{lossy[0].text!r} comes back as {lossy[0].back!r}."
    )


def _ranking(report: ScanResult) -> str:
    if report.indicator is None:
        return (
            f"NO RANKING: {report.indicator_why}. A ranking against a guessed reference is wrong without looking "
            "wrong; name ids that are known to be unused."
        )
    n, plain = len(report.candidates()), int(report.table.ordinary.sum())
    return (
        f"Ranked by {report.indicator_why}. Candidates: {number(n)} of {number(plain)} ordinary tokens lie at or below "
        f"{number(report.threshold)} ({report.threshold_why}). That is a list to test, not a count of glitch tokens."
    )


def _oddities(report: ScanResult) -> list[str]:
    said = []
    if report.identical:
        sizes = sorted((len(ids) for ids in report.identical), reverse=True)
        said.append(
            f"{sum(sizes)} rows are bit-identical copies, in {len(sizes)} sets of {first_few(sizes)}. Certificate "
            "without a forward pass: no prompt can give a token of a set of k more than 1/k (at most "
            f"{number(1 / sizes[0])} in the largest)."
        )
    ordinary = [i for i in report.zero_rows if report.table.ordinary[i]]
    others = [i for i in report.zero_rows if not report.table.ordinary[i]]
    if ordinary:
        place = "they head the candidates" if report.indicator is not None else "they were never trained"
        said.append(f"{len(ordinary)} rows of ordinary tokens are zero (ids {first_few(ordinary)}); {place}.")
    if others:
        kinds = "padding, reserved or special"
        said.append(f"{len(others)} rows without an ordinary token are zero (ids {first_few(others)}): {kinds}.")
    if report.same_text:
        n = sum(map(len, report.same_text))
        said.append(
            f"{n} tokens share their text with another one, in {len(report.same_text)} sets; text gives one of each "
            "set at most."
        )
    if report.bad_rows:
        said.append(f"{len(report.bad_rows)} rows hold NaN or infinity (ids {first_few(report.bad_rows)}); left out.")
    if spare := report.spare():
        said.append(f"{len(spare)} reserved ids are unused, free for tokens of your own (ids {first_few(spare)}).")
    if report.has_bias:
        said.append("The output layer has a bias; the indicators do not use it.")
    if beyond := report.tokenizer.counts.get("no_row", 0):
        said.append(
            f"{beyond} token ids lie beyond the matrix's {number(report.n_rows)} rows: the model cannot take them."
        )
    return said


def _recall(report: ScanResult) -> str:
    done = report.verification
    untested = int(report.table.ordinary.sum()) - (len(done.candidates) + len(done.controls) if done else 0)
    return (
        f"Recall is not known: {number(untested)} ordinary tokens were not run; under-trained tokens among them are "
        "missed. Only a census that tests every token would measure it."
    )


def _categories(report: ScanResult) -> Table:
    facts = report.tokenizer
    harmless = sum(b in IMPOSSIBLE_BYTES for b in facts.missing_bytes)
    rows = [(name, facts.counts[name], means) for name, means in CATEGORIES.items() if facts.counts.get(name)]
    rows.append(("byte tokens", facts.n_byte_tokens, f"single-byte tokens ({facts.style})"))
    if facts.style != "none":
        rows.append(("missing bytes", len(facts.missing_bytes), f"{harmless} of them never occur in valid UTF-8"))
    rows.append(("lossy bytes", len(facts.lossy), " ".join(f"{item.byte:02X}" for item in facts.lossy) or "none"))
    return Table(("category", "tokens", "meaning"), tuple(rows), caption="The tokenizer's side")


def _groups(report: ScanResult) -> Table:
    chosen = report.reference.name
    rows = tuple(
        (("* " if g.name == chosen else "") + g.name, g.found, len(g.members), finite(g.cosine), g.verdict, g.why)
        for g in report.reference.groups
    )
    pairs = "; ".join(f"{a} and {b}: cosine {number(c)}, {n} ids in both" for a, b, c, n in report.reference.agreement)
    caption = "Ids that training cannot have used, and whether their rows bear it out (* = reference). Agreement: "
    columns = ("group", "found", "kept", "median cosine", "verdict", "how found")
    return Table(columns, rows, caption=caption + (pairs or "fewer than two trusted groups"))


def _same_text(report: ScanResult) -> Table:
    table, first = report.table, report.same_text[:TOP_ROWS]
    rows = tuple(
        (shown(table.token[ids[0]]), ", ".join(map(str, ids)), ", ".join(table.category[i] for i in ids))
        for ids in first
    )
    caption = f"Tokens with the same text: the first {len(first)} of {number(len(report.same_text))} sets"
    return Table(("text", "ids", "categories"), rows, caption=caption)


def _separations(report: ScanResult) -> Table:
    rows = tuple((s.indicator, s.auc, s.missed, s.n_reference, s.n_ordinary) for s in report.separations)
    return Table(
        ("indicator", "held-out AUC", "ordinary below a reference row", "reference rows", "ordinary tokens"), rows,
        caption="How well each indicator tells held-out reference rows from ordinary tokens (AUC 0.5 is chance). The "
        "reference was trimmed to output rows that lie together; that favours the output-side indicators, not I_in",
    )  # fmt: skip


def _top(report: ScanResult) -> Table:
    if report.verification is not None:
        return tests_table(report, report.verification.candidates, "The most suspicious tokens, tested")
    rows = [report.row(i) for i in report.candidates()[:TOP_ROWS]]
    listed = tuple((r["token_id"], shown(r["token"]), r["indicator"], r["copies"], r["group"]) for r in rows)
    caption = f"The {len(rows)} most suspicious of {number(len(report.candidates()))} candidates; none was run"
    return Table(("id", "token", report.indicator or "", "identical rows", "group"), listed, caption=caption)


def _histogram(report: ScanResult) -> Histogram:
    values = report.table.indicator[report.table.ordinary]
    values = values[np.isfinite(values)]
    below = int((values <= report.threshold).sum())
    return Histogram(
        f"{report.indicator} of ordinary tokens", tuple(values.tolist()), x_label=str(report.indicator), bins=60,
        caption=f"{sample_size(len(values), 'tokens')}; threshold {number(report.threshold)}, {number(below)} below",
    )  # fmt: skip
