"""What a measurement needs of an SAE or transcoder: encode, decode, decoder rows; dense for few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.bases import saecode
from workbench.core.errors import InvalidInputError, ShapeError

Encode = Callable[[Tensor], Tensor]
Decode = Callable[[Tensor, Tensor], Tensor]

CHUNK_ENTRIES = 2**23
"""Entries of the dense `[tokens, d_sae]` tensor that is alive at any time: 32 MB in fp32."""

_SHARED_DECODE = ("standard", "topk", "jumprelu", "gated")


@dataclass(frozen=True, eq=False)
class Coder:
    """An SAE as three things, in fp32 and without gradient.

    Attributes:
        encode: `(n, d_in) -> (n, d_sae)`, not negative.
        decode: `(acts, x) -> (n, d_out)`, the reconstruction in the units of the target.
        W_dec: what one unit of each feature's activation adds to the reconstruction.
        b_dec: the reconstruction without any feature.
        d_in: width of what is read.
        name: for people.
        transcodes: it reconstructs something else than it reads.
    """

    encode: Encode
    decode: Decode
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    d_in: int
    name: str = "SAE"
    transcodes: bool = False

    @classmethod
    def of(cls, sae: Any) -> Coder:
        """Of any sae_lens SAE or transcoder; a `Coder` is returned as it is.

        Raises:
            InvalidInputError: for anything else, and for the temporal SAE of sae_lens.
        """
        if isinstance(sae, Coder):
            return sae
        if not all(hasattr(sae, name) for name in ("encode", "decode", "W_dec", "b_dec", "cfg")):
            raise InvalidInputError(
                f"{type(sae).__name__} is not an SAE: it needs encode, decode, W_dec, b_dec and cfg. Load one with "
                "load_sae, or make a Coder of your functions."
            )
        kind = sae.cfg.architecture() if hasattr(sae.cfg, "architecture") else "unknown"
        if kind == "temporal":
            raise InvalidInputError(
                "A temporal SAE of sae_lens predicts each token from those before it, and everything here reads tokens "
                "one by one. Give an SAE of another kind."
            )
        rows = saecode.decoder_rows(sae, torch.arange(sae.W_dec.shape[0]))

        def decode(acts: Tensor, x: Tensor) -> Tensor:
            if kind in _SHARED_DECODE:
                return saecode.decode(sae, acts, x)
            out = sae.decode(acts.to(sae.W_dec)).float()
            skip = getattr(sae, "W_skip", None)
            return (out if skip is None else out + (x.to(skip) @ skip.T).float()).to(x.device)

        transcodes = "transcoder" in kind or bool(sae.cfg.metadata.get("hook_name_out"))
        b_dec, d_in = sae.b_dec.detach().float(), int(sae.cfg.d_in)
        return cls(lambda x: saecode.encode(sae, x), decode, rows, b_dec, d_in, kind, transcodes)

    @classmethod
    def random(cls, like: Coder, k: int, seed: int = 0) -> Coder:
        """The control: same shape and `b_dec`, random unit directions, k features per token by TopK.

        The encoder is the decoder transposed and reads `x - b_dec`; a transcoder gets an encoder of its own.
        """
        random = torch.Generator().manual_seed(seed)
        d_sae, d_out = like.W_dec.shape
        device, k = like.W_dec.device, max(1, min(k, d_sae))
        W_dec = _unit_rows(d_sae, d_out, random).to(device)
        W_enc = W_dec if not like.transcodes else _unit_rows(d_sae, like.d_in, random).to(device)

        def encode(x: Tensor) -> Tensor:
            near = x.to(device)
            top = ((near if like.transcodes else near - like.b_dec) @ W_enc.T).topk(k, dim=1)
            acts = torch.zeros(len(x), d_sae, device=device).scatter_(1, top.indices, top.values.relu())
            return acts.to(x.device)

        def decode(acts: Tensor, x: Tensor) -> Tensor:
            return (acts.to(device) @ W_dec + like.b_dec).to(x.device)

        return cls(encode, decode, W_dec, like.b_dec, like.d_in, "random SAE", like.transcodes)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    @torch.no_grad()
    def chunks(self, x: Float[Tensor, "n d_in"]) -> Iterator[tuple[slice, Float[Tensor, "rows d_sae"]]]:
        """Feature activations of a few tokens at a time, with the rows that they belong to.

        Raises:
            ShapeError: if `x` has another width than the SAE reads.
        """
        if x.shape[1] != self.d_in:
            raise ShapeError(f"The SAE reads d_in={self.d_in}; the activations have shape {tuple(x.shape)}.")
        step = max(1, CHUNK_ENTRIES // self.d_sae)
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            yield rows, self.encode(x[rows].float())

    def reconstruct(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """Encode and decode, chunk by chunk."""
        parts = [self.decode(acts, x[rows].float()) for rows, acts in self.chunks(x)]
        return torch.cat(parts) if parts else x.new_zeros(0, self.W_dec.shape[1])

    def sparse(self, x: Float[Tensor, "n d_in"]) -> Any:
        """Feature activations as a `scipy.sparse.csr_matrix`."""
        from scipy.sparse import csr_matrix, vstack

        parts = [csr_matrix(acts.cpu().numpy()) for _, acts in self.chunks(x)]
        return vstack(parts, format="csr") if parts else csr_matrix((0, self.d_sae), dtype="float32")


def _unit_rows(n: int, width: int, random: torch.Generator) -> Tensor:
    rows = torch.randn(n, width, generator=random)
    return rows / rows.norm(dim=1, keepdim=True)
