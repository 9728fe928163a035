"""Where tokens come from: the model itself, text files, token ids, a data set. All give packed rows in fixed order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import CorruptFileError, DegenerateInputError, InvalidInputError, MissingFileError, did_you_mean


@dataclass(frozen=True, eq=False)
class PackedRows:
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

    def describe(self) -> dict[str, Any]:
        """What the rows depend on, in JSON types; two equal descriptions mean the same rows."""
        ...

    def n_rows(self) -> int | None:
        """About how many rows, if that is known before reading."""
        ...

    def batches(self, model: Any, start_row: int = 0) -> Iterator[PackedRows]:
        """The rows from `start_row` on."""
        ...


@dataclass(frozen=True)
class SelfText:
    """Text that the model writes itself: from BOS alone, temperature 1, no truncation of the distribution.

    No outside data enters. A text that ends is followed by whatever the model writes after its end token, so every row
    is full. Each row is a document.

    Attributes:
        tokens: how many tokens, BOS included; rounded up to whole rows.
        context: tokens per row.
        seed: with the row number it decides each row.
        batch_size: rows that are written at once.

    Source: FaithfulSAE (arXiv 2506.17673), its generation settings.
    """

    tokens: int
    context: int = 64
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        _check_sizes(self.tokens, self.context)
        if self.batch_size < 1:
            raise InvalidInputError(f"SelfText(batch_size={self.batch_size}) must be at least 1.")

    @property
    def batch_rows(self) -> int:
        """Rows that are written at once."""
        return self.batch_size

    def describe(self) -> dict[str, Any]:
        """The fields, with the kind of source."""
        return {"source": "self_text", **asdict(self)}

    def n_rows(self) -> int:
        """Number of rows."""
        return -(-self.tokens // self.context)

    def batches(self, model: Any, start_row: int = 0) -> Iterator[PackedRows]:
        """Writes the rows from `start_row` on, batch by batch."""
        start_id = model.tokenizer.bos_token_id
        if start_id is None:
            start_id = model.tokenizer.eos_token_id
        if start_id is None:
            raise InvalidInputError(
                "SelfText: this tokenizer has neither BOS nor EOS to start from. Use TextFiles instead."
            )
        for first in range(start_row, self.n_rows(), self.batch_size):
            n = min(self.batch_size, self.n_rows() - first)
            prompt = torch.full((n, 1), start_id)
            new = model.sample(prompt, self.context - 1, seed=self.seed, temperature=1.0, first_row=first).cpu()
            documents = torch.arange(first, first + n)[:, None].expand(n, self.context)
            yield PackedRows(torch.cat([prompt, new], dim=1), documents.contiguous())


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of token ids as given; each row is a document."""

    ids: Int[Tensor, "rows context"]
    batch_rows: int = 256

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape[1] < 2 or self.ids.dtype != torch.long:
            raise InvalidInputError(
                f"TokenRows: ids have shape {tuple(self.ids.shape)} and {self.ids.dtype}; give int64 (rows, "
                "context >= 2)."
            )

    @property
    def context(self) -> int:
        """Tokens per row."""
        return self.ids.shape[1]

    def describe(self) -> dict[str, Any]:
        """Shape and hash of the ids."""
        import hashlib

        digest = hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()
        return {"source": "token_rows", "shape": list(self.ids.shape), "sha256": digest}

    def n_rows(self) -> int:
        """Number of rows."""
        return self.ids.shape[0]

    def batches(self, model: Any, start_row: int = 0) -> Iterator[PackedRows]:  # noqa: ARG002
        """The rows from `start_row` on."""
        for first in range(start_row, self.n_rows(), self.batch_rows):
            ids = self.ids[first : first + self.batch_rows]
            yield PackedRows(ids, torch.arange(first, first + len(ids))[:, None].expand(ids.shape).contiguous())


