"""Pairs of prompts that differ in what a behaviour depends on, each with the two answers that are compared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import CorruptFileError, DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.html import Shown
from workbench.core.numbers import counted
from workbench.core.records import json_lines
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd

FIELDS = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
"""The keys of one line of a file of pairs."""
_REASONS_SHOWN = 3
_READ_AT_ONCE = 256
"""Pairs that are tokenized together."""


@checked
@dataclass(frozen=True, eq=False)
class Pairs(Shown):
    """Prompts with and without what a behaviour depends on, token by token of the same length.

    Rows are padded on the left, so the last column holds the last token of every prompt. Prompts without a
    counterpart are pairs too (`patch` is None): their nodes can be set to zero or to a mean.

    Attributes:
        clean: the prompts that are explained.
        patch: their counterparts, with the shape and the padding of `clean`; None if there are none.
        answers: token ids of the clean answer and of the patch answer, or of the one answer without counterparts.
        cases: what kind each pair is, such as "singular_plural"; "" where nothing is known.
        note: what was left out when the pairs were made, in words.
    """

    how_to_make: ClassVar[str] = "circuits.Pairs.of(model, clean=[...], patch=[...], answers=[...]) makes pairs."
    clean: TokenBatch
    patch: TokenBatch | None
    answers: Int[Tensor, "pairs k"]
    cases: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        n, k = len(self.clean), 1 if self.patch is None else 2
        if self.patch is not None and not torch.equal(self.clean.mask, self.patch.mask):
            raise ShapeError(
                f"Pairs: clean {tuple(self.clean.ids.shape)} and patch {tuple(self.patch.ids.shape)} must have "
                "the same number of tokens in every row. Leave out the pairs that differ in length."
            )
        if tuple(self.answers.shape) != (n, k):
            raise ShapeError(f"Pairs: answers have shape {tuple(self.answers.shape)}; {n} pairs need ({n}, {k}).")
        if not self.cases:
            object.__setattr__(self, "cases", ("",) * n)
        elif len(self.cases) != n:
            raise ShapeError(f"Pairs: {len(self.cases)} cases for {n} pairs. Give one per pair.")

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        clean: Sequence[str],
        patch: Sequence[str] | None = None,
        answers: Sequence[tuple[str, str]] | Sequence[str],
        cases: Sequence[str] = (),
    ) -> Pairs:
        """From texts; every pair is used.

        Args:
            model: whose tokenizer reads them.
            clean: the prompts.
            patch: their counterparts, or None.
            answers: per pair the clean and the patch answer, or the one answer without counterparts; with the space in
                front, where the tokenizer has one.
            cases: what kind each pair is.

        Raises:
            InvalidInputError: if an answer is not one token behind its prompt, or the prompts of a pair differ in their
                number of tokens.
            ShapeError: if the numbers of prompts and answers differ.
        """
        rows = _rows(clean, patch, answers, cases)
        answered, reasons = usable(model, rows)
        if reasons:
            row, why = next(iter(reasons.items()))
            raise InvalidInputError(
                f"Pairs.of: {len(reasons)} of {counted(len(rows), 'pairs')} can't be used. Pair {row}: {why} "
                "Change or remove it; from_jsonl and from_frame leave such pairs out and say so."
            )
        return assembled(model, rows, answered, "")

    @classmethod
    def from_jsonl(cls, path: str | Path, model: Model, *, limit: int | None = None, seed: int | None = None) -> Pairs:
        """From a file with one JSON object per line: clean_prefix, patch_prefix, clean_answer, patch_answer, case.

        Pairs that can't be used are left out, and `note` counts them.

        Args:
            path: the file.
            model: whose tokenizer reads them.
            limit: how many usable pairs to take; None takes all.
            seed: order of the pairs; None takes that of the file.

        Raises:
            CorruptFileError: if a line is no object with these keys.
            MissingFileError: if there is no such file.
            DegenerateInputError: if no pair can be used.
        """
        records = []
        for number, record in enumerate(json_lines(path), 1):
            if missing := [name for name in FIELDS if not isinstance(record.get(name), str)]:
                raise CorruptFileError(
                    f"{path}, entry {number}: there is no text under {', '.join(missing)}. Each line is an object with "
                    f"{', '.join(FIELDS)}. Correct or remove the line."
                )
            records.append(record)
        return cls._from_records(str(path), records, model, limit, seed)

    @classmethod
    def from_frame(
        cls, frame: pd.DataFrame, model: Model, *, limit: int | None = None, seed: int | None = None
    ) -> Pairs:
        """From a table with the columns clean_prefix, patch_prefix, clean_answer, patch_answer and, if known, case.

        Raises:
            InvalidInputError: if a column is missing.
            DegenerateInputError: if no pair can be used.
        """
        missing = [name for name in FIELDS if name not in frame]
        if missing:
            raise InvalidInputError(
                f"Pairs.from_frame: the table has no column {', '.join(missing)}; it has {', '.join(map(str, frame))}. "
                "Rename its columns."
            )
        records = [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
        return cls._from_records("the table", records, model, limit, seed)

    @classmethod
    def _from_records(
        cls, where: str, records: Iterable[Mapping[str, object]], model: Model, limit: int | None, seed: int | None
    ) -> Pairs:
        rows = [_row(record) for record in records]
        if seed is not None:
            random.Random(seed).shuffle(rows)
        answered, reasons = usable(model, rows, limit)
        n, every = len(answered), counted(len(rows), "pairs")
        if not n:
            some = "; ".join(list(reasons.values())[:_REASONS_SHOWN])
            raise DegenerateInputError(f"{where}: none of {every} can be used. {some}")
        short = "" if limit is None or n == limit else f"{counted(limit, 'pairs')} asked for, {n} found. "
        left_out = f"{len(reasons)} of {every} left out: {next(iter(reasons.values()))}" if reasons else ""
        return assembled(model, rows, answered, short + left_out)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: slice | Sequence[int] | Int[Tensor, " chosen"] | Bool[Tensor, " pairs"]) -> Pairs:
        """Some of the pairs, as long as they are together: a slice, numbers of rows, or True where a row is taken.

        Raises:
            ShapeError: if a mask has another length than the pairs.
        """
        index = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows)
        if index.dtype == torch.bool:
            if len(index) != len(self):
                raise ShapeError(f"pairs[mask]: a mask of {len(index)} for {len(self)} pairs. Give one value per pair.")
            index = index.nonzero()[:, 0]
        index = index.long().to(self.clean.ids.device)
        return replace(
            self, clean=self.clean[index], patch=None if self.patch is None else self.patch[index],
            answers=self.answers[index.to(self.answers.device)], cases=tuple(self.cases[i] for i in index.tolist()),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs on another device."""
        patch = None if self.patch is None else self.patch.to(device)
        return replace(self, clean=self.clean.to(device), patch=patch, answers=self.answers.to(device))

    @property
    def length(self) -> int | None:
        """Number of tokens of every prompt; None if they differ."""
        lengths = set(self.clean.lengths.tolist())
        return lengths.pop() if len(lengths) == 1 else None

    def of_one_length(self, length: int | None = None) -> Pairs:
        """The pairs of one length, the commonest by default, so that positions mean the same in all of them.

        Raises:
            DegenerateInputError: if there is no pair of this length.
        """
        lengths = self.clean.lengths.tolist()
        length = Counter(lengths).most_common(1)[0][0] if length is None else length
        rows = [i for i, found in enumerate(lengths) if found == length]
        if not rows:
            raise DegenerateInputError(
                f"of_one_length({length}): the pairs have {min(lengths)} to {max(lengths)} tokens. Choose one of these."
            )
        return self[rows]

    def changed(self) -> Tensor:
        """True from the first token in which a pair differs on, `(pairs, pos)`; before it nothing can differ.

        Raises:
            InvalidInputError: if there are no counterparts.
        """
        if self.patch is None:
            raise InvalidInputError("These pairs have no counterparts. Give patch= when they are made.")
        return ((self.clean.ids != self.patch.ids).cumsum(1) > 0) & self.clean.mask

    def frame(self) -> pd.DataFrame:
        """One row per pair: prompts and answers as text, kind, number of tokens."""
        import pandas as pd

        tokenizer = self.clean.tokenizer

        def text(ids: list[int]) -> str:
            return str(ids) if tokenizer is None else str(tokenizer.decode(ids, skip_special_tokens=True))

        columns: dict[str, list[object]] = {"clean_prefix": [text(row.tolist()) for row in self.clean.rows()]}
        if self.patch is not None:
            columns["patch_prefix"] = [text(row.tolist()) for row in self.patch.rows()]
        for name, ids in zip(FIELDS[2:], self.answers.T, strict=False):
            columns[name] = [text([i]) for i in ids.tolist()]
        return pd.DataFrame({**columns, "case": list(self.cases), "tokens": self.clean.lengths.tolist()})

    def _shown_line(self) -> str:
        length = "" if self.length is None else f" of {counted(self.length, 'tokens')}"
        kind = "pairs" if self.patch is not None else "prompts without a counterpart"
        return f"{counted(len(self), kind) if self.patch is not None else f'{len(self)} {kind}'}{length}"


