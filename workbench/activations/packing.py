"""Documents packed into full rows of tokens, and the rule by which that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.activations.manifest import Packing
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.jsontext import Json
from workbench.core.numbers import counted
from workbench.core.tokenizer import TokenizerLike, affixes, decoded, require_unicode, text_ids
from workbench.models.model import Model


@dataclass(frozen=True, eq=False)
class PackedRows(OneLine):
    """Rows of tokens without padding, and the document that each token belongs to."""

    ids: Int[Tensor, "rows context"]
    documents: Int[Tensor, "rows context"]


@runtime_checkable
class Source(Protocol):
    """Packed rows of tokens; the same source gives the same rows in the same batches, from any row on."""

    @property
    def context(self) -> int:
        """Tokens per row."""
        ...

    @property
    def batch_rows(self) -> int:
        """Rows per batch; a harvest starts again only at a multiple of it."""
        ...

    def describe(self) -> dict[str, Json]:
        """What the rows depend on, in JSON types; two equal descriptions mean the same rows."""
        ...

    def n_rows(self) -> int | None:
        """About how many rows, if that is known before reading."""
        ...

    def batches(self, model: Model, start_row: int = 0) -> Iterator[PackedRows]:
        """The rows from `start_row` on."""
        ...


def packing_of(source: Source, tokenizer: TokenizerLike) -> Packing:
    """How the rows of a source came about, if it has a method `packing` that tells."""
    packing: Callable[[TokenizerLike], Packing] | None = getattr(source, "packing", None)
    if packing is not None:
        return packing(tokenizer)
    return Packing(row_start="as the source gives it", separator="as the source gives it", crosses_documents=True)


def packing_of_text(tokenizer: TokenizerLike) -> Packing:
    """The rule of `packed` with this tokenizer."""
    end, prefix = _end(tokenizer), affixes(tokenizer).prefix
    start = "no BOS; the text goes on"
    if prefix:
        is_bos = prefix == (tokenizer.bos_token_id,)
        start = f"BOS (id {prefix[0]})" if is_bos else f"prefix {decoded(tokenizer, prefix)} (ids {list(prefix)})"
    return Packing(
        row_start=start,
        separator=f"end token (id {end[0]})" if end else "nothing: the tokenizer has no end token",
        crosses_documents=True,
        starts_with_bos=bool(prefix),
    )


def packed(
    texts: Iterable[str],
    tokenizer: TokenizerLike,
    *,
    context: int,
    batch_rows: int,
    tokens: int | None,
    start_row: int = 0,
) -> Iterator[PackedRows]:
    """Documents as full rows of tokens: an end token after each document, no padding, batch by batch.

    `tokens` is rounded up to whole rows. Rows before `start_row` are skipped, and their text is read again.

    A row starts with what the tokenizer puts in front of a text (BOS, or several tokens), because such models are
    trained with it, and with the next token of the text where it puts nothing. What it puts behind a text is left off.
    Less than one row is lost at the end.

    Raises:
        DegenerateInputError: if the text does not fill one row.
        InvalidInputError: for a document that is not Unicode text, or rows that hold no more than the prefix.
    """
    prefix = affixes(tokenizer).prefix
    width = context - len(prefix)
    if width < 1:
        raise InvalidInputError(
            f"context={context}: the tokenizer puts {counted(len(prefix), 'tokens')} in front of a row "
            f"({list(prefix)}), so no text fits. Raise context."
        )
    limit = None if tokens is None else -(-tokens // context)
    rows = _Rows(width, prefix)
    done = 0
    for document, text in enumerate(texts):
        require_unicode(text, f"Document {document} (from 0)")
        rows.add([*text_ids(tokenizer, text), *_end(tokenizer)], document)
        while rows.full >= batch_rows or (limit is not None and rows.full >= limit - done):
            n = batch_rows if limit is None else min(batch_rows, limit - done)
            batch = rows.take(n)
            if done >= start_row:
                yield batch
            done += n
            if done == limit:
                return
    if done + rows.full == 0:
        raise DegenerateInputError(
            f"The text holds {rows.waiting} tokens; one row needs {width}. Give more or lower context=."
        )
    if rows.full and done >= start_row:
        yield rows.take(rows.full)


class _Rows:
    """Tokens that wait for their row; joined only when rows are taken, so that a long document costs no more."""

    def __init__(self, width: int, prefix: tuple[int, ...]) -> None:
        self.width, self.prefix, self.waiting = width, prefix, 0
        self._ids: list[Tensor] = []
        self._documents: list[Tensor] = []

    @property
    def full(self) -> int:
        return self.waiting // self.width

    def add(self, ids: list[int], document: int) -> None:
        self._ids.append(torch.tensor(ids, dtype=torch.long))
        self._documents.append(torch.full((len(ids),), document))
        self.waiting += len(ids)

    def take(self, n: int) -> PackedRows:
        size = n * self.width
        ids, documents = torch.cat(self._ids), torch.cat(self._documents)
        self._ids, self._documents, self.waiting = [ids[size:]], [documents[size:]], self.waiting - size
        ids, documents = ids[:size].view(n, self.width), documents[:size].view(n, self.width)
        if self.prefix:
            ids = torch.cat([torch.tensor(self.prefix).expand(n, -1), ids], dim=1)
            documents = torch.cat([documents[:, :1].expand(n, len(self.prefix)), documents], dim=1)
        return PackedRows(ids.contiguous(), documents.contiguous())


def check_sizes(tokens: int, context: int, batch_rows: int = 1) -> None:
    """Refuses sizes that give no row.

    Raises:
        InvalidInputError: if there is not one token, a row has no second one, or a batch has no row.
    """
    if batch_rows < 1:
        raise InvalidInputError(f"batch_rows={batch_rows}: a batch has at least one row.")
    if tokens < 1 or context < 2:
        raise InvalidInputError(f"tokens={tokens}, context={context}: they must be >= 1 and >= 2.")


def _end(tokenizer: TokenizerLike) -> list[int]:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    return [] if end is None else [end]
