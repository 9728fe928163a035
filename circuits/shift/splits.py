"""Training and test rows of a table: no text, twin or duplicate in both, groups counted exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from circuits.shift.columns import TextTable
from circuits.shift.strength import SplitOptions, as_fraction
from circuits.shift.texts import Group, LabelledTexts
from workbench.core.display import first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted, number, percent, setting

Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a task is made of."""

    train: LabelledTexts
    swapped: tuple[str, ...] | None
    balanced: LabelledTexts | None
    test: LabelledTexts
    notes: tuple[str, ...]


def split_table(table: TextTable, options: SplitOptions) -> Parts:
    """Training, balanced and test texts of a table, and what was done in sentences.

    Raises:
        InvalidInputError: if a text, its duplicate or its twin is in two splits of the table, or a twin is missing.
        DegenerateInputError: if a split is empty, or a group has too few rows.
    """
    notes: list[str] = []
    random = np.random.default_rng(options.seed)
    if table.split is None:
        train, test = split_rows(table, options, random, notes)
        dev: list[int] = []
    else:
        train, dev, test = (_rows_of(table, name) for name in ("train", "dev", "test"))
        test = _without_leaks(table, [*train, *dev], test, options, notes)
    for name, rows in (("train", train), ("test", test)):
        if not rows:
            raise DegenerateInputError(f"The table has no rows of the split {name!r}. Give rows of 'train' and 'test'.")
        gone = [
            label for i, label in enumerate(table.label.names) if i not in {table.label.of_row[row] for row in rows}
        ]
        if gone:
            raise DegenerateInputError(
                f"The split {name!r} has no row of the label {gone[0]!r}. Give rows of it, or leave it out (classes=)."
            )
    pool, of_pool = (dev, "dev") if dev else (train, "training")
    balanced = _balanced(table, pool, random, notes, f"Balanced rows for oracles are of the {of_pool} split")
    if options.rho is not None:
        train = _agreeing(table, train, options.rho, random, notes)
    if options.balance_test and table.attribute is not None:
        test = (
            _balanced(table, test, random, notes, "Test rows were left out until all groups were equally large") or test
        )
    return Parts(
        train=_labelled(table, train), test=_labelled(table, test), swapped=_swapped(table, train),
        balanced=_labelled(table, balanced) if balanced else None, notes=tuple(notes),
    )  # fmt: skip


def group_of(table: TextTable, row: int) -> Group:
    """Label and attribute of a row."""
    return table.label.of_row[row], None if table.attribute is None else table.attribute.of_row[row]


def group_name(table: TextTable, group: Group) -> str:
    """The group in words."""
    value = "" if group[1] is None or table.attribute is None else f"{table.attribute.names[group[1]]} "
    return f"{value}{table.label.names[group[0]]}"


def normalised(text: str) -> str:
    """What makes two texts duplicates: equal but for case and white space."""
    return " ".join(text.split()).casefold()


def components(texts: Iterable[Sequence[str]]) -> list[int]:
    """For each row the number of its component: rows that share a text, through other rows too.

    >>> components([["a"], ["b", "c"], ["A "], ["c"]])
    [0, 1, 0, 1]
    """
    texts = [[normalised(text) for text in row if text] for row in texts]
    parent = list(range(len(texts)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[str, int] = {}
    for row, keys in enumerate(texts):
        for key in keys:
            parent[root(row)] = root(first.setdefault(key, row))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(row), len(numbers)) for row in range(len(texts))]


def _of_row(table: TextTable) -> list[int]:
    twins = table.twin or ("",) * len(table.texts)
    return components(zip(table.texts, twins, strict=True))


