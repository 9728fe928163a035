"""Text or chat to ids: the one place that decides about BOS and padding, and shows what it decided."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.chats import Chat, is_chat, rendered
from workbench.core.display import clipped
from workbench.core.errors import DegenerateInputError, InvalidInputError, ShapeError
from workbench.core.html import Shown, tokens_line
from workbench.core.numbers import counted
from workbench.core.tokenizer import Affixes, TokenizerLike, affixes, decoded, pieces, special_ids, text_ids

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

Bos = Literal["auto"] | bool


@runtime_checkable
class Column(Protocol):
    """A column of a table, as `df["text"]` of pandas is; its labels come out again in frames."""

    @property
    def index(self) -> Any:  # a pandas Index
        """The labels of the rows."""
        ...

    def tolist(self) -> list[Any]:  # of whatever the column holds
        """The values."""
        ...

    def items(self) -> Iterable[tuple[Any, Any]]:
        """Labels with values."""
        ...


_SHOWN_ROWS, _SHOWN_TOKENS = 8, 64


@checked
@dataclass(frozen=True, eq=False)
class TokenBatch(Shown):
    """Token ids of a batch, left-padded, with everything that a forward pass needs.

    Attributes:
        ids: token ids; padding columns hold `pad_id` and are False in `mask`.
        mask: True at real tokens. Padding is known from here, never from the ids.
        note: what was done about BOS and other prefixes, templates and padding, in words.
        index: labels of the rows, where the texts were a column of a table; frames of results have them again.
    """

    how_to_make: ClassVar[str] = "model.tokens(texts) makes a TokenBatch."
    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    note: str = ""
    tokenizer: TokenizerLike | None = None
    index: pd.Index | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.mask.shape:
            raise ShapeError(
                f"TokenBatch: ids {tuple(self.ids.shape)} and mask {tuple(self.mask.shape)} must both be (batch, pos)."
            )
        if self.ids.numel() == 0 or not bool(self.mask.any(dim=1).all()):
            raise DegenerateInputError(
                f"TokenBatch: shape {tuple(self.ids.shape)} holds a row without any token. Remove the empty texts."
            )

    @classmethod
    def of_rows(cls, ids: Int[Tensor, "batch pos"]) -> TokenBatch:
        """A batch of equally long rows, without padding."""
        return cls(ids, torch.ones_like(ids, dtype=torch.bool), note="token ids as given; no BOS added; no padding")

    @classmethod
    def pad(cls, rows: Sequence[Sequence[int]], pad_id: int, note: str = "") -> TokenBatch:
        """Left-pads rows of ids to the longest.

        >>> TokenBatch.pad([[5, 6], [7]], pad_id=0).ids.tolist()
        [[5, 6], [0, 7]]
        """
        width = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for i, row in enumerate(rows):
            if row:
                ids[i, width - len(row) :] = torch.as_tensor(row, dtype=torch.long)
                mask[i, width - len(row) :] = True
        return cls(ids, mask, note=note)

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Absolute position of each token in its row; 0 at padding."""
        return (self.mask.long().cumsum(1) - 1).clamp_min(0)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of real tokens per row."""
        return self.mask.sum(1)

    @property
    def n_tokens(self) -> int:
        """Number of real tokens in the batch."""
        return int(self.mask.sum())

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice | Int[Tensor, " chosen"]) -> TokenBatch:
        ids, mask = self.ids[rows], self.mask[rows]
        keep = slice(ids.shape[1] - int(mask.sum(1).max()), None)
        index = self.index
        if index is not None:
            index = index[rows if isinstance(rows, slice) else rows.cpu().numpy()]
        return replace(self, ids=ids[:, keep], mask=mask[:, keep], index=index)

    @functools.cached_property
    def str_tokens(self) -> tuple[tuple[str, ...], ...]:
        """The text of each real token, one tuple per row: joined, a row is its decoded text; empty without a tokenizer.

        A character that several tokens make up belongs to the last of them.
        """
        return () if not self.tokenizer else tuple(pieces(self.tokenizer, row.tolist()) for row in self.rows())

    @functools.cached_property
    def special(self) -> Bool[Tensor, "batch pos"] | None:
        """True at special tokens, and at all that the tokenizer puts around a text; None without a tokenizer."""
        if not self.tokenizer:
            return None
        return torch.isin(self.ids, torch.tensor(special_ids(self.tokenizer), device=self.ids.device)) & self.mask

    def rows(self) -> list[Int[Tensor, " pos"]]:
        """The real tokens of each row, without padding."""
        return [ids[mask] for ids, mask in zip(self.ids, self.mask, strict=True)]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))

    def hf(self) -> dict[str, Tensor]:
        """Keyword arguments for the Hugging Face model, position ids included."""
        return {"input_ids": self.ids, "attention_mask": self.mask.long(), "position_ids": self.positions}

    def _shown(self, rows: int, tokens: int) -> list[tuple[str, ...]]:
        """The texts of the first tokens of the first rows, `…` where there are more."""
        if not self.tokenizer:
            return []
        start = [pieces(self.tokenizer, row[:tokens].tolist()) for row in self[:rows].rows()]
        return [(*row, "…") if int(n) > tokens else row for row, n in zip(start, self.lengths[:rows], strict=True)]

    def frame(self) -> pd.DataFrame:
        """One row per real token, labelled by the row of the batch: position, id, text, whether it is special."""
        special = self.special
        columns = {
            "position": self.positions[self.mask].tolist(),
            "id": self.ids[self.mask].tolist(),
            "token": [token for tokens in self.str_tokens for token in tokens] or None,
            "is_special": None if special is None else special[self.mask].tolist(),
        }
        known = {name: values for name, values in columns.items() if values is not None}
        return labelled(known, self.index, self.mask.nonzero()[:, 0].tolist())

    def _shown_line(self) -> str:
        shown = "; ".join("|".join(row) for row in self._shown(3, 12))
        size = f"{counted(len(self), 'rows')}, {counted(self.n_tokens, 'tokens')}, width {self.ids.shape[1]}"
        return f"{size}: {clipped(repr(shown), 120)}; {self.note}"

    def _shown_note(self) -> str:
        return f"{counted(len(self), 'rows')}, {counted(self.n_tokens, 'tokens')}; {self.note}"

    def _shown_parts(self) -> Iterable[Markup]:
        for row in self._shown(_SHOWN_ROWS, _SHOWN_TOKENS):
            yield tokens_line(row, titles=[f"position {i}" for i in range(len(row))])


def labelled(columns: Mapping[str, object], index: pd.Index | None, rows: Sequence[int]) -> pd.DataFrame:
    """A pandas table whose index says to which row of a batch each of its rows belongs.

    Args:
        columns: values by name of the column.
        index: labels of the rows of the batch; None numbers them.
        rows: the row of the batch that each row of the table is about.
    """
    import pandas as pd

    return pd.DataFrame(columns, index=pd.Index(rows, name="row") if index is None else index[list(rows)])


def _encode_text(tokenizer: TokenizerLike, text: str, bos: Bos, around: Affixes | None) -> tuple[list[int], str]:
    ids = text_ids(tokenizer, text)
    if around is None:
        return ids, "no BOS added"
    prefix = around.prefix
    if bos is True and not prefix:
        if tokenizer.bos_token_id is None:
            raise InvalidInputError(
                "tokens(bos=True): this tokenizer has no BOS token and puts nothing in front of a text. Use bos='auto' "
                "or bos=False."
            )
        prefix = (int(tokenizer.bos_token_id),)
    note = _prefix_note(tokenizer, prefix, ids)
    if around.suffix:
        note += f"; {decoded(tokenizer, around.suffix)} of the tokenizer left off, so that the text stays open"
    return [*prefix[: len(prefix) - _present(prefix, ids)], *ids], note


def _present(prefix: Sequence[int], ids: Sequence[int]) -> int:
    """How much of the prefix's end the text itself starts with: it is not put there twice."""
    return next((n for n in range(len(prefix), 0, -1) if list(ids[:n]) == list(prefix[-n:])), 0)


