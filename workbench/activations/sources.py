"""Where tokens come from: the model itself, files, token ids, a data set. All give packed rows in fixed order."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.activations.files import about_tokens, documents, text_files
from workbench.activations.manifest import Packing
from workbench.activations.packing import PackedRows, check_sizes, packed, packing_of_text
from workbench.activations.packing import Source as Source
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError, ModelUnavailableError, did_you_mean
from workbench.core.jsontext import Json, Record
from workbench.core.numbers import counted
from workbench.core.progress import quiet_libraries, task
from workbench.core.tokenizer import TokenizerLike, decoded, start_ids
from workbench.models.hub import unreachable
from workbench.models.model import Model

OWN_TEXT_TOKENS = 81_920
"""Tokens that a model writes where no other number is asked for."""


@checked
@dataclass(frozen=True)
class SelfText(OneLine):
    """Text that the model writes itself: from the tokenizer's prefix (BOS), temperature 1, no truncated distribution.

    No outside data enters. A text that ends is followed by whatever the model writes after its end token, so every row
    is full. Each row is a document.

    Attributes:
        tokens: how many tokens, prefix included; rounded up to whole rows.
        seed: with the row number it decides each row.

    Source: FaithfulSAE (arXiv 2506.17673), its generation settings.
    """

    tokens: int
    context: int = 64
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_sizes(self.tokens, self.context)
        if self.batch_size < 1:
            raise InvalidInputError(f"SelfText(batch_size={self.batch_size}) must be at least 1.")

    @property
    def batch_rows(self) -> int:
        """Rows that are written at once."""
        return self.batch_size

    def describe(self) -> dict[str, Json]:
        """The fields, with the kind of source."""
        return {"source": "self_text", **asdict(self)}

    def packing(self, tokenizer: TokenizerLike) -> Packing:
        """Each row is what the model writes after its start tokens."""
        start = start_ids(tokenizer)
        named = f"token (id {start[0]})"
        if len(start) > 1:
            named = f"tokens {decoded(tokenizer, start)} (ids {list(start)})"
        return Packing(
            row_start=f"start {named}, as prompt",
            separator="none added: a row is one text, with what the model writes after its own end token",
            crosses_documents=False,
            starts_with_bos=True,
        )

    def n_rows(self) -> int:
        """Number of rows."""
        return -(-self.tokens // self.context)

    def batches(self, model: Model, start_row: int = 0) -> Iterator[PackedRows]:
        """Writes the rows from `start_row` on, batch by batch."""
        start = torch.tensor(start_ids(model.tokenizer))
        if len(start) >= self.context:
            raise InvalidInputError(
                f"SelfText(context={self.context}): the model's texts start from {counted(len(start), 'tokens')}, so "
                f"rows of {self.context} hold no text. Raise context."
            )
        for first in range(start_row, self.n_rows(), self.batch_size):
            n = min(self.batch_size, self.n_rows() - first)
            prompt = start.expand(n, -1).contiguous()
            new = model.sample(
                prompt, self.context - len(start), seed=self.seed, temperature=1.0, first_row=first
            ).cpu()
            rows = torch.arange(first, first + n)[:, None].expand(n, self.context)
            yield PackedRows(torch.cat([prompt, new], dim=1), rows.contiguous())


@checked
@dataclass(frozen=True, eq=False)
class TokenRows(OneLine):
    """Rows of token ids as given; each row is a document."""

    ids: Int[Tensor, "rows context"]
    batch_rows: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.ids, Tensor):
            raise InvalidInputError(f"TokenRows: a {type(self.ids).__name__} was given; give an int64 tensor of rows.")
        if self.ids.ndim != 2 or self.ids.shape[1] < 2 or self.ids.dtype != torch.long:
            raise InvalidInputError(
                f"TokenRows: ids have shape {tuple(self.ids.shape)} and {self.ids.dtype}; give int64 (rows, "
                "context >= 2)."
            )
        check_sizes(1, self.context, self.batch_rows)

    @property
    def context(self) -> int:
        """Tokens per row."""
        return self.ids.shape[1]

    def describe(self) -> dict[str, Json]:
        """Shape and hash of the ids."""
        digest = hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()
        return {"source": "token_rows", "shape": list(self.ids.shape), "sha256": digest}

    def packing(self, tokenizer: TokenizerLike) -> Packing:  # noqa: ARG002
        """Nothing is added."""
        return Packing(row_start="as given", separator="none: a row is one document", crosses_documents=False)

    def n_rows(self) -> int:
        """Number of rows."""
        return self.ids.shape[0]

    def batches(self, model: Model, start_row: int = 0) -> Iterator[PackedRows]:  # noqa: ARG002
        """The rows from `start_row` on."""
        for first in range(start_row, self.n_rows(), self.batch_rows):
            ids = self.ids[first : first + self.batch_rows]
            yield PackedRows(ids, torch.arange(first, first + len(ids))[:, None].expand(ids.shape).contiguous())


class _Documents(OneLine, abc.ABC):
    """A source of documents that are packed into rows."""

    tokens: int | None
    context: int
    batch_rows: int

    @abc.abstractmethod
    def _texts(self) -> Iterator[str]: ...

    def packing(self, tokenizer: TokenizerLike) -> Packing:
        return packing_of_text(tokenizer)

    def batches(self, model: Model, start_row: int = 0) -> Iterator[PackedRows]:
        """The packed rows from `start_row` on; earlier documents are read again and skipped."""
        return packed(
            self._texts(), model.tokenizer, context=self.context, batch_rows=self.batch_rows, tokens=self.tokens,
            start_row=start_row,
        )  # fmt: skip


@checked
@dataclass(frozen=True)
class TextFiles(_Documents):
    """Documents from files: a text file is one, each line of a `.jsonl` file, each row of a `.parquet` file.

    Documents are packed one after the other into rows of `context` tokens, an end token after each; nothing is padded
    and less than one row is lost at the end. A row starts with what the tokenizer puts in front of a text, such as BOS.
    Attention crosses document borders inside a row.

    Attributes:
        paths: the files, in order; a folder or a pattern such as `data/*.parquet` stands for its files, by name.
        tokens: stop after so many; None takes all.
        column: name of the text in `.jsonl` lines and `.parquet` files.
    """

    paths: str | Path | Sequence[str | Path]
    tokens: int | None = None
    context: int = 128
    column: str = "text"
    batch_rows: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.paths, str | Path) and not self.paths:
            raise DegenerateInputError("TextFiles: there are no paths. Name a .txt, .jsonl or .parquet file.")
        check_sizes(self.context if self.tokens is None else self.tokens, self.context, self.batch_rows)
        object.__setattr__(self, "paths", text_files(self.paths))

    def describe(self) -> dict[str, Json]:
        """The fields, with the hash of each file in place of its path."""
        files: list[Json] = []
        for path in text_files(self.paths):
            with path.open("rb") as file:
                files.append({"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
        rest: dict[str, Json] = {name: value for name, value in asdict(self).items() if name != "paths"}
        return {"source": "text_files", "files": files, **rest}

    def n_rows(self) -> int | None:
        """About how many: three bytes of text make a token."""
        about = sum(about_tokens(path, self.column) for path in text_files(self.paths))
        return -(-min(self.tokens or about, about) // self.context)

    def _texts(self) -> Iterator[str]:
        return (text for path in text_files(self.paths) for text in documents(path, self.column))


@checked
@dataclass(frozen=True)
class HubDataset(_Documents):
    """Documents from a Hugging Face data set (or a local folder of one), streamed and packed as in `TextFiles`.

    Attributes:
        name: id on the hub, or a folder.
        revision: version of the data set; name one for a result that can be made again.
    """

    name: str
    split: str = "train"
    column: str = "text"
    tokens: int = 1_000_000  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower, and frozen
    context: int = 128
    revision: str | None = None
    batch_rows: int = 256

    def __post_init__(self) -> None:
        check_sizes(self.tokens, self.context, self.batch_rows)

    def describe(self) -> dict[str, Json]:
        """The fields, with the kind of source."""
        return {"source": "hub_dataset", **asdict(self)}

    def n_rows(self) -> int:
        """Number of rows, if the data set is long enough."""
        return -(-self.tokens // self.context)

    def _require_reachable(self) -> None:
        """Asks the hub once; the library would try again for half a minute, and its cache can't be streamed."""
        if Path(self.name).exists():
            return
        try:
            reason = unreachable(self.name, self.revision, "dataset")
        except ModelUnavailableError as error:
            raise InvalidInputError(
                f"HubDataset({self.name!r}) can't be read: it is no folder here. {error}"
            ) from error
        if reason is not None:
            raise InvalidInputError(
                f"HubDataset({self.name!r}) can't be read: it is no folder here, and the Hugging Face hub can't be "
                f"reached ({reason}). Where there is a network, run `hf download {self.name} --repo-type dataset "
                "--local-dir FOLDER`, and give FOLDER here; TextFiles reads text files."
            )

    def _texts(self) -> Iterator[str]:
        for number, record in enumerate(self.records()):
            if self.column not in record:
                raise InvalidInputError(
                    f"{self.name} has no column {self.column!r}. {did_you_mean(self.column, list(record))} Set column=."
                )
            if not isinstance(record[self.column], str):
                raise InvalidInputError(
                    f"{self.name}, row {number} of {self.split!r}, has {type(record[self.column]).__name__} in "
                    f"{self.column!r}, not text. Set column=, or leave such rows out of the data set."
                )
            yield record[self.column]

    def records(self) -> Iterator[Record]:
        """The rows as the library streams them; a folder that its `save_to_disk` wrote is opened as such."""
        from datasets import DatasetDict, load_dataset, load_from_disk

        self._require_reachable()
        folder = Path(self.name)
        try:
            if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
                saved = load_from_disk(self.name)
                stream: Any = saved[self.split] if isinstance(saved, DatasetDict) else saved
            else:
                with quiet_libraries(), task(total=None, description=f"Opening {self.name}"):
                    stream = load_dataset(self.name, split=self.split, streaming=True, revision=self.revision)
            yield from stream
        except Exception as error:  # the library and what it fetches with raise errors of many kinds
            raise InvalidInputError(
                f"HubDataset({self.name!r}, split={self.split!r}, revision={self.revision!r}) can't be read: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} Check the name, the split "
                "and the connection."
            ) from error
