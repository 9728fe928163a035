"""Streaming sums over tokens from which the geometry of a site is computed; memory does not grow with the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.errors import DegenerateInputError


class Moments:
    """The first four moments of each dimension, in fp64 around a fixed point, so that large means cost no digits.

    >>> moments = Moments(torch.zeros(1))
    >>> moments.add(torch.tensor([[1.0], [3.0]]))
    >>> float(moments.mean), float(moments.std)  # std over n
    (2.0, 1.0)
    """

    def __init__(self, around: Float[Tensor, " d"]) -> None:
        self._around = around.double()
        self._sums = torch.zeros(4, len(around), dtype=torch.double)
        self.n = 0

    def add(self, x: Float[Tensor, "n d"]) -> None:
        """Counts some tokens."""
        centred = x.double() - self._around
        power = torch.ones_like(centred)
        for i in range(4):
            power = power * centred
            self._sums[i] += power.sum(0)
        self.n += len(x)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of each dimension."""
        return self._around + self._sums[0] / self.n

    @property
    def std(self) -> Float[Tensor, " d"]:
        """Standard deviation of each dimension, over n."""
        return (self._sums[1] / self.n - (self._sums[0] / self.n) ** 2).clamp_min(0).sqrt()

    @property
    def mean_square(self) -> Float[Tensor, " d"]:
        """Mean square of each dimension, not centred."""
        return self.std**2 + self.mean**2

    @property
    def kurtosis(self) -> Float[Tensor, " d"]:
        """Fourth standardised moment of each dimension: 3 for a Gaussian; 0 where a dimension is constant."""
        m, second, third, fourth = self._sums / self.n
        central = fourth - 4 * third * m + 6 * second * m**2 - 3 * m**4
        variance = self.std**2
        return torch.where(variance > 0, central / variance.clamp_min(1e-300) ** 2, 0.0)


class PositionSums:
    """Normal equations of the regression of a token's position on its state, for train and held-out rows.

    Dimensions are scaled by a first guess of mean and spread; products are taken in fp32 and summed in fp64.
    """

    def __init__(self, mean: Float[Tensor, " d"], std: Float[Tensor, " d"]) -> None:
        self._mean, self._std = mean.float(), std.float().clamp_min(1e-6)
        width = len(mean) + 1
        self._gram = torch.zeros(2, width, width, dtype=torch.double)
        self._cross = torch.zeros(2, width, dtype=torch.double)
        self._target = torch.zeros(2, 3, dtype=torch.double)

    def add(self, x: Float[Tensor, "n d"], positions: Int[Tensor, " n"], held_out: Bool[Tensor, " n"]) -> None:
        """Counts some tokens, each into one of the two sides."""
        scaled = (x.float() - self._mean) / self._std
        z = torch.cat([scaled, torch.ones(len(x), 1)], dim=1)
        for side in (0, 1):
            chosen = held_out if side else ~held_out
            rows, target = z[chosen], positions[chosen].double()
            self._gram[side] += (rows.T @ rows).double()
            self._cross[side] += (rows.T @ target.float()).double()
            self._target[side] += torch.stack([torch.tensor(float(len(target))), target.sum(), (target**2).sum()])

    def r2(self, dims: Int[Tensor, " k"], ridge: float) -> float | None:
        """Share of the variance of the position that is predicted on held-out rows; None without two positions there.

        `ridge` is added to the diagonal, per train token.
        """
        n, total, squares = self._target[1].tolist()
        if not len(dims) or self._target[0][0] < 2 or n < 2 or squares - total**2 / n <= 0:
            return None
        used = torch.cat([dims, torch.tensor([self._gram.shape[1] - 1])])
        penalty = torch.full((len(used),), ridge * float(self._target[0][0]), dtype=torch.double)
        penalty[-1] = 0
        gram, held = (self._gram[side][used][:, used] for side in (0, 1))
        w = torch.linalg.solve(gram + penalty.diag(), self._cross[0][used])
        error = squares - 2 * w @ self._cross[1][used] + w @ held @ w
        return 1 - float(error) / (squares - total**2 / n)


class Reservoir:
    """A uniform sample of tokens with the rows that they stand in."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = torch.Generator().manual_seed(seed)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, x: Float[Tensor, "n d"], rows: Int[Tensor, " n"]) -> None:
        """Offers some tokens."""
        new = (torch.rand(len(x), generator=self._random, dtype=torch.double), x.float(), rows)
        parts = new if self._kept is None else tuple(torch.cat(pair) for pair in zip(self._kept, new, strict=True))
        best = parts[0].topk(min(self._size, len(parts[0]))).indices
        self._kept = (parts[0][best], parts[1][best], parts[2][best])

    def sample(self) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """The tokens and their rows, in random order.

        Raises:
            DegenerateInputError: if nothing was offered.
        """
        if self._kept is None:
            raise DegenerateInputError("There is no token to sample from. Give more or longer texts.")
        return self._kept[1], self._kept[2]


@dataclass(frozen=True)
class Thresholds:
    """What counts as large at a site; fixed on the first batch, so that later tokens are judged as they pass.

    Attributes:
        max_norm: norm above which a token is a sink: ten times the median of ordinary tokens.
        massive: value above which an activation is massive.
    """

    max_norm: float
    massive: float


class ClassCounts:
    """Per class of tokens: how many there are, how many hold a massive activation, how many are sinks."""

    def __init__(self, classes: int, d: int, limits: Thresholds) -> None:
        self.tokens = torch.zeros(classes, dtype=torch.long)
        self.massive = torch.zeros(classes, dtype=torch.long)
        self.sinks = torch.zeros(classes, dtype=torch.long)
        self.largest = torch.zeros(classes)
        self.massive_dims = torch.zeros(d, dtype=torch.long)
        self._limits = limits

    def add(self, x: Float[Tensor, "n d"], kinds: Int[Tensor, " n"]) -> None:
        """Counts some tokens, `kinds` being the class of each."""
        size = x.float().abs()
        above = size > self._limits.massive
        sink = x.float().norm(dim=1) > self._limits.max_norm
        for counts, hit in ((self.tokens, torch.ones_like(sink)), (self.massive, above.any(1)), (self.sinks, sink)):
            counts += torch.bincount(kinds[hit], minlength=len(counts))
        self.largest.scatter_reduce_(0, kinds, size.amax(1), "amax")
        self.massive_dims += above.sum(0)
