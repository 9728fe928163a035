"""Does the model say the token when everything asks for it? Exact probabilities, with random tokens as control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InvalidInputError
from workbench.glitch.codec import Codec
from workbench.glitch.prompts import Template
from workbench.progress import task
from workbench.stats import Estimate, clopper_pearson
from workbench.tokens import TokenBatch

VERIFIED = 0.01
"""A token is verified as under-trained if no prompt and no step gives it this probability (Land and Bartolo 2024)."""
VERDICTS: dict[str, str] = {
    "strong_verified": "p < 0.001 everywhere: the model cannot say it",
    "weak_verified": "p < 0.01 everywhere",
    "not_encodable": "p < 0.01, but no text gives the token in these prompts",
    "borderline": "0.01 <= p < 0.1 at best",
    "weak_rejected": "0.1 <= p < 0.9 at best",
    "strong_rejected": "p >= 0.9 at best: the model copies it",
    "untested": "not run",
}
"""Every verdict with its meaning. A rejected token's p is a lower bound, since testing stops at the first success."""


@dataclass(frozen=True)
class VerifyOptions:
    """How tokens are tested.

    Attributes:
        steps: greedy steps after each prompt; the token may come at any of them.
        batch_size: prompts per forward pass.
        stop_at: a token that reaches this probability is not tested further; None runs everything.
    """

    steps: int = 3
    batch_size: int = 32
    stop_at: float | None = VERIFIED

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or (self.stop_at is not None and self.stop_at < VERIFIED):
            raise InvalidInputError(
                f"VerifyOptions(steps={self.steps}, batch_size={self.batch_size}, stop_at={self.stop_at}): steps and "
                f"batch_size are at least 1; stop_at is at least {VERIFIED} (the threshold) or None."
            )


@dataclass(frozen=True)
class Tested:
    """One token's result.

    Attributes:
        token_id: which token.
        control: whether it is a random control and not a candidate.
        max_prob: its highest probability over the prompts and steps that were run.
        probe: the prompt that gave it.
        passes: number of (prompt, step) passes that were run.
        encodable: whether some filled prompt, as text, encodes to this token again.
        verdict: a key of `VERDICTS`.
    """

    token_id: int
    control: bool
    max_prob: float
    probe: str
    passes: int
    encodable: bool
    verdict: str

    @property
    def verified(self) -> bool:
        """Whether no pass reached the threshold."""
        return self.max_prob < VERIFIED


@dataclass(frozen=True)
class Verification:
    """Candidates and controls, tested alike.

    Attributes:
        tested: all results, candidates first, each in the order asked.
        control_failures: share of controls that fail the test; they are ordinary tokens, so this is its error rate.
        expected_false: verified candidates to expect by that error alone (rate, and its upper bound, times candidates).
        passes: forward passes counted in prompts.
        dtype: in which the model computed.
    """

    tested: tuple[Tested, ...]
    control_failures: Estimate | None
    expected_false: tuple[float, float] | None
    passes: int
    dtype: str

    @property
    def candidates(self) -> tuple[Tested, ...]:
        """The tokens under suspicion."""
        return tuple(t for t in self.tested if not t.control)

    @property
    def controls(self) -> tuple[Tested, ...]:
        """The random ordinary tokens."""
        return tuple(t for t in self.tested if t.control)


