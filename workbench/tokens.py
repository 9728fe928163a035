"""Text or chat to ids: the one place that decides about BOS and padding, and shows what it decided."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import DegenerateInputError, InvalidInputError, ShapeError

Chat = Sequence[Mapping[str, str]]
Bos = Literal["auto"] | bool


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Token ids of a batch, left-padded, with everything that a forward pass needs.

    Attributes:
        ids: token ids; padding columns hold `pad_id` and are False in `mask`.
        mask: True at real tokens. Padding is known from here, never from the ids.
        str_tokens: the text of each real token, one tuple per row.
        note: what was done about BOS, templates and padding, in words.
        special: True at BOS and other special tokens that were put in front of the text.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    str_tokens: tuple[tuple[str, ...], ...] = ()
    note: str = ""
    special: Bool[Tensor, "batch pos"] | None = None

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
        special = None if self.special is None else self.special[rows][:, keep]
        strings = self.str_tokens
        if strings:
            chosen = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
            strings = tuple(strings[i] for i in chosen)
        return TokenBatch(ids[:, keep], mask[:, keep], strings, self.note, special)

    def rows(self) -> list[Int[Tensor, " pos"]]:
        """The real tokens of each row, without padding."""
        return [ids[mask] for ids, mask in zip(self.ids, self.mask, strict=True)]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        special = None if self.special is None else self.special.to(device)
        return TokenBatch(self.ids.to(device), self.mask.to(device), self.str_tokens, self.note, special)

    def hf(self) -> dict[str, Tensor]:
        """Keyword arguments for the Hugging Face model, position ids included."""
        return {"input_ids": self.ids, "attention_mask": self.mask.long(), "position_ids": self.positions}

    def __repr__(self) -> str:
        shown = "; ".join("|".join(row[:12]) + ("|…" if len(row) > 12 else "") for row in self.str_tokens[:3])
        return (
            f"TokenBatch({len(self)} rows, {self.n_tokens} tokens, width {self.ids.shape[1]}: {shown!r}; {self.note})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr><td>" + "</td><td>".join(f"<sub>{i}</sub> {html.escape(repr(t)[1:-1])}" for i, t in enumerate(row))
            for row in self.str_tokens[:8]
        )
        return f"<div>{html.escape(self.note)}<table>{rows}</table></div>"


def _is_chat(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], Mapping)


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer puts a BOS in front of a text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _encode_text(tokenizer: Any, text: str, bos: Bos) -> tuple[list[int], str]:
    bos_id = tokenizer.bos_token_id
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    wanted = adds_bos(tokenizer) if bos == "auto" else bool(bos)
    if not wanted:
        return ids, "no BOS added" + (" (this tokenizer adds none)" if bos == "auto" else "")
    if bos_id is None:
        raise InvalidInputError("tokens(bos=True): this tokenizer has no BOS token. Use bos='auto' or bos=False.")
    if ids[:1] == [bos_id]:
        return ids, "the text already starts with BOS; none added"
    return [bos_id, *ids], "BOS added"


def encode(tokenizer: Any, value: str | Sequence[str] | Chat | Sequence[Chat], bos: Bos = "auto") -> TokenBatch:
    """Token ids of a text, a list of texts, a chat, or a list of chats.

    Args:
        tokenizer: a Hugging Face tokenizer.
        value: what to encode. Chats go through the tokenizer's template with the generation prompt.
        bos: "auto" follows the tokenizer's habit; True and False overrule it. A second BOS is never added.

    Raises:
        DegenerateInputError: for an empty list or a text that encodes to nothing.
        InvalidInputError: for a chat without a template, or BOS without a BOS token.
    """
    items: list[Any] = [value] if isinstance(value, str) or _is_chat(value) else list(value)
    if not items:
        raise DegenerateInputError("tokens([]): there is no text. Give a text, a list of texts, or chat messages.")
    rows, notes = [], []
    for item in items:
        if isinstance(item, str):
            ids, note = _encode_text(tokenizer, item, bos)
        elif _is_chat(item):
            ids, note = _encode_chat(tokenizer, item), "chat template with generation prompt; the template decides BOS"
        else:
            raise InvalidInputError(f"tokens: cannot encode {type(item).__name__}; give text or chat messages.")
        if not ids:
            raise DegenerateInputError(f"tokens: {item!r} encodes to no tokens. Remove it or set bos=True.")
        rows.append(ids)
        notes.append(note)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    padded = len({len(row) for row in rows}) > 1
    note = "; ".join(dict.fromkeys(notes)) + ("; left-padded" if padded else "; no padding")
    batch = TokenBatch.pad(rows, pad, note)
    special = torch.isin(batch.ids, torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)) & batch.mask
    strings = tuple(tuple(tokenizer.decode([i]) for i in row) for row in rows)
    return TokenBatch(batch.ids, batch.mask, strings, note, special)


def _encode_chat(tokenizer: Any, chat: Chat) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError("tokens(chat): this tokenizer has no chat template. Give plain text instead.")
    text = tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
