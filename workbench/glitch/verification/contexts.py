"""Whether tokens are copied in the midst of other ones; a prompt that holds nothing but the token is an easier one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from workbench.core.errors import DegenerateInputError
from workbench.core.stats import Estimate
from workbench.engine.log import Log
from workbench.glitch.reporting import rate
from workbench.glitch.verification.prompts import Template, TokenPrompt, prompt_set
from workbench.glitch.verification.scoring import VERIFIED, VerifyOptions, score
from workbench.glitch.verification.verify import Outcome, Outcomes
from workbench.glitch.vocabulary.tokenizer import Vocabulary
from workbench.models.model import Model

LINE = TokenPrompt(
    "line", "A typist copies each line word by word.\nLine: «table» «green» «walking»\nCopy: «table» «green» «walking»",
    "\nLine: «{token}» «{token}» «{token}» «{token}» «{token}»\nCopy: «{token}» «{token}»", " «{token}»",
)  # fmt: skip
"""Five tokens to copy; the one in question is the third, and the copy has come as far as that."""
N_WORDS = 4


@dataclass(frozen=True)
class InContext(Outcome):
    """One token among other ones.

    Attributes:
        p: its probability where its turn has come, by line; nan where the model gives no number.
    """

    p: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the lines; nan without a number."""
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
class Contexts(Outcomes[InContext]):
    """Tokens and controls among the other tokens of the same `lines`; they stand between the second and the third."""

    lines: tuple[tuple[int, ...], ...]
    control_failures: Estimate | None


@dataclass(frozen=True, eq=False)
class Lines:
    """Lines to copy as prompts, each with a slot for the token in question; `words` are the ids of the others."""

    templates: tuple[Template, ...]
    words: tuple[tuple[int, ...], ...]


def make_lines(model: Model, vocabulary: Vocabulary, pool: Sequence[int], n: int, seed: int = 0) -> Lines:
    """Lines of random ordinary tokens, each of at least three letters; they begin words where there are enough such.

    Tokens that will be tested should not be in the `pool`.

    Raises:
        DegenerateInputError: if the pool has too few words, the line can't be built for this tokenizer, or it is longer
            than the model's table of positions.
    """
    plain = [i for i in sorted(pool) if len(text := vocabulary.text[i].strip()) > 2 and text.isalpha()]
    begun = [i for i in plain if vocabulary.text[i][:1].isspace()]
    plain = begun if len(begun) >= 2 * N_WORDS else plain
    if len(plain) < 2 * N_WORDS:
        raise DegenerateInputError(
            f"There are {len(plain)} ordinary tokens of at least three letters to put beside the tokens; "
            f"{2 * N_WORDS} are needed."
        )
    (made,) = prompt_set(model, vocabulary, (LINE,), "raw", strict=True).templates
    random = np.random.default_rng([seed, 2])
    words = tuple(tuple(random.choice(plain, N_WORDS, replace=False).tolist()) for _ in range(n))
    lines = []
    for k, (a, b, c, d) in enumerate(words):
        ids = made.ids.clone()
        ids[made.slots[[0, 1, 3, 4, 5, 6]]] = torch.tensor([a, b, c, d, a, b])
        lines.append(replace(made, prompt=replace(made.prompt, name=f"line {k}"), ids=ids, slots=made.slots[[2]]))
    return Lines(tuple(lines), words)


def in_contexts(
    model: Model, lines: Lines, candidates: Sequence[int], controls: Sequence[int],
    options: VerifyOptions | None = None, journal: Log | None = None,
) -> Contexts:  # fmt: skip
    """Asks the model to copy every line with each token in it; exact probabilities, by id.

    All tokens get the same lines. Of the options only the batch size counts: the token must come at once. The journal
    is made with `journal_key` for these lines.
    """
    options = line_options(options or VerifyOptions())
    tokens = torch.as_tensor([*candidates, *controls], dtype=torch.long)
    p = score(model, lines.templates, tokens, options, journal).p[:, :, 0]
    tested = tuple(InContext(i, k >= len(candidates), tuple(p[k].tolist())) for k, i in enumerate(tokens.tolist()))
    failures = rate((one.failed for one in tested if one.control and np.isfinite(one.median)), "control tokens")
    return Contexts(tested, lines.words, failures)


def line_options(options: VerifyOptions) -> VerifyOptions:
    """The options with one step, and every line."""
    return replace(options, steps=1, stop_at=None)