def verify(
    model: Any, codec: Codec, templates: Sequence[Template], candidates: Sequence[int], controls: Sequence[int],
    options: VerifyOptions | None = None,
) -> Verification:
    """Tests candidates and controls with the same prompts in the same batches.

    Args:
        model: a `Model`, or anything with `logits(batch, keep="last")`.
        codec: the tokenizer, for the check that a prompt's text gives the token again.
        templates: the prompts as ids.
        candidates: ids under suspicion.
        controls: ids of ordinary tokens.
        options: steps, batch size and when to stop.
    """
    options = options or VerifyOptions()
    ids = torch.as_tensor([*candidates, *controls], dtype=torch.long)
    best, probe, passes = max_probabilities(model, templates, ids, options)
    encodable = _encodable(codec, templates, ids)
    tested = tuple(
        Tested(int(i), k >= len(candidates), float(best[k]), templates[int(probe[k])].probe.name, int(passes[k]),
               bool(encodable[k]), verdict(float(best[k]), bool(encodable[k])))
        for k, i in enumerate(ids.tolist())
    )  # fmt: skip
    failed = sum(t.verified for t in tested if t.control)
    rate = clopper_pearson(failed, len(controls), unit="control tokens") if len(controls) else None
    false = None if rate is None else (rate.value * len(candidates), rate.high * len(candidates))
    dtype = str(getattr(model, "dtype", "unknown")).removeprefix("torch.")
    return Verification(tested, rate, false, int(passes.sum()), dtype)


def verdict(p: float, encodable: bool = True) -> str:
    """The label of a highest probability.

    >>> verdict(0.0005), verdict(0.005), verdict(0.05), verdict(0.5), verdict(0.95), verdict(0.005, encodable=False)
    ('strong_verified', 'weak_verified', 'borderline', 'weak_rejected', 'strong_rejected', 'not_encodable')
    """
    if p >= VERIFIED:
        return "strong_rejected" if p >= 0.9 else "weak_rejected" if p >= 0.1 else "borderline"
    if not encodable:
        return "not_encodable"
    return "strong_verified" if p < VERIFIED / 10 else "weak_verified"


def max_probabilities(
    model: Any, templates: Sequence[Template], tokens: Int[Tensor, " n"], options: VerifyOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Highest probability of each token, the index of the template that gave it, and the passes run for it.

    The first step of every prompt comes before the later steps: a token that any prompt draws out is settled soonest.
    """
    n = len(tokens)
    best, probe, passes = np.zeros(n), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    rows = [template.fill(tokens) for template in templates]
    live = torch.arange(n)
    with task(total=n, description="verify tokens", unit="tokens") as running:
        for _ in range(options.steps):
            for t in range(len(templates)):
                if not len(live):
                    break
                p, greedy = target_probabilities(model, rows[t][live], tokens[live], options.batch_size)
                grown = torch.zeros(n, rows[t].shape[1] + 1, dtype=torch.long)
                grown[live] = torch.cat([rows[t][live], greedy[:, None]], dim=1)
                rows[t] = grown
                where, values = live.numpy(), p.double().numpy()
                passes[where] += 1
                probe[where[values > best[where]]] = t
                best[where] = np.maximum(best[where], values)
                if options.stop_at is not None:
                    still = live[torch.from_numpy(best[where] < options.stop_at)]
                    running.advance(len(live) - len(still))
                    live = still
        running.advance(len(live))
    return best, probe, passes


def target_probabilities(
    model: Any, rows: Int[Tensor, "batch pos"], targets: Int[Tensor, " batch"], batch_size: int
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Probability of each row's target as the next token, and the likeliest next token; softmax in fp32."""
    probabilities, greedy = [], []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        logits = model.logits(TokenBatch.of_rows(rows[part]), keep="last").float().cpu()
        chosen = logits.gather(1, targets[part, None])[:, 0]
        probabilities.append((chosen - logits.logsumexp(1)).exp())
        greedy.append(logits.argmax(1))
    return torch.cat(probabilities), torch.cat(greedy)


def _encodable(codec: Codec, templates: Sequence[Template], tokens: Int[Tensor, " n"]) -> np.ndarray:
    found = np.zeros(len(tokens), dtype=bool)
    for template in templates:
        again = codec.encode(codec.decode(template.fill(tokens).tolist()))
        found |= np.array([i in set(ids) for i, ids in zip(tokens.tolist(), again, strict=True)], dtype=bool)
    return found
