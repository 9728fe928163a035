"""Checks that run the method on functions whose truth is known: axioms, planted truth, and what a path can't answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.doctor.attribution import Attribution, Method
from circuits.doctor.report import Check, inapplicable, judged

ITEMS = 12
"""Items of each planted function."""
MIN_MASS, MAX_DEVIATION = 0.8, 1e-4
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Planted:
    """A function of items with an input and a baseline, and the effects that are true.

    Attributes:
        name: for people.
        f: from rows of items to a number each.
        x: the input.
        baseline: the items of the baseline.
        truth: sign of the effect of each item that has one; 0 for the others.
    """

    name: str
    f: Function
    x: Tensor
    baseline: Tensor
    truth: Tensor


def planted(seed: int = 0) -> list[Planted]:
    """Known weights, an injected cue, a block of signal beside a block of nothing, and the latest write."""
    g = torch.Generator().manual_seed(seed)
    x = 0.5 + torch.rand(ITEMS, generator=g, dtype=torch.float64)
    baseline = torch.zeros_like(x)
    weights = torch.zeros_like(x)
    weights[[1, 4, 9]] = torch.tensor([1.5, -1.0, 0.7], dtype=torch.float64)
    cue = 0.05 * torch.randn(ITEMS, generator=g, dtype=torch.float64)
    cue[7] = 4.0
    tilted = torch.zeros_like(x)
    tilted[7] = 1.0
    found = [
        Planted("known weights", lambda v: v @ weights, x, baseline, -torch.sign(weights)),
        Planted("injected cue", lambda v: torch.sigmoid(v @ cue - 2.0), x, baseline, -tilted),
    ]
    for start in (0, ITEMS // 2):  # the signal may come first or second
        block = torch.zeros_like(x)
        block[start : start + ITEMS // 2] = torch.rand(ITEMS // 2, generator=g, dtype=torch.float64) + 0.5
        found.append(
            Planted(f"signal block at {start}", lambda v, b=block: torch.tanh(v @ b), x, baseline, -torch.sign(block))
        )
    # Items in pairs: value written, and whether there is a write; the latest write counts.
    flags = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    written = x.clone()
    written[1::2] = flags
    other = written.clone()
    other[::2] = 0.0
    truth = torch.zeros_like(x)
    truth[6] = -1.0
    found.append(Planted("latest write", _latest, written, other, truth))
    return found


def _latest(v: Tensor) -> Tensor:
    """Value of the last item pair whose flag is 1, smooth in both."""
    values, flags = v[:, ::2], v[:, 1::2]
    later = torch.ones_like(flags[:, 0])
    total = torch.zeros_like(later)
    for k in reversed(range(values.shape[1])):
        total = total + values[:, k] * flags[:, k] * later
        later = later * (1 - flags[:, k])
    return total


def truth(group: Sequence[Attribution]) -> list[Check]:
    """Check 9: share of the scores' absolute mass that lies on true items with the true sign; the rest is leak."""
    method = group[0].method
    if method is None:
        return [inapplicable(9, group[0].why.get(9, "the method itself was not given, only its scores"))]
    checks = []
    for one in planted():
        scores = method(one.f, one.x, one.baseline).double()
        whole = float(scores.abs().sum())
        right = float((scores * one.truth).clamp_min(0).sum())
        leak = float(scores[one.truth == 0].abs().sum())
        share = right / whole if whole > 0 else 0.0
        why = "The method does not find what was planted."
        checks.append(judged(9, f"mass on the truth, {one.name}", share, MIN_MASS, why=why))
        checks.append(Check(number=9, part=f"leak, {one.name}", value=leak / whole if whole > 0 else 0.0))
    return checks


def axioms(group: Sequence[Attribution]) -> list[Check]:
    """Check 2: linearity, dummy and symmetry, on functions of a few items, relative to the largest score."""
    method = group[0].method
    if method is None:
        why = "the method itself was not given, only its scores"
        return [inapplicable(2, group[0].why.get(9, why), "linearity, dummy, symmetry")]
    x = torch.tensor([0.8, 0.8, 0.5, 1.1, 0.3, 0.9], dtype=torch.float64)
    baseline = torch.zeros_like(x)

    def f(v: Tensor) -> Tensor:
        return torch.tanh(v[:, 0] + v[:, 1]) + 0.3 * v[:, 2] * v[:, 3]

    def g(v: Tensor) -> Tensor:
        return torch.sin(v[:, 2]) + v[:, 4] ** 2 + 0.1 * v[:, 0] * v[:, 1]

    of_f, of_g = method(f, x, baseline), method(g, x, baseline)
    of_both = method(lambda v: 2 * f(v) - 3 * g(v), x, baseline)
    size = float(torch.stack([of_f, of_g, of_both]).abs().max())
    deviations = {
        "linearity": float((of_both - 2 * of_f + 3 * of_g).abs().max()),
        "dummy": float(torch.stack([of_f[5], of_g[5], of_f[4]]).abs().max()),
        "symmetry": float((of_f[0] - of_f[1]).abs()),
    }
    why = "The method breaks an axiom on a toy function: look for an error in it."
    return [
        judged(2, name, off / size if size > 0 else math.inf, MAX_DEVIATION, "at most", why)
        for name, off in deviations.items()
    ]


SLOPES = (0.16, -0.48)
"""`x + a sin(2 pi x)`: both functions are 0 at 0 and 1 at 1, and their slopes at 1 are +2.0 and -2.0."""


def slope(method: Method, name: str) -> str:
    """What to say of a method that scores functions of opposite local slope alike; "" if it tells them apart."""
    x, baseline = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    first, second = (
        float(method(lambda v, a=a: v[:, 0] + a * torch.sin(2 * math.pi * v[:, 0]), x, baseline)[0]) for a in SLOPES
    )
    if abs(first - second) > 0.05 * max(abs(first), abs(second), 1e-30):
        return ""
    return (
        f"{name} cannot answer slope: it gives the same score to two functions whose local slopes are +2 and -2. What "
        "a small change does is answered by making it (circuits.edits_needed says how many to make)."
    )
