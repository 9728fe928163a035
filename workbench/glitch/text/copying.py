"""Does a model copy a text better when its flagged token is cut into pieces? Before and after, with controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workbench.core.errors import DegenerateInputError
from workbench.core.progress import track
from workbench.core.stats import Estimate, paired_difference
from workbench.core.tokens import TokenBatch
from workbench.glitch.text.sanitize import Sanitizer
from workbench.glitch.verification.chat import prompt_set
from workbench.glitch.verification.prompts import PROMPTS, TokenPrompt
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.model import Model


@dataclass(frozen=True)
class Copied:
    """One token before and after.

    Attributes:
        before: log-probability (nats) that the model copies the text when the prompt shows the token: as the token or
            as the pieces, whichever is likelier.
        after: log-probability that it copies the pieces when the prompt shows these.
    """

    token_id: int
    pieces: tuple[int, ...]
    control: bool
    before: float
    after: float


@dataclass(frozen=True)
class CopyCheck:
    """Mean of after - before over flagged tokens (nats; above zero means that cutting helps), and over ordinary ones.

    `not_cut` are ids that have no other segmentation.
    """

    tokens: tuple[Copied, ...]
    not_cut: tuple[int, ...]
    gain: Estimate
    control_gain: Estimate | None


def copy_check(
    model: Model, sanitizer: Sanitizer, tokens: Sequence[int], controls: Sequence[int] = (), *,
    prompt: TokenPrompt = PROMPTS[0], batch_size: int = 16,
) -> CopyCheck:  # fmt: skip
    """Probability of copying each token's text, spliced into a prompt as the token and as its pieces.

    Controls are ordinary tokens, cut as if they were flagged.

    Raises:
        DegenerateInputError: if none of the tokens can be cut, or the prompt can't be built for this tokenizer.
    """
    (made,) = prompt_set(model, analyse(sanitizer.codec), [prompt], "raw", strict=True).templates
    cut = {i: options[0] for i in (*tokens, *controls) if (options := sanitizer.alternatives(int(i)))}
    if not any(i in cut for i in tokens):
        raise DegenerateInputError(
            f"copy_check: none of the {len(tokens)} tokens has another segmentation. Try others."
        )
    rows, targets = [], []
    for i, pieces in cut.items():
        for shown, wanted in (((i,), (i,)), ((i,), pieces), (pieces, pieces)):
            rows.append(made.spelled(shown))
            targets.append(wanted)
    scores = _log_probabilities(model, rows, targets, batch_size)
    copied = tuple(
        Copied(int(i), pieces, i not in set(tokens), max(scores[3 * k], scores[3 * k + 1]), scores[3 * k + 2])
        for k, (i, pieces) in enumerate(cut.items())
    )
    flagged, ordinary = [c for c in copied if not c.control], [c for c in copied if c.control]
    not_cut = tuple(int(i) for i in tokens if i not in cut)
    return CopyCheck(copied, not_cut, _gain(flagged), _gain(ordinary) if ordinary else None)


def _gain(copied: Sequence[Copied]) -> Estimate:
    return paired_difference([c.after for c in copied], [c.before for c in copied], unit="tokens")


def _log_probabilities(
    model: Model, rows: Sequence[list[int]], targets: Sequence[Sequence[int]], batch_size: int
) -> list[float]:
    """Log-probability of each target after its row, nats: the sum over its tokens, each given those before."""
    steps = [(k, n) for k, target in enumerate(targets) for n in range(len(target))]
    steps.sort(key=lambda step: len(rows[step[0]]) + step[1])
    total = [0.0] * len(rows)
    starts = range(0, len(steps), batch_size)
    for start in track(starts, description="copy before and after", unit="batches"):
        part = steps[start : start + batch_size]
        batch = TokenBatch.pad([[*rows[k], *targets[k][:n]] for k, n in part], 0)
        logits = model.logits(batch, keep="last").float()
        scores = logits.log_softmax(-1)
        for row, (k, n) in enumerate(part):
            total[k] += float(scores[row, targets[k][n]])
    return total
