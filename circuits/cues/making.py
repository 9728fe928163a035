"""Tasks with cues built in: at the strength that is asked for, with exact counts, and a balanced test set.

Source: Ludan et al. 2023 (explanation-based finetuning), whose cues f and strengths s these are: of N training texts
N s / 2 have f = y = 1, as many f = y = 0, and N (1 - s) / 2 each f = 1, y = 0 and f = 0, y = 1. Departures: several
cues at once; the test set is balanced over all groups instead of as the texts are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np

from circuits.cues.erasing import cues_erased
from circuits.cues.kinds import Cue
from circuits.cues.stripping import cues_stripped
from circuits.shift.columns import TextTable, Values
from circuits.shift.splits import split_rows
from circuits.shift.strength import SplitOptions, as_fraction
from circuits.shift.task import ShiftTask
from circuits.shift.texts import LabelledTexts
from workbench.core.arguments import checked
from workbench.core.display import first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted, number, setting

Cell = tuple[int, tuple[int, ...]]
"""A label, and the value of each cue."""


@dataclass(frozen=True)
class _Pool:
    """Texts to choose from.

    Attributes:
        name: "training" or "test".
        label_names: names of the two labels.
        cues: the cues.
        texts: for each combination of the injected cues' values all texts with these.
        natural: value of each cue in each text as it is.
        rows: the usable rows of each label and value of the cues that can't be injected.
    """

    name: str
    label_names: tuple[str, ...]
    cues: tuple[Cue, ...]
    texts: Mapping[tuple[int, ...], list[str]]
    natural: np.ndarray
    rows: Mapping[Cell, list[int]]


@checked
def with_cues(
    labelled: LabelledTexts | ShiftTask,
    cues: Sequence[Cue],
    rho: float = 0.95,
    seed: int = 0,
    *,
    n_train: int | None = None,
    n_test: int | None = None,
    label_names: tuple[str, str] = ("0", "1"),
) -> ShiftTask:
    """A task of two labels in which each cue agrees with the label in a share `rho` of the training texts.

    Counts are exact: of each label, `rho` have the cue's value of the same number. Several cues are as independent
    given the label as whole numbers allow. Balanced rows and test texts have all groups equally often. Cues that can be
    injected are put into texts or stripped from them; the others choose among texts, and none is used twice in a set.
    Thresholds are those of the training texts.

    Args:
        labelled: texts of two labels, of which three tenths are held out here; or a task, whose splits are kept.
        cues: the cues; the attribute of the task is their combination.
        rho: the share, from 0.5 (no correlation) to 1.
        seed: decides which texts.
        n_train: training texts; by default as many as possible.
        n_test: test texts; by default as many as possible.
        label_names: names of label 0 and 1; those of the task, if it is one.

    Raises:
        InvalidInputError: if there are not two labels, no cue or one twice, or a number can't be divided exactly.
        DegenerateInputError: naming the group that has too few texts.
    """
    cues, share = tuple(cues), as_fraction(rho)
    names = label_names if isinstance(labelled, LabelledTexts) else labelled.label_names
    if len(names) != 2 or len({cue.name for cue in cues}) != max(len(cues), 1):
        raise InvalidInputError(
            f"with_cues: {counted(len(names), 'labels')} and the cues {first_few(cue.name for cue in cues) or 'none'}; "
            "give two labels (task.one_against_rest makes them) and one cue or more, each once."
        )
    train, test, notes = _split(labelled, names, seed)
    fitted = tuple(cue.fit(train.texts) for cue in cues)
    pool, held = _pool("training", train, fitted, names), _pool("test", test, fitted, names)
    half, random = Fraction(1, 2), np.random.default_rng(seed)
    chosen, swapped = _drawn(pool, share, n_train, random)
    balanced = _drawn(pool, half, None, random)[0] if _most(pool, half) else None
    rows = _drawn(held, half, n_test, random)[0]
    return ShiftTask(
        name=f"{' and '.join(cue.name for cue in cues)} at {setting(rho)}",
        label_names=names, spurious_names=tuple(_combined(fitted, values) for values in _combinations(len(cues))),
        train=chosen, swapped=swapped, balanced=balanced, test=rows,
        methods=(
            *cues_stripped([cue for cue in fitted if cue.can_inject]), *cues_erased([cue.name for cue in fitted]),
        ),
        notes=(*notes, *_said(pool, train, rho)),
    )  # fmt: skip


@checked
def mcc(a: Sequence[int], b: Sequence[int]) -> float:
    """Matthews' correlation of two columns of 0 and 1; nan if one is constant.

    >>> mcc([1, 1, 0, 0], [1, 0, 0, 0]), mcc([0, 1], [1, 0])  # 2 / sqrt(2 * 2 * 1 * 3)
    (0.5773502691896258, -1.0)
    """
    x, y = np.array(a, dtype=float), np.array(b, dtype=float)
    spread = np.sqrt(x.mean() * (1 - x.mean()) * y.mean() * (1 - y.mean()))
    return float(((x * y).mean() - x.mean() * y.mean()) / spread) if spread else float("nan")


def cell_counts(n: int, share: Fraction, cues: int) -> dict[tuple[bool, ...], int]:
    """How many of `n` texts of one label agree with which cues: `n * share` with each, as independent as can be.

    >>> cell_counts(20, Fraction(9, 10), 2)  # 20 * .81 = 16.2 and 20 * .09 = 1.8
    {(True, True): 16, (True, False): 2, (False, True): 2, (False, False): 0}
    """
    counts: dict[tuple[bool, ...], int] = {(): n}
    for _ in range(cues):
        agreeing = {cell: int(size * share) for cell, size in counts.items()}
        # the largest remainders are rounded up, so that n * share agree in all
        left = int(n * share) - sum(agreeing.values())
        for cell in sorted(counts, key=lambda cell: agreeing[cell] - counts[cell] * share)[:left]:
            agreeing[cell] += 1
        counts = {
            (*cell, agrees): agreeing[cell] if agrees else size - agreeing[cell]
            for cell, size in counts.items() for agrees in (True, False)
        }  # fmt: skip
    return counts


def _split(
    labelled: LabelledTexts | ShiftTask, names: tuple[str, ...], seed: int
) -> tuple[LabelledTexts, LabelledTexts, tuple[str, ...]]:
    if isinstance(labelled, ShiftTask):
        return labelled.train, labelled.test, labelled.notes
    n = len(labelled)
    if len(set(labelled.label)) != 2:
        raise InvalidInputError(
            f"with_cues: the texts have {len(set(labelled.label))} labels; give two (task.one_against_rest makes them)."
        )
    table = TextTable(
        texts=labelled.texts, label=Values(names, labelled.label), attribute=None, split=None, twin=None,
        number=tuple(range(n)),
    )  # fmt: skip
    notes: list[str] = []
    train, test = split_rows(table, SplitOptions(seed=seed), np.random.default_rng(seed), notes)
    return labelled.rows(train), labelled.rows(test), tuple(notes)


def _combinations(n: int) -> list[tuple[int, ...]]:
    return list(product((0, 1), repeat=n))


def _combined(cues: Sequence[Cue], values: Sequence[int]) -> str:
    return ", ".join(cue.values[value] for cue, value in zip(cues, values, strict=True))


def _pool(name: str, labelled: LabelledTexts, cues: tuple[Cue, ...], names: tuple[str, ...]) -> _Pool:
    """The texts with every combination of injected cues, without those that some combination is not possible for."""
    natural = np.array([cue.of(labelled.texts) for cue in cues])
    injected = [i for i, cue in enumerate(cues) if cue.can_inject]
    usable = np.ones(len(labelled), dtype=bool)
    texts: dict[tuple[int, ...], list[str]] = {}
    for wanted in _combinations(len(injected)):
        edited = list(labelled.texts)
        target = natural.copy()
        for i, value in zip(injected, wanted, strict=True):
            target[i] = value
            edit = cues[i].put if value else cues[i].strip
            edited = [edit(text) if natural[i, row] != value else text for row, text in enumerate(edited)]
        texts[wanted] = edited
        # an edit may fail, or change another cue: a token in front decides the first letter
        usable &= (np.array([cue.of(edited) for cue in cues]) == target).all(axis=0)
    fixed = [i for i, cue in enumerate(cues) if not cue.can_inject]
    rows: dict[Cell, list[int]] = {(y, values): [] for y in (0, 1) for values in _combinations(len(fixed))}
    for row in np.flatnonzero(usable).tolist():
        rows[labelled.label[row], tuple(natural[fixed, row].tolist())].append(row)
    return _Pool(name, names, cues, texts, natural, rows)


def _cells(pool: _Pool, n: int, share: Fraction) -> dict[Cell, int]:
    """How many texts of each label and values of the cues make `n` per label."""
    return {
        (label, tuple(label if agrees else 1 - label for agrees in agreement)): count
        for label in (0, 1) for agreement, count in cell_counts(n, share, len(pool.cues)).items()
    }  # fmt: skip


def _fixed(pool: _Pool, cell: Cell) -> Cell:
    """The cell by the cues that can't be injected."""
    return cell[0], tuple(value for cue, value in zip(pool.cues, cell[1], strict=True) if not cue.can_inject)