@dataclass(frozen=True)
class PromptPair:
    """A pair as text, whatever the tokenizer makes of it.

    Attributes:
        clean: the prompt that is explained.
        patch: its counterpart; None if there is none.
        clean_answer: what continues `clean`, with the space in front where there is one.
        patch_answer: what continues `patch`; None without a counterpart.
        case: what kind of pair it is.
    """

    clean: str
    patch: str | None
    clean_answer: str
    patch_answer: str | None
    case: str = ""

    def texts(self) -> tuple[str, ...]:
        """All that a tokenizer has to read: the prompts, and the clean one with each answer."""
        prompts = (self.clean,) if self.patch is None else (self.clean, self.patch)
        answers = (self.clean_answer,) if self.patch_answer is None else (self.clean_answer, self.patch_answer)
        return (*prompts, *(self.clean + answer for answer in answers))


class Answered(NamedTuple):
    """The token ids of the answers of a usable pair, and the number of tokens of its prompts."""

    ids: list[int]
    length: int


def _row(record: Mapping[str, object]) -> PromptPair:
    clean, patch, clean_answer, patch_answer = (str(record[name]) for name in FIELDS)
    return PromptPair(clean, patch, clean_answer, patch_answer, str(record.get("case", "")))


def _rows(
    clean: Sequence[str], patch: Sequence[str] | None, answers: Sequence[tuple[str, str]] | Sequence[str],
    cases: Sequence[str],
) -> list[PromptPair]:  # fmt: skip
    n = len(clean)
    if not n:
        raise DegenerateInputError("Pairs.of: there are no prompts. Give at least one pair.")
    others = [None] * n if patch is None else list(patch)
    if not len(others) == len(answers) == n or len(cases) not in (0, n):
        raise ShapeError(
            f"Pairs.of: {n} clean prompts, {len(others)} patch prompts, {len(answers)} answers, {len(cases)} cases. "
            "Give one of each per pair."
        )
    rows = []
    for i in range(n):
        answer, single = answers[i], patch is None
        given: tuple[str, ...] = (answer,) if isinstance(answer, str) else answer
        if len(given) != (1 if single else 2):
            raise ShapeError(
                f"Pairs.of: pair {i} has {counted(len(given), 'answers')}; "
                + ("prompts without patch= need one each." if single else "give (clean answer, patch answer).")
            )
        rows.append(PromptPair(clean[i], others[i], given[0], None if single else given[-1], cases[i] if cases else ""))
    return rows


