"""The basis: activations as a sum of what features write, a constant and an error."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.bases.axes import of_numbers, over_tokens
from workbench.core.arguments import shown
from workbench.core.errors import InvalidInputError, MismatchError, ShapeError
from workbench.core.html import Shown
from workbench.core.precision import precise

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

CHUNK_ENTRIES = 2**23
"""Entries of the dense `[tokens, d_sae]` tensor that is alive at any time: 32 MB in fp32."""

Features: TypeAlias = int | Sequence[int] | Int[Tensor, " f"]
"""Feature numbers, the same for all tokens; a single number is one feature."""
FeatureRows: TypeAlias = int | Sequence[int] | Int[Tensor, "*f"]
"""Feature numbers with any axes."""

_OVER_TOKENS = (
    "encode", "encode_some", "decode", "scale", "constant", "coefficients", "contribution", "reconstruct", "error",
    "ablate",
)  # fmt: skip
"""Methods that take activations with any leading axes, and features as numbers, sequences or tensors."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Basis(Shown):
    """Activations `x` of a site as a sum over features, on the device of `x`, in fp32 (in fp64 where `x` is).

    `x = coefficients(x) @ rows() + constant(x) + error(x)`, where `coefficients(x) = encode(x) * scale(x)` and the
    first two terms are the reconstruction. `scale` is 1 unless the encoder normalises each token; it differs from token
    to token, so a mean over tokens is exact for coefficients and not for activations. A basis that transcodes reads
    `x` at `site` and reconstructs something else, at `site_out`.

    Gradients reach `x` where it requires them; weights are detached. `x` may have any leading axes, such as
    `(batch, pos, d_in)`, and results have the same (`chunks` and `sparse` take rows alone); features are numbers, a
    sequence or a tensor of them.

    A kind of basis defines, for activations `(n, d_in)`: `encode`, `rows` and `bias`; `encode_some` where features do
    not compete; `scale` and `constant` where it normalises.

    Attributes:
        name: for people.
        architecture: what computes the activations, such as "topk" or "neurons".
        d_in: width of what is read.
        d_sae: number of features.
        d_out: width of what is written.
        site: where it reads; None if unknown.
        site_out: where it writes; `site` unless it transcodes.
        model_fingerprint: of the model that it was made for; None if unknown.
        normalisation: what the encoder does to each token first; "none" or a word of sae_lens.
        transcodes: it reconstructs something else than it reads.
    """

    how_to_make: ClassVar[str] = "load_sae(where) gives an SAE."
    name: str
    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    site: str | None = None
    site_out: str | None = None
    model_fingerprint: str | None = None
    normalisation: str = "none"
    transcodes: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _OVER_TOKENS:
            if name in vars(cls):
                setattr(cls, name, over_tokens(vars(cls)[name]))
        if "rows" in vars(cls):
            cls.rows = of_numbers(cls.rows)

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """Feature activations, in the units of the basis."""
        raise NotImplementedError

    def rows(self, features: FeatureRows | None = None) -> Float[Tensor, "*f d_out"]:
        """What one unit of each feature's coefficient adds; of all features by default."""
        raise NotImplementedError

    def encoder_directions(self) -> Float[Tensor, "d_sae d_in"]:
        """What each feature reads, where the encoder is a matrix.

        Raises:
            InvalidInputError: if it is not known to be.
        """
        raise InvalidInputError(f"{self.name} has no encoder matrix. Use the directions of its decoder, rows().")

    @property
    def bias(self) -> Float[Tensor, " d_out"]:
        """What is added whatever the features are, before `scale`."""
        raise NotImplementedError

    def encode_some(self, x: Float[Tensor, "n d_in"], features: Features) -> Float[Tensor, "n f"]:
        """Activations of some features: the columns of `encode`."""
        return self.encode(x)[:, torch.as_tensor(features, device=x.device)]

    def scale(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n 1"]:
        """By what activations are multiplied to be in the units of what is written; 1 unless the basis normalises."""
        return torch.ones(len(x), 1, device=x.device, dtype=precise(x[:0]).dtype)

    def constant(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """The reconstruction without any feature."""
        scale = self.scale(x)
        return self.bias.to(scale) * scale

    @property
    def skip(self) -> Float[Tensor, "d_out d_in"] | None:
        """The linear path around the features that `constant` holds too; None where there is none."""
        return None

    def reading(self, x: Float[Tensor, "n d_in"], features: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """What each token's feature reads there: the slope of its activation, normalisation held fast.

        Zero where the feature is not active.

        Args:
            x: a row per token.
            features: one feature per token.

        Raises:
            InvalidInputError: if the encoder normalises in a way of its own.
        """
        if self.normalises and not self.transcodes:
            raise InvalidInputError(
                f"{self.name} normalises each token ({self.normalisation}) in its own code, which can't be held fast. "
                "Give a basis of another architecture."
            )
        leaf = precise(x).detach().clone().requires_grad_(True)
        with torch.enable_grad():
            acts = self.encode(leaf).gather(1, features.to(x.device)[:, None])
            return torch.autograd.grad(acts.sum(), leaf)[0]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What else is known about how it was made; of an SAE its metadata in sae_lens."""
        return {}

    @property
    def provenance(self) -> dict[str, str | None]:
        """Where the basis belongs and how it reads: sites, model, normalisation, and its own fingerprint."""
        names = ("site", "site_out", "model_fingerprint", "architecture", "normalisation", "fingerprint")
        return {name: getattr(self, name) for name in names}

    @property
    def device(self) -> torch.device:
        """Where the features are computed; anything may be given from elsewhere."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """In which features are computed; results are fp32 in any case."""
        return torch.float32

    @property
    def normalises(self) -> bool:
        """Whether `scale` differs from token to token."""
        return False

    def decode(
        self, acts: Float[Tensor, "n d_sae"], x: Float[Tensor, "n d_in"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        """The reconstruction from feature activations.

        Args:
            acts: feature activations, changed or not.
            x: what they were encoded from; needed where the basis normalises, since activations do not say how large a
                token is.

        Raises:
            InvalidInputError: if the basis normalises and `x` is missing.
        """
        if x is None and self.normalises:
            raise InvalidInputError(
                f"decode(acts): {self.name} normalises each token ({self.normalisation}), and activations do not say "
                "how large their tokens were. Give what was encoded: decode(acts, x)."
            )
        if x is None:
            acts = precise(acts)
            return acts @ self.rows().to(acts) + self.bias.to(acts)
        acts = self.rescaled(precise(acts), x)
        return acts @ self.rows().to(acts) + self.constant(x)

    def coefficients(self, x: Float[Tensor, "n d_in"], features: Features | None = None) -> Float[Tensor, "n f"]:
        """By how many of its rows each feature moves each token: activation times `scale`."""
        acts = self.encode(x) if features is None else self.encode_some(x, features)
        return self.rescaled(acts, x)

    def rescaled(self, values: Float[Tensor, "n width"], x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n width"]:
        """`values * scale(x)`: from the units of the basis to those of what is written."""
        return values * self.scale(x) if self.normalises else values

    def contribution(self, x: Float[Tensor, "n d_in"], features: Features | None = None) -> Float[Tensor, "n d_out"]:
        """The sum of what some features write, in the units of the stream; of all features by default."""
        parts = self.coefficients(x, features)
        return parts @ self.rows(features).to(parts)

    def reconstruct(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """`decode(encode(x), x)`, a few tokens at a time."""
        parts = [self.decode(acts, precise(x[rows])) for rows, acts in self.chunks(x)]
        return torch.cat(parts) if parts else precise(x.new_zeros(0, self.d_out))

    def error(
        self, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        """What the basis does not explain: `x - reconstruct(x)`, or `target - reconstruct(x)` if it transcodes.

        Raises:
            MismatchError: if the basis transcodes and there is no target.
        """
        return self._target("error(x)", x, target) - self.reconstruct(x)

    def ablate(
        self, x: Float[Tensor, "n d_in"], features: Features, target: Float[Tensor, "n d_out"] | None = None
    ) -> Float[Tensor, "n d_out"]:
        """`x` without what some features write, the error kept; `target` without it if the basis transcodes.

        Raises:
            MismatchError: if the basis transcodes and there is no target.
        """
        return self._target("ablate(x, features)", x, target) - self.contribution(x, features)

    def features(self, features: Sequence[int] | Tensor, *, once: bool = False) -> Int[Tensor, "*rows f"]:
        """Checked feature numbers: `(f,)` for all rows or `(rows, f)`; none at all is allowed.

        Args:
            features: the numbers.
            once: refuse a feature that is named twice (in one row).

        Raises:
            InvalidInputError: if a feature does not exist, or with `once` is named twice.
            ShapeError: for more axes.
        """
        try:
            ids = torch.as_tensor(features)
            ids = ids if ids.numel() else ids.long()
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:  # which of them depends on their size
            raise InvalidInputError(
                f"features={shown(features)}: these are no feature numbers ({error}). Give whole numbers."
            ) from None
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InvalidInputError(f"features={shown(features)}: these are no feature numbers; give whole numbers.")
        ids = ids.long()
        if ids.ndim not in (1, 2):
            raise ShapeError(f"features: shape {tuple(ids.shape)}; give (f,) for all rows or (rows, f) for each row.")
        if (bad := ids[(ids < 0) | (ids >= self.d_sae)]).numel():
            raise InvalidInputError(
                f"Feature {int(bad[0])} does not exist; this {self.architecture} basis has features 0 to "
                f"{self.d_sae - 1}. Name one of these."
            )
        ordered = ids.sort(-1).values
        if once and (twice := ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]).numel():
            raise InvalidInputError(f"Feature {int(twice[0])} is named twice. Name each feature once.")
        return ids

    def writing(self) -> Bool[Tensor, " d_sae"]:
        """Which features write anything: those whose row is not zero."""
        return (self.rows() != 0).any(dim=1)

    @property
    def fingerprint(self) -> str:
        """Changes with any entry of the basis; 12 hexadecimal digits."""
        digest = hashlib.sha256(f"{self.architecture} {self.site} {self.d_in} {self.d_sae}".encode())
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), Tensor):
                digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def chunks(self, x: Float[Tensor, "n d_in"]) -> Iterator[tuple[slice, Float[Tensor, "rows d_sae"]]]:
        """Feature activations of a few tokens at a time, with the rows that they belong to.

        Raises:
            ShapeError: if `x` has another width than the basis reads, or other axes than `(n, d_in)`.
        """
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ShapeError(
                f"{self.name} reads d_in={self.d_in}; the activations have shape {tuple(x.shape)}. Give those of the "
                f"site that it reads, a row per token: (n, {self.d_in})."
            )
        step = max(1, CHUNK_ENTRIES // self.d_sae)
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            yield rows, self.encode(precise(x[rows]))

    def sparse(self, x: Float[Tensor, "n d_in"]) -> csr_matrix:
        """Feature activations as a sparse matrix, without gradient."""
        from scipy.sparse import csr_matrix, vstack

        parts = [csr_matrix(acts.cpu().numpy()) for _, acts in self.chunks(x.detach())]
        return csr_matrix(vstack(parts)) if parts else csr_matrix((0, self.d_sae), dtype="float32")

    def refuse_transcoder(self, who: str) -> None:
        """Refuses a basis that writes elsewhere than it reads, for edits of activations where they are read.

        Args:
            who: who needs a basis of one site, to begin the message.

        Raises:
            MismatchError: if the basis transcodes.
        """
        if self.transcodes:
            unknown = "a site that it does not name"
            raise MismatchError(
                f"{who} needs an SAE and got a transcoder: it reads {self.site or unknown} and writes "
                f"{self.site_out or unknown}, so its features can't be edited where they are read. Give an SAE, or add "
                "decoder rows where it writes, with Add; feature_cards shows what a transcoder reads and promotes."
            )

    def _target(self, call: str, x: Tensor, target: Tensor | None) -> Tensor:
        if target is None and self.transcodes:
            raise MismatchError(
                f"{call}: {self.name} reads {self.site} and writes {self.site_out}, so x is not what it reconstructs. "
                "Give the activations of the site that it writes as target=."
            )
        return precise(x if target is None else target)


for _name in _OVER_TOKENS:
    setattr(Basis, _name, over_tokens(vars(Basis)[_name]))


@dataclass(frozen=True, eq=False, kw_only=True)
class Dictionary(Basis):
    """A basis of any directions and a function that encodes; what most kinds are.

    Attributes:
        encoder: `(n, d_in)` in fp32 to `(n, d_sae)`, where W_dec is.
        W_dec: the directions.
        b_dec: the reconstruction without any feature.
    """

    encoder: Callable[[Tensor], Tensor]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]

    @classmethod
    def of(
        cls,
        encoder: Callable[[Tensor], Tensor],
        W_dec: Float[Tensor, "d_sae d_out"],
        b_dec: Float[Tensor, " d_out"] | None = None,
        *,
        name: str = "dictionary",
        d_in: int | None = None,
    ) -> Dictionary:
        """From a function and directions, without a site; reads what it writes unless `d_in` says otherwise."""
        d_sae, d_out = W_dec.shape
        return cls(
            name=name, architecture=name, d_in=d_in or d_out, d_sae=d_sae, d_out=d_out, encoder=encoder, W_dec=W_dec,
            b_dec=W_dec.new_zeros(d_out) if b_dec is None else b_dec, transcodes=d_in not in (None, d_out),
        )  # fmt: skip

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        """What the function gives."""
        return self.encoder(x.to(precise(self.W_dec))).to(precise(x))

    def rows(self, features: FeatureRows | None = None) -> Float[Tensor, "*f d_out"]:
        """The directions, where they are."""
        return self.W_dec if features is None else self.W_dec[torch.as_tensor(features, device=self.W_dec.device)]

    @property
    def bias(self) -> Float[Tensor, " d_out"]:
        """The bias."""
        return self.b_dec

    @property
    def device(self) -> torch.device:
        """Where the directions are."""
        return self.W_dec.device
