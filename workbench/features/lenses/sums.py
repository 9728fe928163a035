"""Running sums of a Jacobian over prompts, half by half, which a stopped fit continues from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from workbench.core.atomic import write_atomic
from workbench.core.errors import MismatchError
from workbench.core.jsontext import content_of
from workbench.core.numbers import counted
from workbench.core.tokens import TokenBatch
from workbench.features.lenses.files import BEGIN_AGAIN, load_with_metadata
from workbench.models.model import Model


@dataclass(frozen=True)
class JacobianSums:
    """Sums over the prompts that are done.

    Attributes:
        done: number of prompts; even ones are in the first half.
        halves: by site.
        norms: sums of the median norm of an activation.
    """

    done: int
    halves: tuple[dict[str, Tensor], dict[str, Tensor]]
    norms: dict[str, float]

    @classmethod
    def empty(cls, model: Model, sites: Sequence[str]) -> JacobianSums:
        """Of no prompt."""
        d, dtype = model.d_model, torch.double if model.dtype == torch.double else torch.float
        a, b = ({site: torch.zeros(d, d, dtype=dtype, device=model.device) for site in sites} for _ in range(2))
        return cls(0, (a, b), dict.fromkeys(sites, 0.0))

    def plus(self, found: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> JacobianSums:
        """With one more prompt; an interruption leaves the old ones whole."""
        halves = list(self.halves)
        halves[self.done % 2] = {site: total + found[site] for site, total in halves[self.done % 2].items()}
        medians = {site: total + float(norms[site].median()) for site, total in self.norms.items()}
        return JacobianSums(self.done + 1, (halves[0], halves[1]), medians)

    def write(self, file: Path, prompts: TokenBatch) -> None:
        """Keeps the sums, with what tells the prompts that are in them."""
        parts = zip("ab", self.halves, strict=True)
        tensors = {f"{half}/{site}": x.cpu() for half, sums in parts for site, x in sums.items()}
        tensors["norms"] = torch.tensor(list(self.norms.values()), dtype=torch.double)
        about = {"done": str(self.done), "prompts": _hash(prompts, self.done)}
        write_atomic(file, safetensors.torch.save(tensors, about))

    @classmethod
    def read(cls, file: Path, sites: Sequence[str], prompts: TokenBatch) -> JacobianSums:
        """Sums that were kept.

        Raises:
            MismatchError: if they are not of the first of these prompts.
            CorruptFileError: if the file can't be used.
        """
        with content_of(file, BEGIN_AGAIN, safetensors.SafetensorError, OSError):
            tensors, about = load_with_metadata(file)
            a, b = ({site: tensors[f"{half}/{site}"].to(prompts.ids.device) for site in sites} for half in "ab")
            norms, done, known = tensors["norms"].tolist(), int(about["done"]), about["prompts"]
        if done > len(prompts) or known != _hash(prompts, done):
            raise MismatchError(
                f"{file} holds sums of {counted(done, 'prompts')} that are not the first of these {len(prompts)}. Give "
                "the same prompts in the same order, name another folder, or pass resume=False to begin again."
            )
        return cls(done, (a, b), dict(zip(sites, norms, strict=True)))


def _hash(prompts: TokenBatch, done: int) -> str:
    rows = [row.tolist() for row in prompts.rows()[:done]]
    return hashlib.sha256(repr(rows).encode()).hexdigest()