def _lacking(pool: _Pool, n: int, share: Fraction) -> tuple[Cell, int] | None:
    """The group that has too few texts, with how many it needs; None if `n` per label are possible."""
    needed: dict[Cell, int] = {}
    for cell, count in _cells(pool, n, share).items():
        needed[_fixed(pool, cell)] = needed.get(_fixed(pool, cell), 0) + count
    return next(((cell, count) for cell, count in needed.items() if count > len(pool.rows[cell])), None)


def _step(pool: _Pool, share: Fraction) -> int:
    """What the number of texts per label must be a multiple of; all groups are equally large at a half."""
    return 2 ** len(pool.cues) if share == Fraction(1, 2) else share.denominator


def _most(pool: _Pool, share: Fraction) -> int:
    """The largest number of texts per label that is possible."""
    step = _step(pool, share)
    low, high = 0, sum(map(len, pool.rows.values())) // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if _lacking(pool, middle * step, share) else (middle, high)
    return low * step


def _drawn(
    pool: _Pool, share: Fraction, asked: int | None, random: np.random.Generator
) -> tuple[LabelledTexts, tuple[str, ...] | None]:
    """Texts in every cell, and their twins if there is one cue and it can be injected."""
    step = _step(pool, share)
    if asked is not None and (asked < 2 * step or asked % (2 * step)):
        raise InvalidInputError(
            f"with_cues: {asked} {pool.name} texts can't be divided exactly; give a multiple of {2 * step}."
        )
    n = _most(pool, share) if asked is None else asked // 2
    lacking = _lacking(pool, n or step, share)
    if lacking is not None:
        (label, values), count = lacking
        kinds = [cue for cue in pool.cues if not cue.can_inject]
        edited = " into which each cue can be put without changing another"
        what = f" that are {_combined(kinds, values)}" if kinds else edited
        raise DegenerateInputError(
            f"with_cues: needs {number(count)} {pool.name} texts of the label {pool.label_names[label]!r}{what}; there "
            f"are {len(pool.rows[label, values])}. Give more texts, a smaller number, or another rho."
        )
    order = {cell: random.permutation(rows).tolist() for cell, rows in pool.rows.items()}
    made: list[tuple[str, str, int, tuple[int, ...]]] = []
    for cell, count in _cells(pool, n, share).items():
        injected = tuple(value for cue, value in zip(pool.cues, cell[1], strict=True) if cue.can_inject)
        other = tuple(1 - value for value in injected)
        for _ in range(count):
            row = order[_fixed(pool, cell)].pop()
            made.append((pool.texts[injected][row], pool.texts[other][row], cell[0], cell[1]))
    made = [made[i] for i in random.permutation(len(made))]
    texts, twins, label, values = (tuple(column) for column in zip(*made, strict=True))
    index = {combination: i for i, combination in enumerate(_combinations(len(pool.cues)))}
    columns = tuple((cue.name, tuple(row[i] for row in values)) for i, cue in enumerate(pool.cues))
    is_twin = len(pool.cues) == 1 and pool.cues[0].can_inject
    return LabelledTexts(texts, label, tuple(index[row] for row in values), columns), twins if is_twin else None


def _said(pool: _Pool, labelled: LabelledTexts, rho: float) -> list[str]:
    """The natural correlation of each cue, and how many texts can't be used."""
    lines = [
        f"{cue.name}: correlation with the label {number(mcc(tuple(natural.tolist()), labelled.label))} in the texts "
        f"as they are, {number(2 * rho - 1)} in training."
        for cue, natural in zip(pool.cues, pool.natural, strict=True)
    ]
    left = len(labelled) - sum(map(len, pool.rows.values()))
    if left:
        lines.append(f"{counted(left, 'training texts')} are left out, into which the cues can't be put one by one.")
    return lines
