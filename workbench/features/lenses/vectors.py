"""Directions of tokens in the residual stream as a lens sees them, and the edits that are made with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.display import first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, UnknownNameError
from workbench.core.html import Shown
from workbench.core.numbers import counted, number
from workbench.core.tokenizer import decoded
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.op import Op
from workbench.interventions.ops import AddScaled, LowRank, ProjectOut
from workbench.interventions.replacing import Patch
from workbench.interventions.scopes import Prompt, Scope
from workbench.models.model import Model
from workbench.models.wrapped import Batch

if TYPE_CHECKING:
    import pandas as pd

PARALLEL, NEARLY = 0.999, 0.99
"""Cosines from which two directions span no plane, and from which a warning is given."""


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class TokenVectors(Shown):
    """Directions of some tokens at some sites; its methods make interventions with them.

    Attributes:
        tokens: texts by token id.
        vectors: one direction per token, by site.
        halves: the same from either half of the prompts.
        norms: median norm of an activation at each site.
        n_fit: what the lens was fitted on.
        lens: kind of the lens.
        fingerprint: of the model.
    """

    tokens: dict[int, str]
    vectors: dict[str, Float[Tensor, "tokens d"]]
    halves: tuple[dict[str, Float[Tensor, "tokens d"]], ...] | None = None
    norms: dict[str, float] = field(default_factory=dict)
    n_fit: int = 0
    lens: str = "logit"
    fingerprint: str = ""

    def vector(self, token: str | int, site: str) -> Float[Tensor, " d"]:
        """The direction of one token at one site.

        Raises:
            UnknownNameError: for another token or site than those that are here.
        """
        return self.vectors[self._site(site)][self._place(token)]

    def steer(
        self, token: str | int, strength: float = 1.0, sites: Sequence[str] | None = None, scope: Scope | None = None
    ) -> Intervention:
        """`h + strength * m * v`, v of unit length, m the median norm at the site (of the token itself if unknown).

        Args:
            token: one of those that are here.
            strength: as a share of an ordinary activation.
            sites: where; None for all.
            scope: which tokens; None for all.
        """

        def op(site: str) -> Op:
            size = self.norms.get(self._site(site))
            return AddScaled(self.vector(token, site), strength, "norm" if size is None else size)

        return self._edits(op, sites, scope)

    def ablate(self, token: str | int, sites: Sequence[str] | None = None, scope: Scope | None = None) -> Intervention:
        """`h - (h . v) v`, v of unit length."""
        return self._edits(lambda site: ProjectOut(self.vector(token, site)), sites, scope)

    def swap(
        self,
        source: str | int,
        to: str | int,
        strength: float = 1.0,
        sites: Sequence[str] | None = None,
        scope: Scope | None = None,
    ) -> Intervention:
        """Exchanges the coordinates of two tokens: `h + strength * V (swap(c) - c)`, `c = V^+ h`.

        At several sites each swap undoes the one before wherever the stream keeps the plane; use `clamp` for a band.

        Raises:
            DegenerateInputError: if the two directions are parallel.
        """

        def op(site: str) -> Op:
            plane = self._plane(source, to, site)
            # exchanging coordinates is exchanging columns
            return _low_rank(plane.flip(1) - plane, torch.linalg.pinv(plane), strength)

        return self._edits(op, sites, scope)

    def exchange(
        self, source: str | int, to: str | int, sites: Sequence[str] | None = None, scope: Scope | None = None
    ) -> Intervention:
        """Turns one direction into another: `h - (h . s) s + (h . s) t`, both of unit length; Neuronpedia's "swap".

        Unlike `swap` it reads no coordinate of `to`, and leaves that of `source` at zero.

        Raises:
            DegenerateInputError: if the two directions are parallel.
        """

        def op(site: str) -> Op:
            s, t = (column / column.norm() for column in self._plane(source, to, site).T)
            return _low_rank((t - s)[:, None], s[None])

        return self._edits(op, sites, scope)

    def clamp(
        self,
        model: Model,
        text: Batch,
        source: str | int,
        to: str | int,
        sites: Sequence[str] | None = None,
        scope: Scope | None = None,
    ) -> Intervention:
        """Sets the coordinates of two tokens to those of the unedited run, exchanged: `h + V (swap(c_clean) - V^+ h)`.

        Twice is once, so it is the one to use at several sites. It holds for the tokens of this text alone; the default
        scope is the prompt.

        Args:
            model: the model, which runs the text once.
            text: the prompts that will be edited.
            source: one of the tokens that are here.
            to: another.
            sites: where; None for all.
            scope: which tokens.

        Raises:
            MismatchError: for another model.
            DegenerateInputError: if the two directions are parallel.
        """
        if self.fingerprint not in ("", model.fingerprint):
            raise MismatchError(
                f"These directions belong to the model {self.fingerprint}, not to {model.name} ({model.fingerprint}). "
                "Take those of this model."
            )
        wanted = self._sites(sites)
        clean = model.capture(text, wanted)
        assert clean.tokens is not None
        batch = clean.tokens

        def op(site: str) -> Op:
            plane = self._plane(source, to, site)
            coordinates = clean[site].double().cpu() @ torch.linalg.pinv(plane).T
            return Patch.of_run(coordinates.flip(-1) @ plane.T, batch.to("cpu"), plane.T.float())

        return self._edits(op, wanted, scope or Prompt())

    def frame(self) -> pd.DataFrame:
        """One row per site and token: length of the direction, and cosine of the two halves."""
        import pandas as pd

        rows = []
        for site, vectors in self.vectors.items():
            for i, (token, text) in enumerate(self.tokens.items()):
                row = {"site": site, "layer": Site.parse(site).layer, "token": text, "id": token}
                row |= {"norm": float(vectors[i].norm()), "n_fit": self.n_fit}
                if self.halves is not None:
                    row["half_cosine"] = _cosine(self.halves[0][site][i], self.halves[1][site][i])
                rows.append(row)
        return pd.DataFrame(rows)

    def _plane(self, source: str | int, to: str | int, site: str) -> Float[Tensor, "d 2"]:
        """Both directions as columns, in fp64 on the CPU."""
        pair = torch.stack([self.vector(source, site), self.vector(to, site)]).double().cpu()
        cosine = abs(_cosine(*pair))
        if not cosine < PARALLEL:
            raise DegenerateInputError(
                f"{source!r} and {to!r} have a cosine of {number(cosine)} at {site}: the two directions span no plane, "
                "so their coordinates can't be told apart. Choose other tokens or sites."
            )
        if cosine >= NEARLY:
            warnings.warn(
                f"{source!r} and {to!r} have a cosine of {number(cosine)} at {site}: a small error of the directions "
                "makes a large one of the edit.", stacklevel=4,
            )  # fmt: skip
        return pair.T

    def _edits(self, op: Callable[[str], Op], sites: Sequence[str] | None, scope: Scope | None) -> Intervention:
        made = sum((Intervention.at(site, op(site), scope) for site in self._sites(sites)), Intervention())
        return Intervention(made.edits, self.fingerprint or None)

    def _sites(self, sites: Sequence[str] | None) -> list[str]:
        return list(self.vectors) if sites is None else [self._site(site) for site in sites]

    def _site(self, site: str) -> str:
        name = str(Site.parse(site))
        if name not in self.vectors:
            raise UnknownNameError(f"There is no direction at {name}. There are some at {first_few(self.vectors)}.")
        return name

    def _place(self, token: str | int) -> int:
        for i, (known, text) in enumerate(self.tokens.items()):
            if token in (known, text):
                return i
        raise UnknownNameError(
            f"There is no direction of {token!r}. There are those of {first_few(map(repr, self.tokens.values()))}."
        )

    def _shown_line(self) -> str:
        what = f"{counted(len(self.tokens), 'tokens')} at {counted(len(self.vectors), 'sites')}"
        return f"{self.lens} lens: {what}" + (f", fitted on {self.n_fit}" if self.n_fit else "")


def _low_rank(write: Float[Tensor, "d k"], read: Float[Tensor, "k d"], strength: float = 1.0) -> LowRank:
    """`h + strength * write read h`, written at unit length, so that the sum with what is read rounds little."""
    size = write.norm()
    rows = (write / size).T
    return LowRank(R=rows.float(), W=(rows.float() + (strength * size * read).float()), b=None)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def named_ids(model: Model, tokens: Sequence[str | int], who: str = "rows") -> dict[int, str]:
    """Token ids with their texts.

    Raises:
        InvalidInputError: for none, an id outside the vocabulary, or a text that is not one token.
    """
    if not tokens:
        raise InvalidInputError(f"{who}(tokens=[]): name at least one token, such as ' Paris'.")
    return dict(_named_id(model, token, who) for token in tokens)


def _named_id(model: Model, token: str | int, who: str) -> tuple[int, str]:
    if isinstance(token, int):
        if not 0 <= token < model.d_vocab:
            raise InvalidInputError(f"{who}: there is no token {token}; the vocabulary has 0 to {model.d_vocab - 1}.")
        return token, decoded(model.tokenizer, [token]) if model.tokenizer else f"⟨{token}⟩"
    ids = model.tokens(token, bos=False).rows()[0].tolist()
    if len(ids) != 1:
        raise InvalidInputError(
            f"{who}: {token!r} is {len(ids)} tokens; give a text that is one, often with a space in front."
        )
    return ids[0], token