def _prefix_note(tokenizer: TokenizerLike, prefix: Sequence[int], ids: Sequence[int]) -> str:
    if not prefix:
        return "no BOS added (this tokenizer adds none)"
    name = "BOS" if tuple(prefix) == (tokenizer.bos_token_id,) else f"prefix {decoded(tokenizer, prefix)}"
    missing = len(prefix) - _present(prefix, ids)
    if not missing:
        return f"the text already starts with {name}; none added"
    return f"{name} added" + ("" if missing == len(prefix) else ", of which the text has the end already")


def encode(
    tokenizer: TokenizerLike,
    value: str | Sequence[str] | Chat | Sequence[Chat] | Column,
    bos: Bos = "auto",
    **template_options: object,
) -> TokenBatch:
    """Token ids of a text, a list of texts, a chat, a list of chats, or a column of a table that holds them.

    With `bos="auto"` a text begins with what the tokenizer puts in front of it: BOS, several tokens such as
    `[gMASK]<sop>`, or nothing. True does the same, and adds BOS where the tokenizer adds none; False adds nothing. What
    the text starts with already is not added again. What a tokenizer puts behind a text (`</s>`, `[SEP]`) is left off,
    since a prompt is to be continued. Chats go through the tokenizer's template with the generation prompt, which
    decides about BOS.

    Raises:
        DegenerateInputError: for an empty list or a text that encodes to nothing.
        InvalidInputError: for a chat that the template can't or does not write, an option that it does not know, BOS
            without a BOS token, or a text with half a character.
    """
    index = value.index if isinstance(value, Column) else None
    value = value.tolist() if isinstance(value, Column) else value
    items = cast("list[str | Chat]", [value] if isinstance(value, str) or is_chat(value) else list(value))
    if not items:
        raise DegenerateInputError("tokens([]): there is no text. Give a text, a list of texts, or chat messages.")
    rows, notes = [], []
    around = affixes(tokenizer) if bos is not False and any(isinstance(item, str) for item in items) else None
    for item in items:
        if isinstance(item, str):
            if template_options:
                raise InvalidInputError(
                    f"tokens({', '.join(template_options)}): these are options of a chat template, and {item[:40]!r} "
                    "is a text. Give chat messages, or leave them out."
                )
            ids, note = _encode_text(tokenizer, item, bos, around)
        elif is_chat(item):
            ids = text_ids(tokenizer, rendered(tokenizer, item, template_options))
            note = "chat template with generation prompt; the template decides BOS"
        else:
            raise InvalidInputError(f"tokens: cannot encode {type(item).__name__}; give text or chat messages.")
        if not ids:
            raise DegenerateInputError(f"tokens: {item!r} encodes to no tokens. Remove it or set bos=True.")
        rows.append(ids)
        notes.append(note)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    padded = len({len(row) for row in rows}) > 1
    options = "".join(f"; {name}={value!r}" for name, value in template_options.items())
    note = "; ".join(dict.fromkeys(notes)) + options + ("; left-padded" if padded else "; no padding")
    return replace(TokenBatch.pad(rows, pad, note), tokenizer=tokenizer, index=index)
