"""Confident next-token predictions of a corpus: what unsupervised discovery looks for circuits of.

Source: Marks et al. 2024 (arXiv 2403.19647), section 5, after Michaud et al. 2023. Thresholds are in nats.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.pairs import Pairs
from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.html import Shown
from workbench.core.numbers import counted
from workbench.core.progress import Task, task
from workbench.core.tokenizer import affixes, decoded, require_unicode, special_ids, text_ids
from workbench.core.tokens import TokenBatch
from workbench.engine.keeper import Keeper
from workbench.models.model import Model

if TYPE_CHECKING:
    import pandas as pd

SHORT, SPECIAL, UNSURE, REPEAT, OTHER = (
    "context too short", "special token", "loss above the limit", "repeats a bigram of its context",
    "another sample of the document",
)  # fmt: skip
DOCUMENTS_AT_ONCE = 16
"""Documents of one kept part."""
REASONS = (SHORT, SPECIAL, UNSURE, REPEAT, OTHER)
"""Why a token is no sample; the first that applies counts."""


@checked
@dataclass(frozen=True, kw_only=True)
class SampleOptions(OneLine):
    """Which predictions are samples.

    Attributes:
        loss_max: largest loss, in nats per token.
        context: tokens of context at most, the tokenizer's prefix included; a longer document is cut into windows.
        min_context: tokens of context at least.
        drop_induction: leave out answers that the context has shown already: the bigram of its last token and the
            answer occurs in it before.
        one_per_document: keep one sample of each document, any with the same probability.
        windows_per_document: windows of a document that are looked at, drawn at random; None takes all. With one sample
            per document the others cost time and bring nothing.
        limit: stop at so many samples; None takes all.
        batch_size: windows per forward pass.
        seed: of the choice within documents.
    """

    loss_max: float = 0.1
    context: int = 64
    min_context: int = 8
    drop_induction: bool = True
    one_per_document: bool = True
    windows_per_document: int | None = 2
    limit: int | None = 8192
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.loss_max > 0:
            raise InvalidInputError(f"SampleOptions(loss_max={self.loss_max}): give a loss above 0, in nats.")
        if not 1 <= self.min_context <= self.context:
            raise InvalidInputError(
                f"SampleOptions(context={self.context}, min_context={self.min_context}): min_context is at least 1 and "
                "at most context."
            )
        for name in ("batch_size", "limit", "windows_per_document"):
            if (n := getattr(self, name)) is not None and n < 1:
                raise InvalidInputError(f"SampleOptions({name}={n}): it must be at least 1.")


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class Samples(Shown):
    """Contexts with the token that the model is sure comes next.

    Attributes:
        contexts: the contexts, padded on the left.
        answers: the next token of each.
        losses: its loss given this context, in nats.
        documents: number of the document in the order of the texts, from 0.
        positions: place of the answer among the document's own tokens, from 0.
        n_tokens: tokens that were looked at.
        n_documents: documents that they are of.
        dropped: how many tokens were no sample, by reason; with the samples they add up to `n_tokens`.
    """

    how_to_make: ClassVar[str] = "circuits.find_samples(model, texts) finds samples."
    contexts: TokenBatch
    answers: Int[Tensor, " samples"]
    losses: Float[Tensor, " samples"]
    documents: Int[Tensor, " samples"]
    positions: Int[Tensor, " samples"]
    n_tokens: int
    n_documents: int
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.answers)

    def pairs(self, rows: Sequence[int] | slice = slice(None)) -> Pairs:
        """Some of the samples as prompts with one answer and without counterparts, for effects and circuits."""
        every = Pairs(self.contexts, None, self.answers[:, None], note="confident next-token predictions")
        return every[rows]

    def chosen(self, rows: Sequence[int]) -> Samples:
        """Some of the samples; what was left out stays counted for all."""
        index = torch.as_tensor(rows, dtype=torch.long)
        own = {name: getattr(self, name)[index] for name in ("losses", "documents", "positions")}
        there = index.to(self.answers.device)
        return replace(self, contexts=self.contexts[there], answers=self.answers[there], **own)

    @property
    def fingerprint(self) -> str:
        """Changes with any context or answer; 12 hexadecimal digits."""
        rows = [row.tolist() for row in self.contexts.rows()]
        return hashlib.sha256(f"{rows} {self.answers.tolist()}".encode()).hexdigest()[:12]

    def frame(self) -> pd.DataFrame:
        """One row per sample: document, place, context and answer as text, loss, tokens of context."""
        import pandas as pd

        tokenizer = self.contexts.tokenizer

        def text(ids: list[int]) -> str:
            return str(ids) if tokenizer is None else decoded(tokenizer, ids)

        return pd.DataFrame(
            {
                "document": self.documents.tolist(), "position": self.positions.tolist(),
                "context": [text(row.tolist()) for row in self.contexts.rows()],
                "answer": [text([i]) for i in self.answers.tolist()], "loss": self.losses.tolist(),
                "tokens": self.contexts.lengths.tolist(),
            }
        )  # fmt: skip

    def _shown_line(self) -> str:
        left_out = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items() if n)
        return (
            f"{counted(len(self), 'samples')} of {counted(self.n_tokens, 'tokens')} in "
            f"{counted(self.n_documents, 'documents')}; left out: {left_out or 'none'}"
        )


@checked
def find_samples(
    model: Model, texts: Iterable[str], *, options: SampleOptions | None = None, folder: str | Path | None = None
) -> Samples:
    """Predictions of which the model is sure, from any number of texts; one batch of windows is in memory.

    The loss of an answer is that given exactly the context that is returned. The result does not depend on
    `batch_size` beyond rounding.

    Args:
        model: the model.
        texts: documents; may be a generator that never ends, if there is a limit.
        options: which predictions are samples.
        folder: keeps the samples of finished documents, so that a stopped call continues when it is given again.

    Raises:
        MismatchError: if the folder holds samples of another model or other options.
        DegenerateInputError: if there is no sample.
        InvalidInputError: for a text with half a character, or a context that the model can't hold.
    """
    options = options or SampleOptions()
    if model.max_tokens is not None and options.context >= model.max_tokens:
        raise InvalidInputError(
            f"find_samples(context={options.context}): {model.name} reads at most {model.max_tokens} tokens, answer "
            "included. Lower context."
        )
    with task(total=options.limit, description="Looking for confident predictions", unit="samples") as bar:
        if folder is None:
            return _joined(model, _look(model, texts, options, 0, bar))
        with Keeper.open(folder, {"model": model.fingerprint, "options": replace(options, batch_size=1)}) as keep:
            return _joined(model, _in_parts(model, texts, options, keep, bar))


@dataclass(frozen=True)
class _Block:
    """What some documents gave."""

    samples: tuple[_Sample, ...]
    dropped: dict[str, int]
    n_tokens: int
    n_documents: int

    def joined(self, other: _Block) -> _Block:
        """Both."""
        return _Block(
            (*self.samples, *other.samples), dict(Counter(self.dropped) + Counter(other.dropped)),
            self.n_tokens + other.n_tokens, self.n_documents + other.n_documents,
        )  # fmt: skip


def _in_parts(model: Model, texts: Iterable[str], options: SampleOptions, keep: Keeper, bar: Task) -> _Block:
    """What the documents give, some at a time; each part is kept under its number and the hash of its documents."""
    documents, first, found = iter(texts), 0, _Block((), {}, 0, 0)
    while block := list(islice(documents, DOCUMENTS_AT_ONCE)):
        rest = None if options.limit is None else options.limit - len(found.samples)
        if rest == 0:
            break
        digest = hashlib.sha256("\0".join([str(rest), *block]).encode("utf-8", "surrogatepass")).hexdigest()[:12]
        name, some = f"documents-{first:07d}-{digest}", replace(options, limit=rest)
        is_kept = keep.has(name)
        part = keep.once(name, _Block, lambda: _look(model, block, some, first, bar))  # noqa: B023 - called at once
        if is_kept:
            bar.skip(len(part.samples))
        found, first = found.joined(part), first + len(block)
    return found


def _look(model: Model, texts: Iterable[str], options: SampleOptions, first: int, bar: Task) -> _Block:
    """What the documents give, numbered from `first`."""
    found = _Found(options, special_ids(model.tokenizer))
    for batch in _batches(_windows(model, texts, options, first), options.batch_size):
        before = len(found.samples)
        for window, losses in zip(batch, _losses(model, batch), strict=True):
            if not found.is_full:
                found.add(window, losses)
        bar.advance(len(found.samples) - before)
        if found.is_full:
            break
    if not found.is_full:
        found.close()
    return _Block(tuple(found.samples), dict(found.dropped), found.n_tokens, found.n_documents)


@dataclass(frozen=True)
class _Window:
    """A piece of a document, with what the tokenizer puts in front.

    Attributes:
        ids: prefix and tokens.
        prefix: how many of them are the prefix.
        start: place of the first token in the document.
    """

    document: int
    ids: list[int]
    prefix: int
    start: int


@dataclass(frozen=True)
class _Sample:
    document: int
    context: list[int]
    answer: int
    loss: float
    position: int


def _windows(model: Model, texts: Iterable[str], options: SampleOptions, first: int) -> Iterator[_Window]:
    """The windows of the documents in order, or some of each; no token is in two of them, the prefix apart."""
    prefix = list(affixes(model.tokenizer).prefix)
    width = options.context + 1 - len(prefix)
    if width < 2:
        raise InvalidInputError(
            f"find_samples(context={options.context}): the tokenizer puts {len(prefix)} tokens in front of a text, so "
            "no context is left. Raise context."
        )
    for document, text in enumerate(texts, first):
        require_unicode(text, f"Document {document} (from 0)")
        ids = text_ids(model.tokenizer, text)
        starts, most = range(0, len(ids), width), options.windows_per_document
        if most is not None and len(starts) > most:
            starts = sorted(random.Random(f"{options.seed}/{document}/windows").sample(starts, most))
        for start in starts:
            yield _Window(document, [*prefix, *ids[start : start + width]], len(prefix), start)


def _batches(windows: Iterator[_Window], size: int) -> Iterator[list[_Window]]:
    waiting: list[_Window] = []
    for window in windows:
        waiting.append(window)
        if len(waiting) == size:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _losses(model: Model, windows: Sequence[_Window]) -> list[list[float]]:
    """Loss of each token of each window given those before it; nan for the first, which has none."""
    longest = max(len(window.ids) for window in windows)
    if longest < 2:
        return [[float("nan")] * len(window.ids) for window in windows]
    batch = TokenBatch.pad([window.ids for window in windows], 0).to(model.device)
    losses = model.loss(batch).cpu()
    # padding is on the left, so the losses of a window are the last ones of its row
    return [
        [float("nan"), *row[len(row) + 1 - len(window.ids) :].tolist()]
        for row, window in zip(losses, windows, strict=True)
    ]


class _Found:
    """Samples so far, and why the other tokens are none; reads windows one by one, so batches don't matter."""

    def __init__(self, options: SampleOptions, special: Iterable[int]) -> None:
        self.options, self.special = options, frozenset(special)
        self.samples: list[_Sample] = []
        self.dropped: Counter[str] = Counter()
        self.n_tokens, self.n_documents = 0, 0
        self._document: int | None = None
        self._random = random.Random()
        self._chosen: _Sample | None = None
        self._suitable = 0

    @property
    def is_full(self) -> bool:
        """Whether there are as many samples as asked for."""
        return self.options.limit is not None and len(self.samples) >= self.options.limit

    def add(self, window: _Window, losses: Sequence[float]) -> None:
        """Looks at every token of a window."""
        if window.document != self._document:
            self.close()
            if self.is_full:
                return
            self._document, self._random = window.document, random.Random(f"{self.options.seed}/{window.document}")
            self.n_documents += 1
        ids, seen = window.ids, set[tuple[int, int]]()
        for t, answer in enumerate(ids):
            if t >= 2:
                seen.add((ids[t - 2], ids[t - 1]))
            if t < window.prefix:
                continue
            self.n_tokens += 1
            reason = self._reason(ids[:t], answer, losses[t], seen)
            if reason is not None:
                self.dropped[reason] += 1
                continue
            self._take(_Sample(window.document, ids[:t], answer, losses[t], window.start + t - window.prefix))
            if self.is_full:
                return

    def close(self) -> None:
        """Ends the document: the one of its samples that was chosen counts."""
        if self._chosen is not None:
            self.samples.append(self._chosen)
            self.dropped[OTHER] += self._suitable - 1
        self._chosen, self._suitable = None, 0

    def _reason(self, context: Sequence[int], answer: int, loss: float, seen: set[tuple[int, int]]) -> str | None:
        if len(context) < self.options.min_context:
            return SHORT
        if answer in self.special or context[-1] in self.special:
            return SPECIAL
        if not loss < self.options.loss_max:
            return UNSURE
        return REPEAT if self.options.drop_induction and (context[-1], answer) in seen else None

    def _take(self, sample: _Sample) -> None:
        if not self.options.one_per_document:
            self.samples.append(sample)
            return
        self._suitable += 1
        if self._random.random() * self._suitable < 1:  # each so far with the same probability
            self._chosen = sample


def _joined(model: Model, found: _Block) -> Samples:
    if not found.samples:
        why = ", ".join(f"{n} {reason}" for reason, n in Counter(found.dropped).most_common())
        raise DegenerateInputError(
            f"find_samples: none of {counted(found.n_tokens, 'tokens')} is a sample: {why or 'there is no text'}. "
            "Raise loss_max, lower min_context, or give more text."
        )
    kept = found.samples
    contexts = TokenBatch.pad([sample.context for sample in kept], 0, "contexts of confident predictions")
    numbers = {
        name: torch.tensor([getattr(sample, name) for sample in kept]) for name in ("document", "position", "answer")
    }
    return Samples(
        contexts=replace(contexts, tokenizer=model.tokenizer).to(model.device),
        answers=numbers["answer"].to(model.device), documents=numbers["document"], positions=numbers["position"],
        losses=torch.tensor([sample.loss for sample in kept]),
        n_tokens=found.n_tokens, n_documents=found.n_documents,
        dropped={reason: found.dropped.get(reason, 0) for reason in REASONS},
    )  # fmt: skip
