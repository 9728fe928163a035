"""A local model as judge, by its log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import InvalidInputError
from workbench.core.tokenizer import continuation, text_ids
from workbench.judges.protocol import JUDGES, Answer, Question
from workbench.models.model import Model

_BEFORE = "Rating:"


@checked
@JUDGES.register("logprob")
@dataclass(frozen=True, eq=False)
class LogProbJudge(OneLine):
    """A local model, read by the probabilities of the digits as the next token and never by the text it writes.

    The answer is the mean of the digits on the scale, weighted by their probabilities: for yes and no,
    P("1") / (P("0") + P("1")).

    Attributes:
        model: who judges.
        batch: prompts per forward pass.
    """

    model: Model
    batch: int = 16

    @property
    def name(self) -> str:
        """The model's name."""
        return f"log-probabilities of {self.model.name}"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One graded answer per question.

        Raises:
            InvalidInputError: if the digits do not differ in one token.
        """
        answers: dict[int, Answer] = {}
        for highest in dict.fromkeys(question.highest for question in questions):
            places = [i for i, question in enumerate(questions) if question.highest == highest]
            texts = [questions[i].text for i in places]
            answers.update(zip(places, self._graded(texts, highest), strict=True))
        return [answers[i] for i in range(len(questions))]

    def _graded(self, texts: Sequence[str], highest: int) -> Iterator[Answer]:
        shared, ids = self._digits(highest)
        digits = torch.arange(highest + 1.0)
        for start in range(0, len(texts), self.batch):
            began = time.perf_counter()
            batch = self.model.tokens([text + shared for text in texts[start : start + self.batch]])
            means = (self.model.logits(batch, tokens=ids).softmax(-1).cpu() @ digits).tolist()
            seconds = (time.perf_counter() - began) / len(means)
            lengths = batch.mask.sum(1).tolist()
            for mean, length in zip(means, lengths, strict=True):
                yield Answer(value=mean, judge=self.name, tokens=int(length), seconds=seconds)

    def _digits(self, highest: int) -> tuple[str, list[int]]:
        """What stands between a prompt and the digit, and the ids of the digits."""
        # Behind a text, since alone a SentencePiece tokenizer would put a second space in front.
        before = text_ids(self.model.tokenizer, _BEFORE)
        every = [text_ids(self.model.tokenizer, f"{_BEFORE} {d}")[len(before) :] for d in range(highest + 1)]
        first, *others = every
        if any(ids[:-1] != first[:-1] for ids in others) or len({ids[-1] for ids in every}) < len(every):
            raise InvalidInputError(
                f"The tokenizer of {self.model.name} writes the digits 0 to {highest} behind a space as {every}, "
                "which do not differ in their last token alone. Use another judge."
            )
        return continuation(self.model.tokenizer, before, first[:-1]), [ids[-1] for ids in every]
