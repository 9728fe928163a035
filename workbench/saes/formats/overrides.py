"""What the caller knows about an SAE that its files do not say."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.errors import InvalidInputError

ACTIVATIONS = ("relu", "topk", "groupmax", "jumprelu")


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """Each None leaves what the files say.

    Attributes:
        k: features per token; makes a file of bare tensors a TopK SAE, and a BatchTopK SAE rank by token.
        threshold: what activations must exceed; makes a file of bare tensors a JumpReLU SAE.
        scale: by what activations were multiplied in training.
        activation: "relu", "topk" or "jumprelu", for files of bare tensors.
        subtracts_b_dec: whether `b_dec` is subtracted from the input, for files of bare tensors; None takes it to be.
        site: where it reads.
        site_out: where a transcoder writes.
    """

    k: int | None = None
    threshold: float | None = None
    scale: float | None = None
    activation: str | None = None
    subtracts_b_dec: bool | None = None
    site: str | None = None
    site_out: str | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise InvalidInputError(f"scale={self.scale}: activations were multiplied by a positive number.")
        if self.k is not None and self.threshold is not None:
            raise InvalidInputError(f"k={self.k}, threshold={self.threshold}: an SAE has one of them. Pass one.")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise InvalidInputError(f"activation={self.activation!r}: known are {', '.join(ACTIVATIONS)}.")