@dataclass(frozen=True)
class TextFiles:
    """Documents from text files: a `.txt` file is one document, each line of a `.jsonl` file is one.

    Documents are packed one after the other into rows of `context` tokens, an end token after each; nothing is padded
    and less than one row is lost at the end. Attention crosses document borders inside a row.

    Attributes:
        paths: the files, in order.
        tokens: stop after so many; None takes all.
        context: tokens per row.
        column: name of the text in `.jsonl` lines.
    """

    paths: tuple[str | Path, ...]
    tokens: int | None = None
    context: int = 128
    column: str = "text"
    batch_rows: int = 256

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        tokens: int | None = None,
        context: int = 128,
        column: str = "text",
        batch_rows: int = 256,
    ) -> None:
        listed = (paths,) if isinstance(paths, str | Path) else tuple(paths)
        for name, value in (
            ("paths", listed),
            ("tokens", tokens),
            ("context", context),
            ("column", column),
            ("batch_rows", batch_rows),
        ):
            object.__setattr__(self, name, value)
        _check_sizes(context if tokens is None else tokens, context)
        if not listed:
            raise DegenerateInputError("TextFiles: there are no paths. Name at least one .txt or .jsonl file.")
        for path in listed:
            if not Path(path).is_file():
                raise MissingFileError(f"TextFiles: no file {path}. Check the path.")

    def describe(self) -> dict[str, Any]:
        """The fields, and size and hash of each file."""
        import hashlib

        files = [{"name": Path(p).name, "sha256": hashlib.sha256(Path(p).read_bytes()).hexdigest()} for p in self.paths]
        return {
            "source": "text_files",
            "files": files,
            "tokens": self.tokens,
            "context": self.context,
            "column": self.column,
            "batch_rows": self.batch_rows,
        }

    def n_rows(self) -> int | None:
        """About how many: three bytes of text make a token."""
        about = sum(Path(p).stat().st_size for p in self.paths) // 3 + 1
        return -(-min(self.tokens or about, about) // self.context)

    def batches(self, model: Any, start_row: int = 0) -> Iterator[PackedRows]:
        """The packed rows from `start_row` on; earlier text is read again and skipped."""
        return packed(self._texts(), model.tokenizer, self, start_row)

    def _texts(self) -> Iterator[str]:
        for path in map(Path, self.paths):
            if path.suffix != ".jsonl":
                yield _read_text(path)
                continue
            for number, line in enumerate(_read_text(path).splitlines(), start=1):
                if line.strip():
                    yield self._text_of(line, path, number)

    def _text_of(self, line: str, path: Path, number: int) -> str:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorruptFileError(f"{path} line {number} is not JSON ({error}). Mend or remove the line.") from None
        if not isinstance(value, dict) or not isinstance(value.get(self.column), str):
            keys = list(value) if isinstance(value, dict) else []
            raise InvalidInputError(
                f"{path} line {number} has no text in {self.column!r}. {did_you_mean(self.column, keys)} Set column=."
            )
        return value[self.column]


@dataclass(frozen=True)
class HubDataset:
    """Documents from a Hugging Face data set (or a local folder of one), streamed and packed as in `TextFiles`.

    Attributes:
        name: id on the hub, or a folder.
        split: which split.
        column: name of the text column.
        tokens: how many tokens to take.
        context: tokens per row.
        revision: version of the data set; name one for a result that can be made again.
    """

    name: str
    split: str = "train"
    column: str = "text"
    tokens: int = 1_000_000
    context: int = 128
    revision: str | None = None
    batch_rows: int = 256

    def __post_init__(self) -> None:
        _check_sizes(self.tokens, self.context)

    def describe(self) -> dict[str, Any]:
        """The fields, with the kind of source."""
        return {"source": "hub_dataset", **asdict(self)}

    def n_rows(self) -> int:
        """Number of rows, if the data set is long enough."""
        return -(-self.tokens // self.context)

    def batches(self, model: Any, start_row: int = 0) -> Iterator[PackedRows]:
        """The packed rows from `start_row` on; earlier documents are streamed again and skipped."""
        return packed(self._texts(), model.tokenizer, self, start_row)

    def _texts(self) -> Iterator[str]:
        from datasets import load_dataset

        stream = load_dataset(self.name, split=self.split, streaming=True, revision=self.revision)
        for record in stream:
            if self.column not in record:
                raise InvalidInputError(
                    f"{self.name} has no column {self.column!r}. {did_you_mean(self.column, list(record))} Set column=."
                )
            yield record[self.column]


def packed(
    texts: Iterable[str], tokenizer: Any, source: TextFiles | HubDataset, start_row: int = 0
) -> Iterator[PackedRows]:
    """Documents as full rows of tokens: an end token after each document, no padding, batch by batch.

    Raises:
        DegenerateInputError: if the text does not fill one row.
    """
    context, size = source.context, source.batch_rows
    limit = None if source.tokens is None else -(-source.tokens // context)
    ids: list[int] = []
    documents: list[int] = []
    done = 0
    for document, text in enumerate(texts):
        new = [*tokenizer(text, add_special_tokens=False)["input_ids"], *_end(tokenizer)]
        ids += new
        documents += [document] * len(new)
        while len(ids) >= size * context and (limit is None or done < limit):
            n = size if limit is None else min(size, limit - done)
            if done >= start_row:
                yield _rows(ids, documents, n, context)
            done += n
            del ids[: n * context], documents[: n * context]
        if limit is not None and done >= limit:
            return
    n = len(ids) // context if limit is None else min(len(ids) // context, limit - done)
    if done + n == 0:
        raise DegenerateInputError(
            f"The text holds {len(ids)} tokens; one row needs {context}. Give more or lower context=."
        )
    if n and done >= start_row:
        yield _rows(ids, documents, n, context)


def _end(tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    return [] if end is None else [end]


def _rows(ids: list[int], documents: list[int], n: int, context: int) -> PackedRows:
    shape = (n, context)
    return PackedRows(torch.tensor(ids[: n * context]).view(shape), torch.tensor(documents[: n * context]).view(shape))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is not UTF-8 text ({error}). Convert it, or leave it out.") from None


def _check_sizes(tokens: int, context: int) -> None:
    if tokens < 1 or context < 2:
        raise InvalidInputError(f"tokens={tokens}, context={context}: they must be >= 1 and >= 2.")
