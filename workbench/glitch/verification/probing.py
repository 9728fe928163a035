"""One short copying prompt for every token: what it costs is a few positions, since all prompts begin alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench.core.errors import DegenerateInputError
from workbench.core.numbers import counted, number, rounding_error, setting
from workbench.engine.log import Log
from workbench.glitch.verification.prompts import Template, TokenPrompt, prompt_hash
from workbench.glitch.verification.scoring import (
    VERIFIED,
    VerifyOptions,
    dtype_name,
    greedy_logits,
    probabilities_in,
    require_numbers,
    score,
    target_probabilities,
)
from workbench.glitch.verification.verify import journal_key
from workbench.models.model import Model

SHORT_FILE, CONFIRMED_FILES = "short.jsonl", "confirmed-*.jsonl"
SHORT = TokenPrompt(
    "short",
    "Whatever stands in the first pair of quotes is written into the second pair, letter by letter.\n"
    "From «lantern» to «lantern»\nFrom « seventeen» to « seventeen»\nFrom «==>» to «==>»\nFrom «Qu» to «Qu»\n"
    "From « Müller» to « Müller»\nFrom «",
    "{token}» to",
    " «{token}»",
)  # fmt: skip
"""The prompt of a census: the examples are the same for every token, so that only the last line is computed again."""

AGAIN = TokenPrompt(
    "again",
    "Each line holds the same text three times.\n«lantern» «lantern» «lantern»\n"
    "« seventeen» « seventeen» « seventeen»\n«==>» «==>» «==>»\n«Qu» «Qu» «Qu»\n« Müller» « Müller» « Müller»\n«",
    "{token}» «{token}»",
    " «{token}»",
)  # fmt: skip
"""A second prompt as cheap as the first: most tokens that one short prompt fails by accident pass the other."""

MAX_DIFFERENCE = 1e-3
"""How far probabilities in bfloat16 may be from those in float32 for bfloat16 to be used."""
_N_SAMPLED = 64


class Prober:
    """The highest probability that a model gives to each token, measured once per token and remembered.

    The short prompt comes first. Only a token that fails it is asked for with the `confirm` prompts, so a token that
    the model can say costs a few positions, and none is called a glitch token for one prompt's sake. Without them the
    short prompt decides. A token whose probability is not a number has probability 0: the model cannot say it. Results
    are kept in the `folder`, in short.jsonl and in a file for each set of other prompts; None keeps them in memory.

    Attributes:
        short: probability in the short prompt by id, up to `n_ids`; nan where it was not run.
        best: highest probability over all prompts and steps by id; nan where that is not known yet.
    """

    def __init__(
        self, model: Model, short: Template, n_ids: int, *, confirm: Sequence[Template] = (),
        folder: Path | None = None, batch_size: int = 64,
    ) -> None:  # fmt: skip
        self._model, self._short, self._confirm = model, short, tuple(confirm)
        self._quick = VerifyOptions(steps=1, batch_size=batch_size)
        self._full = VerifyOptions(batch_size=min(batch_size, 32), stop_at=VERIFIED)
        confirmed = CONFIRMED_FILES.replace("*", prompt_hash(confirm))
        self._books = (
            self._book(folder, SHORT_FILE, [short], self._quick),
            self._book(folder, confirmed, confirm, self._full),
        )
        self.short, self.best = np.full(n_ids, np.nan), np.full(n_ids, np.nan)
        for i, row in (self._books[0].done() if self._books[0] else {}).items():
            self._note_short(np.array([i]), np.array([_highest(row, [short])]))
        for i, row in (self._books[1].done() if self._books[1] else {}).items():
            p = _highest(row, self._confirm)
            if p >= VERIFIED or all(made.name in row for made in self._confirm):
                self.best[i] = np.fmax(self.short[i], p)

    def _book(self, folder: Path | None, name: str, made: Sequence[Template], options: VerifyOptions) -> Log | None:
        return Log(folder / name, journal_key(self._model, made, options)) if folder and made else None

    def best_probabilities(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The highest probability of each token, in the order asked.

        What is finished when this is interrupted is in the folder.

        Raises:
            DegenerateInputError: if the model gives no number for any token of a large part.
        """
        asked = np.asarray(ids, dtype=np.int64)
        distinct = asked[np.sort(np.unique(asked, return_index=True)[1])]
        todo = distinct[np.isnan(self.short[distinct])]
        if len(todo):
            p = score(self._model, [self._short], torch.from_numpy(todo), self._quick, self._books[0]).best
            require_numbers(p)
            self._note_short(todo, p)
        failed = distinct[np.isnan(self.best[distinct])]
        if len(failed):
            again = score(self._model, self._confirm, torch.from_numpy(failed), self._full, self._books[1]).best
            self.best[failed] = np.fmax(self.short[failed], np.nan_to_num(again))
        return self.best[asked]

    def is_glitch(self, ids: np.ndarray) -> np.ndarray:
        """Whether no prompt gets the token out of the model: the oracle of a search."""
        return self.best_probabilities(ids) < VERIFIED

    def _note_short(self, ids: np.ndarray, p: np.ndarray) -> None:
        """Settles tokens that pass the short prompt, and all of them if there is no other prompt."""
        self.short[ids] = np.nan_to_num(p)
        settled = ids[(self.short[ids] >= VERIFIED) | (not self._confirm)]
        self.best[settled] = self.short[settled]