def usable(
    model: Model, rows: Sequence[PromptPair], limit: int | None = None
) -> tuple[dict[int, Answered], dict[int, str]]:
    """By the number of a pair its answers, or why it can't be used.

    Args:
        model: whose tokenizer reads them.
        rows: the pairs.
        limit: stop when so many can be used.
    """
    answered: dict[int, Answered] = {}
    reasons: dict[int, str] = {}
    for start in range(0, len(rows), _READ_AT_ONCE):
        part = rows[start : start + _READ_AT_ONCE]
        known = _encoded(model, [text for row in part for text in row.texts()])
        for i, row in enumerate(part, start):
            if limit is not None and len(answered) >= limit:
                return answered, reasons
            try:
                answered[i] = _answered(_Reader(model, known), row)
            except InvalidInputError as error:
                reasons[i] = str(error)
    return answered, reasons


def _encoded(model: Model, texts: Iterable[str]) -> dict[str, list[int]]:
    """The ids of the texts, read together; none if one of them can't be read."""
    asked = list(dict.fromkeys(text for text in texts if text.strip()))
    try:
        rows = model.tokens(asked).rows() if asked else []
    except InvalidInputError:
        return {}
    return {text: row.tolist() for text, row in zip(asked, rows, strict=True)}


@dataclass(frozen=True)
class _Reader:
    """Ids of texts, of which most are known already."""

    model: Model
    known: Mapping[str, list[int]]

    def ids(self, text: str) -> list[int]:
        if not text.strip():
            raise InvalidInputError("A prompt is empty.")
        return self.known[text] if text in self.known else self.model.tokens(text).rows()[0].tolist()

    def answer(self, prefix: str, ids: list[int], answer: str) -> int:
        """The one token that an answer is behind its prompt."""
        together = self.ids(prefix + answer)
        if together[: len(ids)] != ids or len(together) != len(ids) + 1:
            n = len(together) - len(ids)
            is_longer = together[: len(ids)] == ids
            what = f"is {counted(n, 'tokens')}" if is_longer else "changes how the prompt itself is split"
            raise InvalidInputError(
                f"The answer {answer!r} behind {prefix!r} {what}; it must be one token. Write it as the tokenizer has "
                "it, often with a space in front."
            )
        return together[-1]


def _answered(reader: _Reader, row: PromptPair) -> Answered:
    clean = reader.ids(row.clean)
    patch = None if row.patch is None else reader.ids(row.patch)
    if patch is not None and len(patch) != len(clean):
        raise InvalidInputError(
            f"{row.clean!r} has {counted(len(clean), 'tokens')} and {row.patch!r} {len(patch)}; they must "
            "have the same number."
        )
    if patch == clean:
        raise InvalidInputError(f"{row.clean!r}: both prompts are the same.")
    behind = [row.clean_answer, *([] if row.patch_answer is None else [row.patch_answer])]
    answers = [reader.answer(row.clean, clean, text) for text in behind]
    if len(set(answers)) < len(answers):
        raise InvalidInputError(f"{row.clean!r}: both answers are the same token.")
    return Answered(answers, len(clean))


def assembled(model: Model, rows: Sequence[PromptPair], answered: Mapping[int, Answered], note: str) -> Pairs:
    """The pairs that `usable` found, in the order of `answered`."""
    kept = [rows[i] for i in answered]
    patch = [row.patch for row in kept if row.patch is not None]
    answers = torch.tensor([found.ids for found in answered.values()], device=model.device)
    return Pairs(
        model.tokens([row.clean for row in kept]), model.tokens(patch) if patch else None, answers,
        tuple(row.case for row in kept), note,
    )  # fmt: skip
