"""Does the model say the token when everything asks for it? Exact probabilities, with random tokens as control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.codec import Codec
from workbench.errors import InvalidInputError
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
    model: Any,
    codec: Codec,
    templates: Sequence[Template],
    candidates: Sequence[int],
    controls: Sequence[int],
    options: VerifyOptions | None = None,
) -> Verification:
    """Tests candidates and controls with the same prompts in the same batches.

    Args:
        model: a `Model`.
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

    Prompt after prompt, each with its greedy steps; a token that reached `stop_at` takes no further part.
    """
    n = len(tokens)
    best, where, passes = np.zeros(n), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    live = np.arange(n)
    with task(total=n, description="verify tokens", unit="tokens") as running:
        for t, template in enumerate(templates):
            before = len(live)
            for start in range(0, len(live), options.batch_size):
                part = live[start : start + options.batch_size]
                found = _best_of_steps(model, template, tokens[part], best[part], options)
                where[part[found[0] > best[part]]] = t
                best[part], passes[part] = np.maximum(best[part], found[0]), passes[part] + found[1]
            if options.stop_at is not None:
                live = live[best[live] < options.stop_at]
            running.advance(before - len(live))
        running.advance(len(live))
    return best, where, passes


def _best_of_steps(
    model: Any, template: Template, targets: Int[Tensor, " batch"], so_far: np.ndarray, options: VerifyOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Highest probability over the steps and the steps run, for one batch; a settled row no longer counts steps."""
    best, passes = so_far.copy(), np.zeros(len(targets), dtype=np.int64)
    live = np.ones(len(targets), dtype=bool)
    for logits in greedy_logits(model, template.fill(targets), options.steps):
        p = target_probabilities(logits, targets).double().numpy()
        passes[live] += 1
        best[live] = np.maximum(best[live], p[live])
        if options.stop_at is not None:
            live &= best < options.stop_at
        if not live.any():
            break
    return best, passes


def greedy_logits(
    model: Any, rows: Int[Tensor, "batch pos"], steps: int, cached: bool = True
) -> Iterator[Float[Tensor, "batch d_vocab"]]:
    """Last-position logits of the rows, then after one greedy token, then after two, and so on.

    With `cached` the prompt is computed once and each step adds one token per row; a model that returns no cache is
    run again over the whole row.
    """
    hf = getattr(model, "hf", None) if cached and steps > 1 else None
    cache: Any = None
    for step in range(steps):
        if hf is None:
            logits = model.logits(TokenBatch.of_rows(rows), keep="last")
        else:
            new = rows if cache is None else rows[:, -1:]
            with torch.no_grad():
                out = hf(input_ids=new.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, cache = out.logits[:, -1], getattr(out, "past_key_values", None)
            if cache is None:
                hf = None
        logits = logits.float().cpu()
        yield logits
        if step + 1 < steps:
            rows = torch.cat([rows, logits.argmax(1)[:, None]], dim=1)


def target_probabilities(
    logits: Float[Tensor, "batch d_vocab"], targets: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Probability of each row's target; softmax in fp32.

    >>> target_probabilities(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    tensor([0.5000, 0.5000])
    """
    chosen = logits.float().gather(1, targets[:, None])[:, 0]
    return (chosen - logits.float().logsumexp(1)).exp()


def _encodable(codec: Codec, templates: Sequence[Template], tokens: Int[Tensor, " n"]) -> np.ndarray:
    found = np.zeros(len(tokens), dtype=bool)
    for template in templates:
        again = codec.encode(codec.decode(template.fill(tokens).tolist()))
        found |= np.array([i in set(ids) for i, ids in zip(tokens.tolist(), again, strict=True)], dtype=bool)
    return found
