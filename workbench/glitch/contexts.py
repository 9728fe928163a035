"""Whether tokens are copied in the midst of other ones; a prompt that holds nothing but the token is an easier one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workbench.errors import DegenerateInputError
from workbench.glitch.prompts import Probe, Template, template
from workbench.glitch.scoring import VERIFIED, greedy_logits, target_probabilities
from workbench.glitch.tokenizer import Vocabulary
from workbench.progress import task
from workbench.stats import Estimate, clopper_pearson

LINE = Probe(
    "line", "A typist copies each line word by word.\nLine: «table» «green» «walking»\nCopy: «table» «green» «walking»",
    "\nLine: «{token}» «{token}» «{token}» «{token}» «{token}»\nCopy: «{token}» «{token}»", " «{token}»",
)  # fmt: skip
"""Five words to copy; the token is the third, and the copy has come as far as that."""
N_WORDS = 4


@dataclass(frozen=True)
class InContext:
    """One token among other words.

    Attributes:
        token_id: which token.
        control: whether it is a random control.
        p: its probability where its turn has come, by context; nan where the model gives no number.
    """

    token_id: int
    control: bool
    p: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the contexts; nan without a number."""
        p = np.array(self.p)
        return float(np.median(p[np.isfinite(p)])) if np.isfinite(p).any() else float("nan")

    @property
    def span(self) -> tuple[float | None, float | None]:
        """Lowest and highest probability; None without a number."""
        p = [x for x in self.p if np.isfinite(x)]
        return (min(p), max(p)) if p else (None, None)

    @property
    def failed(self) -> bool:
        """Whether the median lies below the threshold of verification."""
        return self.median < VERIFIED


@dataclass(frozen=True)
class Contexts:
    """Tokens and controls among other words.

    Attributes:
        tested: all tokens, controls last.
        lines: ids of the words of each line; the token stands between the second and the third.
        control_failures: share of the controls that fail; None without controls that have a number.
    """

    tested: tuple[InContext, ...]
    lines: tuple[tuple[int, ...], ...]
    control_failures: Estimate | None

    @property
    def candidates(self) -> tuple[InContext, ...]:
        """Those that are not controls."""
        return tuple(found for found in self.tested if not found.control)


def in_contexts(
    model: Any,
    vocabulary: Vocabulary,
    candidates: Sequence[int],
    controls: Sequence[int],
    pool: Sequence[int],
    *,
    n: int,
    seed: int = 0,
    batch_size: int = 32,
) -> Contexts:
    """Asks the model to copy lines of ordinary tokens with each token among them; exact probabilities, by id.

    The tokens beside are of letters, at least three of them, and begin a word where the vocabulary has enough of those.

    Args:
        model: a `Model`.
        vocabulary: of its tokenizer.
        candidates: ids under suspicion.
        controls: ids of ordinary tokens, which go through the same lines.
        pool: ordinary tokens from which those beside are drawn.
        n: number of lines; all tokens get the same ones.
        seed: of the words.
        batch_size: prompts per forward pass.

    Raises:
        DegenerateInputError: if the pool has too few words, the line can't be built for this tokenizer, or it is longer
            than the model's table of positions.
    """
    words = _words(vocabulary, set(pool) - {*candidates, *controls}, n, seed)
    made = template(LINE, vocabulary, lambda text: model.tokens(text).ids[0].tolist())
    room = getattr(model, "n_positions", None)
    if room is not None and len(made.ids) > room:
        raise DegenerateInputError(f"A line to copy needs {len(made.ids)} positions; the model has {room}.")
    tokens = torch.tensor([*candidates, *controls])
    p = np.full((len(tokens), n), np.nan)
    with task(total=p.size, description="copy in context", unit="prompts") as running:
        for k in range(n):
            for start in range(0, len(tokens), batch_size):
                part = tokens[start : start + batch_size]
                logits = next(greedy_logits(model, _lines(made, words[k], part), 1, shared=made.shared))
                p[start : start + len(part), k] = target_probabilities(logits, part).double().numpy()
                running.advance(len(part))
    tested = tuple(InContext(int(i), k >= len(candidates), tuple(p[k].tolist())) for k, i in enumerate(tokens.tolist()))
    counted = [found.failed for found in tested if found.control and np.isfinite(found.median)]
    failures = clopper_pearson(sum(counted), len(counted), unit="control tokens") if counted else None
    return Contexts(tested, tuple(tuple(line) for line in words.tolist()), failures)


def _words(vocabulary: Vocabulary, pool: set[int], n: int, seed: int) -> torch.Tensor:
    plain = [i for i in sorted(pool) if len(text := vocabulary.text[i].strip()) > 2 and text.isalpha()]
    begun = [i for i in plain if vocabulary.text[i][:1].isspace()]
    plain = begun if len(begun) >= 2 * N_WORDS else plain
    if len(plain) < 2 * N_WORDS:
        raise DegenerateInputError(
            f"There are {len(plain)} ordinary tokens of at least three letters to put beside the tokens; "
            f"{2 * N_WORDS} are needed."
        )
    random = np.random.default_rng([seed, 2])
    return torch.from_numpy(np.stack([random.choice(plain, N_WORDS, replace=False) for _ in range(n)]))


def _lines(made: Template, words: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    rows = made.fill(tokens)
    rows[:, made.slots[[0, 1, 3, 4]]] = words
    rows[:, made.slots[[5, 6]]] = words[:2]
    return rows
