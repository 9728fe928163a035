"""What was found by running the model, in words and tables: verification, reading and writing, symptoms."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.core.stats import Estimate
from workbench.glitch.scanning.result import ScanResult, shown
from workbench.glitch.verification.contexts import Contexts
from workbench.glitch.verification.scoring import VERIFIED
from workbench.glitch.verification.sides import BROKEN, ENOUGH_AUC, ENOUGH_CONTROLS, LEVEL, Sides
from workbench.glitch.verification.symptoms import LABELS, Symptoms
from workbench.glitch.verification.verify import RULE, VERDICTS, Tested, Verification
from workbench.glitch.vocabulary.taxonomy import KINDS
from workbench.report.base import Block, Cell, Table, Text


def say_tests(report: ScanResult) -> list[str]:
    """Sentences about everything that was run; empty for a scan of the weights alone."""
    verification = report.verification
    if verification is None:
        return []
    said = [_verified(report, verification), *_forms(verification), *_controls(verification)]
    if verification.spliced:
        bad = [t for t in verification.spliced if t.verified]
        said.append(
            f"Not in this count: of {len(verification.spliced)} suspicious tokens that no text gives, put into the "
            f"prompts by id, {len(bad)} fail as well."
        )
    said += _sides(report.sides) if report.sides else []
    said += _contexts(report, report.contexts) if report.contexts else []
    said += _symptoms(report.symptoms) if report.symptoms else []
    return [*said, *verification.notes, *report.notes]


def _verified(report: ScanResult, verification: Verification) -> str:
    tested = verification.candidates
    bad = [t for t in tested if t.verified]
    names = ", ".join(repr(report.table.token[t.token_id]) for t in bad[:8]) + (", …" if len(bad) > 8 else "")
    broken = sum(t.verdict == "not_finite" for t in tested)
    extra = f" {broken} of them give no number at all." if broken else ""
    return (
        f"Verified as under-trained (p < {VERIFIED} in every prompt and step): {len(bad)} of the {len(tested)} most "
        f"suspicious tokens{': ' + names if bad else ''}.{extra} p depends on the prompts ({verification.prompt_hash}) "
        f"and on {verification.dtype}."
    )


def _forms(verification: Verification) -> list[str]:
    if len(verification.forms) < 2:
        only = verification.forms[0] if verification.forms else "no"
        return [f"Prompts were put in {only} form only."]
    cleared = sum(t.cleared_by_chat for t in verification.candidates)
    by_form = "; ".join(f"{form} alone {rate}" for form, rate in verification.failures_by_form.items())
    rates = f" Controls that fail one form: {by_form}." if by_form else ""
    return [f"{RULE} {cleared} tokens fail every raw prompt and are cleared by the chat form.{rates}"]


def _controls(verification: Verification) -> list[str]:
    rate, false = verification.control_failures, verification.expected_false
    bare = len(verification.controls) - len(verification.counted_controls)
    left_out = f" {bare} more controls give no number and are left out." if bare else ""
    if rate is None or false is None:
        what = f"None of the {bare} controls gives a number" if bare else "No controls were run"
        return [f"{what}, so the test's own error rate is not known."]
    failed = sum(t.verified for t in verification.controls)
    said = [
        f"Controls: {failed} of {rate.n} random ordinary tokens fail the same test, a rate of {rate}. Expected false "
        f"among the {len(verification.candidates)} tested: {false.value:.1f}, at most {false.high:.1f}."
        f"{left_out}"
    ]
    if verification.control_quantiles:
        listed = ", ".join(f"{name} {p:.3g}" for name, p in verification.control_quantiles.items())
        below = sum(t.p_value is not None and t.p_value <= 1 / (rate.n + 1) for t in verification.candidates)
        said.append(
            f"Highest p of the controls, quantiles: {listed}. {below} of the {len(verification.candidates)} candidates "
            "lie below every control."
        )
    if verification.options.stop_at is not None:
        said.append("Testing stopped at the first success, so p of the others is a lower bound without quantiles.")
    return said


def _sides(sides: Sides) -> list[str]:
    n_spelled = sum(bool(side.pieces) for side in sides.candidates)
    power = (
        f"On {sides.n_controls} controls, reading tells a token from another one with AUC {sides.read_auc:.3f}, "
        f"writing with {sides.write_auc:.3f}."
    )
    if sides.read_limit != sides.read_limit or sides.write_limit != sides.write_limit:
        return [
            f"Reading and writing: NO VERDICT. {power} Both need an AUC of {ENOUGH_AUC} and {ENOUGH_CONTROLS} controls "
            "that other tokens spell."
        ]
    counts = ", ".join(f"{sides.count(name)} {name}" for name in ("both", "input", "output", "neither"))
    rates = "; ".join(f"{name} {rate}" for name, rate in sides.failing.items())
    return [
        f"Broken side of {n_spelled} of {len(sides.candidates)} tokens that other tokens spell: {counts}. {power} "
        f"Limits: divergence {sides.read_limit:.2f} nats (the {1 - LEVEL:.0%} quantile of the controls), "
        f"log-probability {sides.write_limit:.1f} nats ({LEVEL:.0%}). Controls beyond them: {rates}."
    ]


def _contexts(report: ScanResult, found: Contexts) -> list[str]:
    rate = found.control_failures
    beside = f"Of the controls fail {rate}" if rate else "No control gives a number"
    failing = [c for c in found.candidates if c.failed]
    said = [
        f"Among other tokens ({len(found.lines)} lines to copy): median p below {VERIFIED} for {len(failing)} of the "
        f"{len(found.candidates)} tokens. {beside}."
    ]
    both = [(c, tested) for c in found.candidates if (tested := report.tested(c.token_id)) and c.median == c.median]
    for failed, what in ((True, "Said alone, not among other tokens"), (False, "Said among other tokens, not alone")):
        names = [c.token_id for c, tested in both if c.failed == failed and tested.verified != failed]
        if names:
            listed = ", ".join(repr(report.table.token[i]) for i in names[:8]) + (", …" if len(names) > 8 else "")
            said.append(f"{what}: {len(names)} tokens: {listed}.")
    return said


def _symptoms(said: Symptoms) -> list[str]:
    lines = []
    for task, rate in said.candidate_failures.items():
        control = said.failures.get(task)
        beside = f"; of ordinary tokens {control}" if control else "; no controls"
        lines.append(f"{task}: {rate} of the candidates fail{beside}{_meaning(rate, control)}")
    return [f"Symptoms ({said.form} form, greedy). " + ". ".join(lines) + "."]


def _meaning(rate: Estimate, control: Estimate | None) -> str:
    if control is None or rate.low > control.high:
        return ""
    return " (the intervals overlap: this task does not tell them apart)"


def test_blocks(report: ScanResult) -> list[Block]:
    """Tables about everything that was run apart from the candidates themselves."""
    verification = report.verification
    if verification is None:
        return []
    made: list[Block] = []
    if verification.controls:
        made.append(tests_table(report, verification.controls, "Controls: random ordinary tokens, tested alike"))
    if verification.spliced:
        made.append(tests_table(report, verification.spliced, "Tokens that no text gives, tested by id; in no count"))
    if report.sides is not None:
        made.append(_sides_table(report, report.sides))
    if report.contexts is not None:
        made.append(_contexts_table(report, report.contexts))
    if report.symptoms is not None:
        made += [_labels_table(report.symptoms), _replies_table(report, report.symptoms)]
    made.append(Text("Verdicts: " + "; ".join(f"{name}: {means}" for name, means in VERDICTS.items()) + "."))
    return made


def tests_table(report: ScanResult, tested: Sequence[Tested], caption: str) -> Table:
    """One line per tested token, with what each prompt gave."""
    table = report.table
    prompts = tuple(dict.fromkeys(f"{s.form}:{s.probe}" for t in tested for s in t.scores))
    rows = []
    for t in tested:
        by_prompt = {f"{s.form}:{s.probe}": s.p for s in t.scores}
        head: tuple[Cell, ...] = (
            t.token_id, shown(table.token[t.token_id]), float(table.indicator[t.token_id]), _finite(t.max_prob),
            t.verdict, t.form, t.p_value, report.p_bound(t.token_id), t.passes,
        )  # fmt: skip
        rows.append(head + tuple(by_prompt.get(name) for name in prompts))
    columns = ("id", "token", report.indicator or "", "max p", "verdict", "by form", "p value", "p bound", "passes")
    return Table((*columns, *prompts), tuple(rows), caption=f"{caption} (n = {len(rows)})")


def kinds_table(report: ScanResult, limit: int) -> Table:
    """What the first candidates are, as text."""
    rows: list[tuple[Cell, ...]] = []
    for i in report.candidates()[:limit]:
        nature = report.natures.get(i)
        if nature is not None:
            holders = ", ".join(f"{k} {shown(report.table.token[k])!r}" for k in nature.part_of)
            row = (i, shown(report.table.token[i]), nature.kind, nature.script, " + ".join(nature.words), holders)
            rows.append(row)
    counts: dict[str, int] = {}
    for i in report.candidates():
        if i in report.natures:
            counts[report.natures[i].kind] = counts.get(report.natures[i].kind, 0) + 1
    listed = ", ".join(f"{counts[kind]:,} {kind.replace('_', '-')}" for kind in KINDS if kind in counts)
    columns = ("id", "token", "kind", "script", "words", "part of the tokens")
    return Table(columns, tuple(rows), caption=f"Kinds of all candidates: {listed}; the first {len(rows)}")


def _sides_table(report: ScanResult, sides: Sides) -> Table:
    rows = tuple(
        (s.token_id, shown(report.table.token[s.token_id]), "control" if s.control else "candidate",
         " | ".join(shown(report.table.token[p]) for p in s.pieces), _finite(s.read_kl), _finite(s.read_agreement),
         _finite(s.write_logp), s.broken)
        for s in sides.tested
    )  # fmt: skip
    means = "; ".join(f"{name}: {text}" for name, text in BROKEN.items())
    columns = ("id", "token", "role", "spelled", "reading: KL (nats)", "same next token", "writing: log p", "broken")
    return Table(columns, rows, caption=f"Reading and writing, compared with the same text in other tokens. {means}")


def _contexts_table(report: ScanResult, found: Contexts) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for c in found.tested:
        below, tested = sum(p < VERIFIED for p in c.p), report.tested(c.token_id)
        role, alone = "control" if c.control else "candidate", tested.verdict if tested else "untested"
        name = shown(report.table.token[c.token_id])
        rows.append((c.token_id, name, role, _finite(c.median), below, *c.span, alone))
    columns = ("id", "token", "role", "median p", f"below {VERIFIED}", "lowest", "highest", "verdict alone")
    words = [[shown(report.table.token[i]).strip() for i in line] for line in found.lines]
    lines = "; ".join(" ".join((a, b, "…", c, d)) for a, b, c, d in words)
    return Table(columns, tuple(rows), caption=f"Copied among other tokens, {len(words)} lines: {lines}")


def _labels_table(said: Symptoms) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for task in dict.fromkeys(s.task for s in said.replies):
        for control in (False, True):
            counts = said.counts(task, control)
            role = "controls" if control else "candidates"
            if counts:
                rows.append((task, role, counts.total(), *(counts[label] for label in LABELS)))
    means = "; ".join(f"{name}: {text}" for name, text in LABELS.items())
    return Table(("task", "tokens", "n", *LABELS), tuple(rows), caption=f"Symptoms by label. {means}")


def _replies_table(report: ScanResult, said: Symptoms) -> Table:
    rows = tuple(
        (s.token_id, shown(report.table.token[s.token_id]), s.task, s.label, shown(s.reply))
        for s in said.replies
        if not s.control
    )
    return Table(("id", "token", "task", "label", "reply"), rows, caption=f"Replies about candidates (n = {len(rows)})")


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
