"""Which methods a SHIFT study compares: those that are always there, the standard ones, all, or some by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from circuits.shift.deciders import Decider, OracleDecider
from circuits.shift.judgement import most_effective
from circuits.shift.judging.prepare import regime_of
from circuits.shift.methods import ORACLE_PROBE, ORIGINAL, SWAP_DIRECTION_REMOVED, Sets, WithoutWords, ablation
from circuits.shift.needs import NEEDS
from circuits.shift.options import ShiftOptions
from circuits.shift.table.base import SHIFT_METHODS
from circuits.shift.table.deletion import LEXICON
from circuits.shift.table.heads import head_methods
from circuits.shift.task import Judged, ShiftMethod, ShiftStudy, ShiftTask
from workbench.controls.methods import methods_of, possible
from workbench.core.errors import UnknownNameError, did_you_mean
from workbench.core.numbers import counted

STANDARD, EVERY = "standard", "all"
_SHIFT, _RANDOM = "SHIFT", "random features"
ALWAYS = ("original", _RANDOM, f"{_RANDOM} + retrain", _SHIFT, f"{_SHIFT} + retrain")
"""Methods without which nothing can be said of SHIFT."""


def methods_for(
    task: ShiftTask, decider: Decider, options: ShiftOptions
) -> tuple[tuple[ShiftMethod, ...], tuple[str, ...]]:
    """The methods that the options ask for and the task allows, and why each other one is left out.

    Raises:
        UnknownNameError: for a name that no method has; it lists those that exist.
        InvalidInputError: if two methods have the same name.
    """
    standard = _standard(task, decider, options)
    offered = (*standard[:-1], *_more(task), standard[-1])
    methods_of(offered)  # refuses a name that two methods have
    chosen = _chosen(options.methods, [method.name for method in standard], [method.name for method in offered])
    return possible(compared_among(method for method in offered if method.name in chosen), NEEDS, task.missing())


def _chosen(asked: str | Sequence[str], standard: Sequence[str], offered: Sequence[str]) -> set[str]:
    if asked == STANDARD:
        return set(standard)
    if asked == EVERY:
        return set(offered)
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    unknown = [name for name in names if name not in offered]
    if unknown:
        close = did_you_mean(unknown[0], (STANDARD, EVERY, *offered))
        raise UnknownNameError(
            f"shift: there is no method {unknown[0]!r}. {close if close.startswith('Did') else ''} Give "
            f'"{STANDARD}", "{EVERY}" or names of these: {", ".join(offered)}.'.replace("  ", " ")
        )
    return {*ALWAYS, *names}


def compared_among(methods: Iterable[ShiftMethod]) -> tuple[ShiftMethod, ...]:
    """The methods, none of them compared with one that is not among them, and SHIFT with every rival."""
    methods = tuple(methods)
    names = {method.name for method in methods}
    rivals = [method.name for method in methods if method.role == "rival"]
    made = []
    for method in methods:
        others = (*method.compared_with, *(rivals if method.name == ALWAYS[-1] else ()))
        made.append(replace(method, compared_with=tuple(name for name in dict.fromkeys(others) if name in names)))
    return tuple(made)


def _more(task: ShiftTask) -> tuple[ShiftMethod, ...]:
    """What the registries have, by what it may see; without the deletion of words that the task brings itself."""
    brought = any(
        isinstance(method.run, WithoutWords) and method.run.words == task.spurious_words for method in task.methods
    )
    more = [*head_methods(), *SHIFT_METHODS.values()]
    return tuple(sorted((m for m in more if not (brought and m.name == LEXICON)), key=lambda m: m.regime or ""))


def _standard(task: ShiftTask, decider: Decider, options: ShiftOptions) -> tuple[ShiftMethod, ...]:
    """The methods of SHIFT itself, its controls and bounds, and those of the task; the oracle probe is the last."""
    of_draws = f"activation frequencies and norms; mean of {counted(options.random_draws, 'draws')}"
    skyline = ablation(
        "skyline", "attribute labels of balanced training rows", _skyline, ("variant", "rival"), needs=("balanced",),
        regime="R1",
    )  # fmt: skip
    return (
        ORIGINAL,
        *ablation(_RANDOM, of_draws, lambda study: _judged(study).draws, ("control", "control"), is_random=True),
        *ablation(
            _SHIFT, decider.information, _one(lambda judged: judged.chosen), ("subject", "subject"),
            ((ALWAYS[1], ALWAYS[0]), (ALWAYS[2], ALWAYS[0])), regime=regime_of(decider),
        ),
        *ablation(
            "SHIFT, oracle judge", OracleDecider.information, _one(lambda judged: judged.oracle),
            ("variant", "variant"), needs=("balanced",), regime="R1",
        ),
        *skyline, *task.methods, SWAP_DIRECTION_REMOVED, ORACLE_PROBE,
    )  # fmt: skip


def _judged(study: ShiftStudy) -> Judged:
    assert study.judged is not None
    return study.judged


def _one(of: Callable[[Judged], Sequence]) -> Callable[[ShiftStudy], Sets]:
    return lambda study: [of(_judged(study))]


def _skyline(study: ShiftStudy) -> Sets:
    return [study.once("skyline", lambda: most_effective(study, len(_judged(study).chosen)))]
