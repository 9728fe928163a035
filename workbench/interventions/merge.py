"""Several edits of the form `h + (h U^T) V + b` as one, with the size of each part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.interventions.op import LowRankForm, Where


class Merged:
    """One low-rank edit that equals several in a row: `h + (h U^T + c) V + sum_i b_i`.

    The i-th edit reads what the edits before it have written; its directions are rewritten to read `h` itself. So the
    coordinates of each edit are at hand, and with them the norm of its own change.
    """

    def __init__(self, forms: Sequence[LowRankForm]) -> None:
        self._sizes = [len(form.read) for form in forms]
        biases = [form.bias if form.bias.ndim == 2 else form.bias[None] for form in forms]
        self._biases = [bias if bool((bias != 0).any()) else None for bias in biases]
        read, write = forms[0].read[:0], forms[0].write[:0]
        const, bias = biases[0].new_zeros(1, 0), torch.zeros_like(biases[0][:1])
        for form, own in zip(forms, biases, strict=True):
            # What this edit reads from the changes made so far: U h' with h' = h + (U0 h + c0) V0 + b0.
            through = form.read @ write.T
            added = const @ through.T + bias @ form.read.T
            rows = max(len(const), len(added))
            const = torch.cat([const.expand(rows, -1), added.expand(rows, -1)], 1)
            read = torch.cat([read, form.read + through @ read])
            write = torch.cat([write, form.write])
            bias = bias + own
        self._read, self._write, self._const, self._bias = read, write, const, bias

    @property
    def rank(self) -> int:
        """Number of directions that are read."""
        return len(self._read)

    def __call__(self, h: Float[Tensor, "n d"], where: Where) -> tuple[Tensor, list[Tensor]]:
        """The edited hidden states, and the norm of each edit's own change per token, `(n,)` each."""
        const, bias = (_of_row(t, where, h) for t in (self._const, self._bias))
        coordinates = h @ self._read.to(h).T + const
        out = h + bias
        if self._read.shape[0]:
            out = out + coordinates @ self._write.to(h)
        norms, start = [], 0
        for size, own in zip(self._sizes, self._biases, strict=True):
            part = slice(start, start + size)
            norms.append(self._norm(coordinates[:, part], self._write[part].to(h), own, where))
            start += size
        return out, norms

    def _norm(self, c: Tensor, write: Tensor, bias: Tensor | None, where: Where) -> Tensor:
        if bias is None:
            # |c V|^2 = c (V V^T) c^T: no vector of width d is made.
            return torch.einsum("nk,kl,nl->n", c, write @ write.T, c).clamp_min(0).sqrt()
        if not c.shape[1]:
            return _of_row(bias.norm(dim=1), where, c).expand(len(c))
        return (c @ write + _of_row(bias, where, c)).norm(dim=1)


def _of_row(value: Tensor, where: Where, like: Tensor) -> Tensor:
    """The row's value for each token, or the one for all."""
    value = value.to(like.device)
    return value[where.rows] if len(value) > 1 else value
