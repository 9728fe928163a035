"""What was found by running the model, in words and tables: verification, reading and writing, symptoms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from workbench.core.display import first_few
from workbench.core.numbers import counted, number, setting
from workbench.glitch.reporting import finite, meanings, shown
from workbench.glitch.scanning.result import ScanResult
from workbench.glitch.verification.contexts import Contexts
from workbench.glitch.verification.scoring import VERIFIED
from workbench.glitch.verification.sides import BROKEN, LEVEL, MIN_AUC, MIN_CONTROLS, Sides
from workbench.glitch.verification.symptoms import LABELS, Symptoms
from workbench.glitch.verification.verify import RULE, VERDICTS, Tested, Verification
from workbench.glitch.vocabulary.taxonomy import KINDS
from workbench.report.base import Block, Cell, Table, Text


def say_tests(report: ScanResult) -> Iterator[str]:
    """Sentences about everything that was run; none for a scan of the weights alone."""
    done = report.verification
    if done is None:
        return
    yield _verified(report, done)
    yield _forms(done)
    yield from _controls(done)
    if done.spliced:
        yield (
            f"Not in this count: of {len(done.spliced)} suspicious tokens that no text gives, put into the prompts by "
            f"id, {sum(t.verified for t in done.spliced)} fail as well."
        )
    if report.sides:
        yield _sides(report.sides)
    if report.contexts:
        yield from _contexts(report, report.contexts)
    if report.symptoms:
        yield _symptoms(report.symptoms)
    yield from (*done.notes, *report.notes)


def _names(report: ScanResult, ids: Sequence[int]) -> str:
    return first_few(repr(report.table.token[i]) for i in ids)


def _verified(report: ScanResult, done: Verification) -> str:
    bad = [t.token_id for t in done.candidates if t.verified]
    broken = sum(t.verdict == "not_finite" for t in done.candidates)
    return (
        f"Verified as under-trained (p < {VERIFIED} in every prompt and step): {len(bad)} of the "
        f"{len(done.candidates)} most suspicious tokens{': ' if bad else ''}{_names(report, bad)}."
        f"{f' {broken} of them give no number at all.' if broken else ''} p depends on the prompts "
        f"({done.prompt_hash}) and on {done.dtype}."
    )


def _forms(done: Verification) -> str:
    if len(done.forms) < 2:
        return f"Prompts were put in {done.forms[0] if done.forms else 'no'} form only."
    cleared = sum(t.cleared_by_chat for t in done.candidates)
    by_form = "; ".join(f"{form} alone {share}" for form, share in done.failures_by_form.items())
    rates = f" Controls that fail one form: {by_form}." if by_form else ""
    return f"{RULE} {cleared} tokens fail every raw prompt and are cleared by the chat form.{rates}"


def _controls(done: Verification) -> Iterator[str]:
    share, false = done.control_failures, done.expected_false
    bare = len(done.controls) - len(done.counted_controls)
    if share is None or false is None:
        what = f"None of the {bare} controls gives a number" if bare else "No controls were run"
        yield f"{what}, so the test's own error rate is not known."
        return
    yield (
        f"Controls: {sum(t.verified for t in done.controls)} of {share.n} random ordinary tokens fail the same test, a "
        f"rate of {share}. Expected false among the {len(done.candidates)} tested: {number(false.value)}, at most "
        f"{number(false.high)}.{f' {bare} more controls give no number and are left out.' if bare else ''}"
    )
    if done.control_quantiles:
        listed = ", ".join(f"{name} {number(p)}" for name, p in done.control_quantiles.items())
        below = sum(t.p_value is not None and t.p_value <= 1 / (share.n + 1) for t in done.candidates)
        yield (
            f"Highest p of the controls, quantiles: {listed}. {below} of the {len(done.candidates)} candidates lie "
            "below every control."
        )
    if done.options.stop_at is not None:
        yield "Testing stopped at the first success, so p of the others is a lower bound without quantiles."


def _sides(sides: Sides) -> str:
    n_spelled = sum(bool(side.pieces) for side in sides.candidates)
    power = (
        f"On {sides.n_controls} controls, reading tells a token from another one with AUC {number(sides.read_auc)}, "
        f"writing with {number(sides.write_auc)}."
    )
    if finite(sides.read_limit) is None or finite(sides.write_limit) is None:
        return (
            f"Reading and writing: NO VERDICT. {power} Both need an AUC of {MIN_AUC} and {MIN_CONTROLS} controls that "
            "other tokens spell."
        )
    counts = ", ".join(f"{sides.count(name)} {name}" for name in ("both", "input", "output", "neither"))
    rates = "; ".join(f"{name} {share}" for name, share in sides.failing.items())
    return (
        f"Broken side of {n_spelled} of {len(sides.candidates)} tokens that other tokens spell: {counts}. {power} "
        f"Limits: divergence {number(sides.read_limit)} nats (the {setting(1 - LEVEL)} quantile of the controls), "
        f"log-probability {number(sides.write_limit)} nats ({setting(LEVEL)}). Controls beyond them: {rates}."
    )


def _contexts(report: ScanResult, contexts: Contexts) -> Iterator[str]:
    share = contexts.control_failures
    yield (
        f"Among other tokens ({len(contexts.lines)} lines to copy): median p below {VERIFIED} for "
        f"{sum(c.failed for c in contexts.candidates)} of the {len(contexts.candidates)} tokens. "
        f"{f'Of the controls fail {share}' if share else 'No control gives a number'}."
    )
    both = [(c, alone) for c in contexts.candidates if (alone := report.tested(c.token_id)) and c.median == c.median]
    for failed, what in ((True, "Said alone, not among other tokens"), (False, "Said among other tokens, not alone")):
        ids = [c.token_id for c, alone in both if c.failed == failed and alone.verified != failed]
        if ids:
            yield f"{what}: {counted(len(ids), 'tokens')}: {_names(report, ids)}."


def _symptoms(symptoms: Symptoms) -> str:
    lines = []
    for task, share in symptoms.candidate_failures.items():
        control = symptoms.failures.get(task)
        overlaps = control is not None and share.low <= control.high
        lines.append(
            f"{task}: {share} of the candidates fail; {f'of ordinary tokens {control}' if control else 'no controls'}"
            + (" (the intervals overlap: this task does not tell them apart)" if overlaps else "")
        )
    return f"Symptoms ({symptoms.form} form, greedy). {'. '.join(lines)}."


def test_blocks(report: ScanResult) -> Iterator[Block]:
    """Tables about everything that was run apart from the candidates themselves."""
    done = report.verification
    if done is None:
        return
    if done.controls:
        yield tests_table(report, done.controls, "Controls: random ordinary tokens, tested alike")
    if done.spliced:
        yield tests_table(report, done.spliced, "Tokens that no text gives, tested by id; in no count")
    if report.sides is not None:
        yield _sides_table(report, report.sides)
    if report.contexts is not None:
        yield _contexts_table(report, report.contexts)
    if report.symptoms is not None:
        yield _labels_table(report.symptoms)
        yield _replies_table(report, report.symptoms)
    yield Text(f"Verdicts: {meanings(VERDICTS)}.")


def tests_table(report: ScanResult, tested: Sequence[Tested], caption: str) -> Table:
    """One line per tested token, with what each prompt gave."""
    table = report.table
    prompts = tuple(dict.fromkeys(f"{s.form}:{s.prompt}" for t in tested for s in t.scores))
    rows = []
    for t in tested:
        by_prompt = {f"{s.form}:{s.prompt}": s.p for s in t.scores}
        rows.append((
            t.token_id, shown(table.token[t.token_id]), float(table.indicator[t.token_id]), finite(t.max_prob),
            t.verdict, t.form, t.p_value, report.p_bound(t.token_id), t.passes, *map(by_prompt.get, prompts),
        ))  # fmt: skip
    columns = ("id", "token", report.indicator or "", "max p", "verdict", "by form", "p value", "p bound", "passes")
    return Table((*columns, *prompts), tuple(rows), caption=f"{caption} (n = {len(rows)})")


def kinds_table(report: ScanResult, limit: int) -> Table:
    """What the first candidates are, as text."""
    rows: list[tuple[Cell, ...]] = []
    known = [(i, report.natures[i]) for i in report.candidates() if i in report.natures]
    for i, nature in known[:limit]:
        holders = ", ".join(f"{k} {shown(report.table.token[k])!r}" for k in nature.part_of)
        token = shown(report.table.token[i])
        rows.append((i, token, nature.kind, nature.script, " + ".join(nature.words), holders))
    counts = Counter(nature.kind for _, nature in known)
    listed = ", ".join(f"{number(counts[kind])} {kind.replace('_', '-')}" for kind in KINDS if kind in counts)
    columns = ("id", "token", "kind", "script", "words", "part of the tokens")
    return Table(columns, tuple(rows), caption=f"Kinds of all candidates: {listed}; the first {len(rows)}")


def _sides_table(report: ScanResult, sides: Sides) -> Table:
    token = report.table.token
    rows = tuple(
        (s.token_id, shown(token[s.token_id]), s.role, " | ".join(shown(token[p]) for p in s.pieces),
         finite(s.read_kl), finite(s.read_agreement), finite(s.write_logp), s.broken)
        for s in sides.tested
    )  # fmt: skip
    columns = ("id", "token", "role", "spelled", "reading: KL (nats)", "same next token", "writing: log p", "broken")
    caption = f"Reading and writing, compared with the same text in other tokens. {meanings(BROKEN)}"
    return Table(columns, rows, caption=caption)


def _contexts_table(report: ScanResult, contexts: Contexts) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for c in contexts.tested:
        below, alone, name = sum(p < VERIFIED for p in c.p), report.tested(c.token_id), report.table.token[c.token_id]
        verdict = alone.verdict if alone else "untested"
        rows.append((c.token_id, shown(name), c.role, finite(c.median), below, *c.span, verdict))
    columns = ("id", "token", "role", "median p", f"below {VERIFIED}", "lowest", "highest", "verdict alone")
    words = [[shown(report.table.token[i]).strip() for i in line] for line in contexts.lines]
    lines = "; ".join(" ".join((a, b, "…", c, d)) for a, b, c, d in words)
    return Table(columns, tuple(rows), caption=f"Copied among other tokens, {len(words)} lines: {lines}")


def _labels_table(symptoms: Symptoms) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for task in dict.fromkeys(s.task for s in symptoms.replies):
        for control, role in ((False, "candidates"), (True, "controls")):
            if counts := symptoms.counts(task, control):
                rows.append((task, role, counts.total(), *(counts[label] for label in LABELS)))
    columns = ("task", "tokens", "n", *LABELS)
    return Table(columns, tuple(rows), caption=f"Symptoms by label. {meanings(LABELS)}")


def _replies_table(report: ScanResult, symptoms: Symptoms) -> Table:
    rows = tuple(
        (s.token_id, shown(report.table.token[s.token_id]), s.task, s.label, shown(s.reply))
        for s in symptoms.replies
        if not s.control
    )
    return Table(("id", "token", "task", "label", "reply"), rows, caption=f"Replies about candidates (n = {len(rows)})")
