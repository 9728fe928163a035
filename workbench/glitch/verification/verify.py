"""Does the model say the token when everything asks for it? Exact probabilities, with random tokens as control."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.core.codec import Codec
from workbench.core.numbers import setting
from workbench.core.stats import Estimate
from workbench.engine.log import Log
from workbench.glitch.reporting import rate
from workbench.glitch.verification.prompts import Template, prompt_hash
from workbench.glitch.verification.scoring import (
    VERIFIED,
    Scores,
    VerifyOptions,
    dtype_name,
    highest,
    require_numbers,
    score,
)
from workbench.models.model import Model


@dataclass(frozen=True)
class Outcome:
    """The result of one token, which is under suspicion or a random control."""

    token_id: int
    control: bool

    @property
    def role(self) -> str:
        """Why it was tested."""
        return "control" if self.control else "candidate"


T = TypeVar("T", bound=Outcome)


@dataclass(frozen=True)
class Outcomes(Generic[T]):
    """Results of tokens and controls, tested alike; controls come after candidates."""

    tested: tuple[T, ...]

    @property
    def candidates(self) -> tuple[T, ...]:
        """The tokens under suspicion."""
        return tuple(one for one in self.tested if one.role == "candidate")

    @property
    def controls(self) -> tuple[T, ...]:
        """The random ordinary tokens."""
        return tuple(one for one in self.tested if one.control)

    def of(self, token_id: int) -> T | None:
        """The result of one token, or None if it was not tested."""
        return self._by_token.get(token_id)

    @functools.cached_property
    def _by_token(self) -> dict[int, T]:
        return {one.token_id: one for one in self.tested}


VERDICTS: dict[str, str] = {
    "strong_verified": "p < 0.001 everywhere: the model cannot say it",
    "weak_verified": "p < 0.01 everywhere",
    "not_encodable": "p < 0.01, but no text gives the token in these prompts",
    "not_finite": "the model gives no number: a row with NaN or infinity",
    "borderline": "0.01 <= p < 0.1 at best",
    "weak_rejected": "0.1 <= p < 0.9 at best",
    "strong_rejected": "p >= 0.9 at best: the model copies it",
    "untested": "not run",
}
"""Every verdict with its meaning. Where testing stops at the first success, a rejected token's p is a lower bound."""
RULE = (
    f"A token is called under-trained only if no prompt of any form that was run, and no step, gives it p >= "
    f"{VERIFIED}: said once, raw or in chat form, it is cleared."
)
"""How several forms make one verdict."""
_QUANTILES = (0.01, 0.05, 0.25, 0.5)


@dataclass(frozen=True)
class PromptScore:
    """One token at one prompt: the highest probability over the steps that were run (None: no number), and the step."""

    form: str
    prompt: str
    p: float | None
    step: int


@dataclass(frozen=True, kw_only=True)
class Tested(Outcome):
    """One token's result.

    Attributes:
        max_prob: its highest probability over the prompts and steps that were run; nan if there is no number.
        passes: number of (prompt, step) passes that were run.
        encodable: whether some filled prompt, as text, encodes to this token again; looked at where p < 0.01.
        form: the form of that prompt, raw or chat: how the verdict was reached.
        p_value: share of controls (with this token as one more) whose highest probability is not above this token's;
            None for controls, without controls, and where testing stopped early.
    """

    max_prob: float
    prompt: str
    passes: int
    encodable: bool
    verdict: str
    form: str = "raw"
    scores: tuple[PromptScore, ...] = ()
    p_value: float | None = None
    spliced: bool = False

    @property
    def role(self) -> str:
        """Why it was tested."""
        return "spliced" if self.spliced else super().role

    @property
    def verified(self) -> bool:
        """Whether no pass reached the threshold."""
        return self.max_prob < VERIFIED

    def best_in(self, form: str) -> float | None:
        """Highest probability in one form, None if it was not run."""
        return max((s.p for s in self.scores if s.form == form and s.p is not None), default=None)

    @property
    def cleared_by_chat(self) -> bool:
        """Whether every raw prompt fails and a chat prompt does not."""
        raw = self.best_in("raw")
        return raw is not None and raw < VERIFIED <= self.max_prob


@dataclass(frozen=True, kw_only=True)
class Verification(Outcomes[Tested]):
    """Candidates, controls and spliced tokens, tested alike.

    Attributes:
        expected_false: verified candidates to expect by that error alone: rate and interval, times candidates.
        failures_by_form: share of controls that fail every prompt of one form, where all of it was run.
        passes: forward passes counted in prompts.
    """

    control_failures: Estimate | None = None
    expected_false: Estimate | None = None
    control_quantiles: dict[str, float] = field(default_factory=dict)
    failures_by_form: dict[str, Estimate] = field(default_factory=dict)
    passes: int
    dtype: str
    model_hash: str
    prompt_hash: str
    forms: tuple[str, ...]
    options: VerifyOptions
    notes: tuple[str, ...] = ()

    @property
    def counted_controls(self) -> tuple[Tested, ...]:
        """The controls that the model gives a number for: those that say something about the test."""
        return tuple(t for t in self.controls if not np.isnan(t.max_prob))

    @property
    def spliced(self) -> tuple[Tested, ...]:
        """Suspicious tokens that no text gives; in no count of the candidates."""
        return tuple(t for t in self.tested if t.spliced)