def _by(keys: Iterable[Key]) -> dict[Key, list[int]]:
    rows: dict[Key, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return rows


def _groups(table: TextTable, rows: Iterable[int]) -> dict[Group, list[int]]:
    """Rows of every group that could be, in order; an empty list where there is none."""
    values = (None,) if table.attribute is None else range(len(table.attribute.names))
    groups: dict[Group, list[int]] = {(label, value): [] for label in range(len(table.label.names)) for value in values}
    for row in rows:
        groups[group_of(table, row)].append(row)
    return groups


def split_rows(
    table: TextTable, options: SplitOptions, random: np.random.Generator, notes: list[str]
) -> tuple[list[int], list[int]]:
    """Splits with the share of every group in the test set; what belongs together is in one."""
    together = _by(_of_row(table))
    every = _groups(table, range(len(table.texts)))
    wanted = {group: max(1, round(options.test_share * len(rows))) for group, rows in every.items()}
    for group, rows in every.items():
        if len(rows) < 2:
            raise DegenerateInputError(
                f"The table has {counted(len(rows), 'rows')} of {group_name(table, group)}; needs at least 2, for "
                "training and test. Leave the label out (classes=), or give rows."
            )
    held = dict.fromkeys(every, 0)
    train, test = [], []
    blocks = list(together.values())
    # large ones first, so that the small ones fill the groups up to the share
    for block in sorted((blocks[i] for i in random.permutation(len(blocks))), key=len, reverse=True):
        count = Counter(group_of(table, row) for row in block)
        if all(held[group] + n <= wanted[group] for group, n in count.items()):
            test += block
            held.update({group: held[group] + n for group, n in count.items()})
        else:
            train += block
    short = [group for group, n in held.items() if not n]
    if short:
        raise DegenerateInputError(
            f"Duplicates and twins of {group_name(table, short[0])} can't be in training and test without a "
            "leak. Give more texts."
        )
    notes.append(
        f"Split here, stratified by group: {percent(options.test_share)} of each are test rows."
        + _kept_together(len(table.texts) - len(together))
    )
    return sorted(train), sorted(test)


def _kept_together(n: int) -> str:
    return f" {counted(n, 'duplicates or twins')} of other rows are in the split of these." if n else ""


def _rows_of(table: TextTable, split: str) -> list[int]:
    return [row for row, name in enumerate(table.split or ()) if name == split]


def _without_leaks(
    table: TextTable, train: Sequence[int], test: Sequence[int], options: SplitOptions, notes: list[str]
) -> list[int]:
    component = _of_row(table)
    seen = {component[row]: row for row in reversed(train)}
    leaks = [row for row in test if component[row] in seen]
    if leaks and options.leaks == "refuse":
        row, other = leaks[0], seen[component[leaks[0]]]
        raise InvalidInputError(
            f"{counted(len(leaks), 'test rows')} of the table are duplicates or twins of training rows, such as row "
            f"{table.number[row]} of row {table.number[other]}, counted from 0. Put them into one split, or give "
            'SplitOptions(leaks="leave out").'
        )
    if leaks:
        notes.append(f"{counted(len(leaks), 'test rows')} that duplicate training rows or their twins are left out.")
    return [row for row in test if component[row] not in seen]


def _balanced(
    table: TextTable, rows: Sequence[int], random: np.random.Generator, notes: list[str], what: str
) -> list[int]:
    """As many rows of each group as the smallest has; none if a group has none."""
    if table.attribute is None:
        return []
    groups = _groups(table, rows)
    n = min(map(len, groups.values()))
    if not n:
        return []
    if n * len(groups) < len(rows) or "oracles" in what:
        notes.append(f"{what}, {number(n)} of each.")
    return _some(groups, dict.fromkeys(groups, n), random)


def _some(groups: Mapping[Group, Sequence[int]], counts: Mapping[Group, int], random: np.random.Generator) -> list[int]:
    return sorted(int(row) for group, n in counts.items() for row in random.permutation(groups[group])[:n])


def _agreeing(
    table: TextTable, rows: Sequence[int], rho: float, random: np.random.Generator, notes: list[str]
) -> list[int]:
    """Rows of two labels, equally many of each, of which exactly a share `rho` has the attribute that goes with it."""
    groups = _groups(table, rows)
    if table.attribute is None or len(table.label.names) != 2 or len(table.attribute.names) != 2:
        raise InvalidInputError(
            "SplitOptions(rho=...) needs an attribute with two values and two labels. Choose two with classes= and "
            "attributes=, or leave rho out."
        )
    share, sizes = as_fraction(rho), {group: len(of_group) for group, of_group in groups.items()}
    straight = sizes[0, 0] * sizes[1, 1] >= sizes[0, 1] * sizes[1, 0]
    agrees = {group: (group[0] == group[1]) == straight for group in groups}
    parts = {group: share if agrees[group] else 1 - share for group in groups}
    scarce = min((group for group in groups if parts[group]), key=lambda group: sizes[group] / parts[group])
    n = int(sizes[scarce] / parts[scarce]) // share.denominator * share.denominator
    if not n:
        raise DegenerateInputError(
            f"rho={setting(rho)} needs at least {number(int(parts[scarce] * share.denominator))} training rows of "
            f"{group_name(table, scarce)}; there are {sizes[scarce]}. Give more rows, or another rho."
        )
    counts = {group: int(n * part) for group, part in parts.items()}
    notes.append(
        f"Of {counted(len(rows), 'training rows')} {number(2 * n)} are used, so that attribute and label agree in a "
        f"share of {setting(rho)}."
    )
    return _some(groups, counts, random)


def _labelled(table: TextTable, rows: Sequence[int]) -> LabelledTexts:
    attribute = table.attribute
    return LabelledTexts(
        tuple(table.texts[row] for row in rows),
        tuple(table.label.of_row[row] for row in rows),
        None if attribute is None else tuple(attribute.of_row[row] for row in rows),
    )


def _swapped(table: TextTable, train: Sequence[int]) -> tuple[str, ...] | None:
    if table.twin is None:
        return None
    for problem, rows in (
        ("have no twin", [table.number[row] for row in train if not table.twin[row]]),
        ("equal their twin", [table.number[row] for row in train if table.twin[row] == table.texts[row]]),
    ):
        if rows:
            raise InvalidInputError(
                f"{counted(len(rows), 'training rows')} {problem} (rows {first_few(rows, 5)}, counted from 0). Give "
                "each the text with the attribute swapped, or leave twin= out."
            )
    return tuple(table.twin[row] for row in train)
