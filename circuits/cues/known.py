"""A task of several cues as somebody has it who knows only one of them."""

from __future__ import annotations

from dataclasses import replace

from circuits.cues.kinds import Cue
from circuits.shift.task import ShiftTask
from circuits.shift.texts import LabelledTexts
from workbench.core.arguments import checked
from workbench.core.errors import MismatchError, require_known
from workbench.core.numbers import counted


@checked
def known_cue(task: ShiftTask, cue: Cue) -> ShiftTask:
    """The task with this cue as its attribute; the report still measures reliance on every cue.

    Twins differ by this cue alone, if it can be put into texts. Whether a method that removes the known cue turns to
    the others is what the Whac-A-Mole panel of the report shows.

    Args:
        task: as `with_cues` makes it, of two cues or more.
        cue: one of them, as it was given to `with_cues`.

    Raises:
        UnknownNameError: if the task does not have the cue.
        MismatchError: if it has no other, or another cue was put behind it, so that it can't be stripped.
    """
    names = [name for name, _ in task.train.cues]
    require_known("cue of the task", cue.name, names)
    if len(names) < 2:
        raise MismatchError(f"known_cue: the task has {counted(len(names), 'cues')}, so {cue.name} is its attribute.")
    train = _of_cue(task.train, cue)
    return replace(
        task, name=f"{task.name}, {cue.name} known", spurious_names=cue.values, train=train,
        balanced=None if task.balanced is None else _of_cue(task.balanced, cue), test=_of_cue(task.test, cue),
        swapped=_twins(train, cue) if cue.can_inject else None,
    )  # fmt: skip


def _of_cue(rows: LabelledTexts, cue: Cue) -> LabelledTexts:
    return replace(rows, spurious=dict(rows.cues)[cue.name])


def _twins(rows: LabelledTexts, cue: Cue) -> tuple[str, ...]:
    values = dict(rows.cues)[cue.name]
    twins = [cue.strip(text) if value else cue.put(text) for text, value in zip(rows.texts, values, strict=True)]
    if cue.of(twins) != tuple(1 - value for value in values):
        raise MismatchError(
            f"known_cue: {cue.name} can't be taken out of every text that has it, since another cue was put behind it. "
            "Name it last in with_cues, or put it elsewhere."
        )
    return tuple(twins)