def verify(
    model: Model, codec: Codec, templates: Sequence[Template], candidates: Sequence[int], controls: Sequence[int],
    options: VerifyOptions | None = None, journal: Log | None = None,
) -> Verification:  # fmt: skip
    """Tests candidates and controls with the same prompts in the same batches.

    The codec checks that a prompt's text gives the token again; the journal is made with `journal_key`.

    Raises:
        DegenerateInputError: if the model gives no number for any token.
    """
    options = options or VerifyOptions()
    ids = torch.as_tensor([*candidates, *controls], dtype=torch.long)
    scores = score(model, templates, ids, options, journal)
    require_numbers(scores.best)
    encodable = _encodable(codec, templates, ids, scores.best)
    tested = tuple(
        _tested(i, k >= len(candidates), templates, scores, k, bool(encodable[k])) for k, i in enumerate(ids.tolist())
    )
    key = journal_key(model, templates, options)
    return _graded(Verification(
        tested, passes=int(scores.passes.sum()), dtype=key["dtype"], model_hash=key["model"],
        prompt_hash=key["prompts"], forms=tuple(dict.fromkeys(made.form for made in templates)), options=options,
    ))  # fmt: skip


def with_spliced(
    done: Verification, model: Model, templates: Sequence[Template], tokens: Sequence[int], journal: Log | None = None
) -> Verification:
    """The verification with tokens that no text gives, put into the prompts by their ids; no count of it changes."""
    ids = torch.as_tensor(tokens, dtype=torch.long)
    scores = score(model, templates, ids, done.options, journal)
    more = (_tested(i, False, templates, scores, k, True) for k, i in enumerate(ids.tolist()))
    more = tuple(dataclasses.replace(t, encodable=False, spliced=True, p_value=_p_value(t, done)) for t in more)
    return dataclasses.replace(done, tested=done.tested + more, passes=done.passes + int(scores.passes.sum()))


def journal_key(model: Model, templates: Sequence[Template], options: VerifyOptions) -> dict[str, str]:
    """What results depend on: model, prompts, dtype, steps and when testing stops."""
    return {
        "model": model.fingerprint, "prompts": prompt_hash(templates), "dtype": dtype_name(model),
        "steps": str(options.steps), "stop_at": str(options.stop_at),
    }  # fmt: skip


def verdict(p: float, encodable: bool = True) -> str:
    """The label of a highest probability.

    >>> verdict(0.0005), verdict(0.005), verdict(0.05), verdict(0.5), verdict(0.95), verdict(0.005, encodable=False)
    ('strong_verified', 'weak_verified', 'borderline', 'weak_rejected', 'strong_rejected', 'not_encodable')
    >>> verdict(float("nan"))
    'not_finite'
    """
    if np.isnan(p):
        return "not_finite"
    if p >= VERIFIED:
        return "strong_rejected" if p >= 0.9 else "weak_rejected" if p >= 0.1 else "borderline"
    if not encodable:
        return "not_encodable"
    return "strong_verified" if p < VERIFIED / 10 else "weak_verified"


def _tested(i: int, control: bool, templates: Sequence[Template], scores: Scores, k: int, encodable: bool) -> Tested:
    each = []
    for t, made in enumerate(templates):
        if scores.ran[k, t].any():
            p = highest(scores.p[k : k + 1, t])[0]
            step = int(np.nan_to_num(scores.p[k, t], nan=-1.0).argmax())
            each.append(PromptScore(made.form, made.prompt.name, None if np.isnan(p) else float(p), step))
    best, at = float(scores.best[k]), templates[int(scores.where[k])]
    return Tested(
        token_id=i, control=control, max_prob=best, prompt=at.prompt.name, passes=int(scores.passes[k]),
        encodable=encodable, verdict=verdict(best, encodable), form=at.form, scores=tuple(each),
    )  # fmt: skip


def _graded(done: Verification) -> Verification:
    """With the controls' rate of failure and, where every probability is known in full, quantiles and p-values."""
    controls, unit = done.counted_controls, "control tokens"
    failures = rate((t.verified for t in controls), unit)
    if failures is None:
        return done
    n = len(done.candidates)
    expected = dataclasses.replace(
        failures, value=n * failures.value, low=n * failures.low, high=n * failures.high,
        method=f"{failures.method}, times {n} candidates",
    )  # fmt: skip
    done = dataclasses.replace(done, control_failures=failures, expected_false=expected)
    if done.options.stop_at is not None:
        return done
    best = np.array([t.max_prob for t in controls])
    quantiles = {f"{setting(100 * q)}%": float(np.quantile(best, q)) for q in _QUANTILES}
    in_form = {form: [p for t in controls if (p := t.best_in(form)) is not None] for form in done.forms}
    by_form = {form: share for form, ps in in_form.items() if (share := rate((p < VERIFIED for p in ps), unit))}
    tested = tuple(t if t.control else dataclasses.replace(t, p_value=_p_value(t, done)) for t in done.tested)
    return dataclasses.replace(done, tested=tested, control_quantiles=quantiles, failures_by_form=by_form)


def _p_value(token: Tested, done: Verification) -> float | None:
    controls = done.counted_controls
    if done.options.stop_at is not None or not controls or np.isnan(token.max_prob):
        return None
    below = sum(t.max_prob <= token.max_prob for t in controls)
    return (below + 1) / (len(controls) + 1)


def _encodable(codec: Codec, templates: Sequence[Template], tokens: Int[Tensor, " n"], best: np.ndarray) -> np.ndarray:
    """Whether a prompt's text gives the token again, for those whose verdict depends on it; True for the others."""
    encodable = ~(best < VERIFIED)
    for template in templates:
        left = np.flatnonzero(~encodable)
        again = codec.encode(codec.decode(template.fill(tokens[left]).tolist()))
        encodable[left] = [i in set(ids) for i, ids in zip(tokens[left].tolist(), again, strict=True)]
    return encodable