def _highest(row: Mapping[str, object], templates: Sequence[Template]) -> float:
    """Highest probability in a row of a journal; 0 where there is no number."""
    return max((p for made in templates for p in probabilities_in(row, made) if p == p), default=0.0)


@dataclass(frozen=True)
class DtypeChoice:
    """In which type of number a census runs, why, and the speed on a sample, without confirmations.

    `difference` is the largest one of a probability between two types; None if only one was measured.
    """

    dtype: str
    tokens_per_second: dict[str, float]
    difference: float | None
    why: str

    def seconds(self, n_tokens: int) -> float:
        """How long the short prompt will take for so many tokens."""
        return n_tokens / self.tokens_per_second[self.dtype]


def choose_dtype(model: Model, template: Template, ids: Sequence[int], *, both: bool = True) -> DtypeChoice:
    """Measures float32 and bfloat16 on at most 64 tokens: the faster one, if it gives the same probabilities.

    The model is left as it is. One that is not in float32, or too large for a second copy, is measured as it is, and so
    is any without `both`.
    """
    tokens = torch.as_tensor(ids[:_N_SAMPLED], dtype=torch.long)
    if not len(tokens):
        raise DegenerateInputError("choose_dtype: no tokens to measure with. Give some ids of ordinary tokens.")
    own = dtype_name(model)
    if not both or own != "float32" or not _has_room(model):
        speed, _ = _measured([model], template, tokens)
        no = "as asked" if not both else "the model came in it" if own != "float32" else "no memory for a second copy"
        return DtypeChoice(own, {own: speed[0]}, None, f"{own}: {no}")
    other = Model(copy.deepcopy(model.hf).bfloat16(), model.tokenizer, model.name)
    speed, p = _measured([model, other], template, tokens)
    difference = float((p[0] - p[1]).abs().max())
    faster = speed[1] > speed[0]
    chosen = "bfloat16" if faster and difference <= MAX_DIFFERENCE else "float32"
    why = (
        f"{chosen}: bfloat16 runs at {number(speed[1] / speed[0])} times the speed, and its probabilities differ by up "
        f"to {rounding_error(difference)} on {counted(len(tokens), 'tokens')} (allowed: {setting(MAX_DIFFERENCE)})"
    )
    return DtypeChoice(chosen, {"float32": speed[0], "bfloat16": speed[1]}, difference, why)


def _measured(models: Sequence[Model], template: Template, tokens: Tensor) -> tuple[list[float], list[Tensor]]:
    """Tokens per second (the faster of two turns each) and probabilities of the tokens, by model."""

    def probabilities(model: Model) -> Tensor:
        (logits,) = greedy_logits(model, template.fill(tokens), 1, shared=template.shared)
        return target_probabilities(logits, tokens)

    p, laps = list(map(probabilities, models)), [float("inf")] * len(models)
    for k, model in [*enumerate(models)] * 2:
        start = time.perf_counter()
        probabilities(model)
        laps[k] = min(laps[k], time.perf_counter() - start)
    return [len(tokens) / lap for lap in laps], p


def _has_room(model: Model) -> bool:
    """Whether a bfloat16 copy fits into free memory of the model's device with as much again to spare."""
    need = 4 * sum(parameter.numel() for parameter in model.hf.parameters())
    if model.device.type == "cuda":
        return need < torch.cuda.mem_get_info(model.device)[0]
    import psutil

    return need < psutil.virtual_memory().available
