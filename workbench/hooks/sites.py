"""Where activations live: site names, and the points of a model that they stand for."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import UnknownSiteError, did_you_mean

Side = Literal["in", "out", "inside"]

HEAD_KINDS = ("q", "k", "v", "z", "pattern")
LAYER_KINDS = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", *HEAD_KINDS, "mlp_in", "mlp_pre", "mlp_post",
)  # fmt: skip
MODEL_KINDS = ("embed", "final_norm", "logits")
KINDS = LAYER_KINDS + MODEL_KINDS

_ORDER = (
    "resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_in", "mlp_pre", "mlp_post",
    "mlp_out", "resid_post",
)  # fmt: skip
"""The kinds of one layer in the order in which a forward pass computes them."""
_SIDE_BY_SIDE = {"q": ("k", "v"), "k": ("v",), "v": ("pattern",)}
"""Later kinds of the same layer that do not depend on a kind."""
_ATTENTION, _MLP = ("q", "k", "v", "pattern", "z", "attn_out"), ("mlp_in", "mlp_pre", "mlp_post", "mlp_out")

_TL_PATTERNS = {
    **{kind: f"blocks.{{}}.hook_{kind}" for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{kind: f"blocks.{{}}.attn.hook_{kind}" for kind in HEAD_KINDS},
    "mlp_in": "blocks.{}.mlp.hook_in", "mlp_pre": "blocks.{}.mlp.hook_pre", "mlp_post": "blocks.{}.mlp.hook_post",
    "embed": "hook_embed", "final_norm": "ln_final.hook_out", "logits": "unembed.hook_out",
}  # fmt: skip
_TL_ALIASES = {"resid_pre": "blocks.{}.hook_in", "resid_post": "blocks.{}.hook_out"}
_TL_WITHOUT_SITE = {
    "hook_attn_scores": "attention before the softmax is not offered; pattern is",
    "hook_result": "what each head writes is not offered; z is, one head as z.{}.h0",
    "hook_rot_q": "q is read before the rotary embedding", "hook_rot_k": "k is read before the rotary embedding",
    "hook_scale": "the scale of a norm is not offered", "hook_normalized": "a norm without its weight is not offered",
    "hook_mlp_in": "that is the stream before the norm, resid_mid; behind it is mlp_in",
    "hook_attn_in": "use resid_pre",
}  # fmt: skip


@checked
@dataclass(frozen=True, order=True)
class Site:
    """One place in the network; text form `resid_post.10`, `z.10.h3` for one head, or `embed` outside the blocks.

    A negative layer counts from the end of the model: `resid_post.-1` is the output of the last block.
    """

    how_to_make: ClassVar[str] = "A site is written as 'resid_post.10'."
    kind: str
    layer: int | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownSiteError(
                f"There is no site {self.kind!r}. {did_you_mean(self.kind, KINDS)} Write it as resid_post.10."
            )
        if (self.layer is None) != (self.kind in MODEL_KINDS):
            needs = "has no layer" if self.kind in MODEL_KINDS else f"needs a layer number, such as {self.kind}.0"
            raise UnknownSiteError(f"Site {self.kind!r} with layer {self.layer}: it {needs}.")
        if self.head is not None and self.kind not in HEAD_KINDS:
            raise UnknownSiteError(
                f"Site {self} has no heads; {', '.join(HEAD_KINDS)} have, such as z.{self.layer}.h0."
            )

    def __str__(self) -> str:
        layer = "" if self.layer is None else f".{self.layer}"
        return f"{self.kind}{layer}" + ("" if self.head is None else f".h{self.head}")

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sites in the order in which a forward pass computes them; layers count from the start."""
        if self.layer is None:
            return (-1, 0) if self.kind == "embed" else (1 << 30, MODEL_KINDS.index(self.kind))
        return self.layer, _ORDER.index(self.kind)

    def precedes(self, other: Site) -> bool:
        """Whether a forward pass computes this site before another one; the heads of a site are computed together."""
        return self.order < other.order

    @property
    def tl_name(self) -> str:
        """The TransformerLens name of this site, such as `blocks.10.hook_resid_post`; it has no form for one head."""
        return _TL_PATTERNS[self.kind].format(self.layer)

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Reads `resid_post.10`, `z.10.h3`, `embed`, or a TransformerLens name.

        Raises:
            UnknownSiteError: if no such kind of site exists; names the closest.

        >>> Site.parse("blocks.10.hook_resid_post")
        Site(kind='resid_post', layer=10, head=None)
        """
        if isinstance(text, Site):
            return text
        return _parsed(text)


@functools.lru_cache(maxsize=2**12)
def _parsed(text: str) -> Site:
    """The site of a name."""
    for kind, pattern in (*_TL_PATTERNS.items(), *_TL_ALIASES.items()):
        name = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)") + r"(?:\.h(\d+))?", text)
        if name:
            numbers = [None if part is None else int(part) for part in name.groups()]
            return Site(kind, *(numbers if len(numbers) == 2 else [None, *numbers]))
    if text.startswith("blocks."):
        layer, hook = (text.split(".") + ["", ""])[1], text.rpartition(".")[2]
        why = _TL_WITHOUT_SITE.get(hook, "").format(layer)
        known = [pattern.format(layer) for pattern in _TL_PATTERNS.values() if "{}" in pattern]
        raise UnknownSiteError(
            f"There is no site {text!r}" + (f": {why}." if why else f". {did_you_mean(text, known)}")
        )
    if text == "ln_final.hook_normalized":
        raise UnknownSiteError(f"There is no site {text!r}: final_norm is the norm's output, weight included.")
    kind, _, place = text.partition(".")
    if kind in MODEL_KINDS and not place:
        return Site(kind)
    numbered = re.fullmatch(r"(-?\d+)(?:\.h(\d+))?", place)
    if kind in LAYER_KINDS and numbered:
        return Site(kind, int(numbered[1]), None if numbered[2] is None else int(numbered[2]))
    if kind in LAYER_KINDS:
        form = f"{kind}.0" + (f" or {kind}.0.h0" if kind in HEAD_KINDS else "")
        raise UnknownSiteError(f"Site {text!r} needs a layer number, such as {form}.")
    raise UnknownSiteError(f"There is no site {text!r}. {did_you_mean(kind, KINDS)} Write it as resid_post.10.")


@dataclass(frozen=True)
class Point(OneLine):
    """Where a site is read and written: one side of one module.

    Attributes:
        path: dotted path of the module in the Hugging Face model.
        side: "in" for the module's first argument, "out" for its output, "inside" for the attention pattern.
        width: size of the last axis of `flat`, or None where only a forward pass can tell.
        heads: number of heads that the columns are split into; None where there are none.
        columns: the columns of the module's tensor that are this site; None for all of them.
        configs: configs of the model that decide how attention is computed; for "inside" only.
    """

    site: Site
    path: str
    module: nn.Module
    side: Side
    width: int | None
    heads: int | None = None
    columns: slice | Tensor | None = field(default=None, compare=False)
    configs: tuple[object, ...] = field(default=(), compare=False, repr=False)

    @property
    def shape(self) -> tuple[int | str, ...]:
        """Canonical shape; an axis that depends on the batch is given by its name."""
        head = self.site.head is not None
        if self.side == "inside":
            return ("batch", "q_pos", "k_pos") if head else ("batch", self.heads or "n_heads", "q_pos", "k_pos")
        last = "?" if self.width is None else self.width
        if self.heads is None or head or self.width is None:
            return ("batch", "pos", last)
        return ("batch", "pos", self.heads, self.width // self.heads)

    @property
    def is_kept(self) -> bool:
        """Whether the block itself goes on with the tensor that its module is given: the residual stream inside it."""
        return self.site.kind == "resid_mid"

    def at_head(self, head: int) -> Point:
        """The same point for one head.

        Raises:
            UnknownSiteError: if there is no such head.
        """
        assert self.heads is not None
        if head >= self.heads:
            raise UnknownSiteError(
                f"Site {self.site}.h{head}: head {head} does not exist; {self.site} has heads 0 to {self.heads - 1}."
            )
        width = None if self.width is None else self.width // self.heads
        return replace(self, site=replace(self.site, head=head), width=width)

    def read(self, raw: Tensor) -> Float[Tensor, "batch ..."]:
        """The canonical tensor of this site, from the tensor that the module takes or gives."""
        x = raw if self.columns is None else raw[..., self._columns(raw)]
        if self.heads is None:
            return x
        head = self.site.head
        if self.side == "inside":
            return x if head is None else x[:, head]
        x = x.unflatten(-1, (self.heads, -1))
        return x if head is None else x[..., head, :]

    def write(self, raw: Tensor, value: Float[Tensor, "batch ..."]) -> Tensor:
        """A copy of the module's tensor in which this site holds the canonical tensor `value`."""
        head = self.site.head
        if head is not None and self.side == "inside":
            out = raw.clone()
            out[:, head] = value
            return out
        x = raw if self.columns is None else raw[..., self._columns(raw)]
        if head is not None:
            assert self.heads is not None
            x = x.unflatten(-1, (self.heads, -1)).clone()
            x[..., head, :] = value
            value = x.flatten(-2)
        else:
            value = value.reshape(x.shape)
        if self.columns is None:
            return value
        out = raw.clone()
        out[..., self._columns(raw)] = value
        return out

    def flat(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch pos width"]:
        """Canonical tensor as one vector per token: heads side by side; for `pattern`, `n_heads * k_pos` wide."""
        return flattened(self.site, x)

    def unflat(
        self, flat: Float[Tensor, "batch pos width"], like: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, "batch ..."]:
        """Inverse of `flat`: the shape of the canonical tensor `like`."""
        if self.side == "inside" and self.site.head is None:
            batch, heads, queries, keys = like.shape
            return flat.reshape(batch, queries, heads, keys).transpose(1, 2)
        return flat.reshape(like.shape)

    def _columns(self, raw: Tensor) -> slice | Tensor:
        assert self.columns is not None
        return self.columns if isinstance(self.columns, slice) else self.columns.to(raw.device)


@dataclass(frozen=True)
class SiteMap:
    """All sites of one model: where they are, or why they are not.

    Attributes:
        is_parallel: whether attention and MLP of a block read the same stream, so that neither reaches the other.
        no_gradient: sites that gradients do not reach, and why.
    """

    points: Mapping[Site, Point]
    missing: Mapping[Site, str]
    n_layers: int
    is_parallel: bool = False
    no_gradient: Mapping[Site, str] = field(default_factory=dict)

    def __getitem__(self, site: str | Site) -> Point:
        """The point of a site.

        Raises:
            UnknownSiteError: if this model has no such site, with the reason.
        """
        site = self.resolve(site)
        whole = site if site.head is None else replace(site, head=None)
        if whole in self.points:
            point = self.points[whole]
            return point if site.head is None else point.at_head(site.head)
        if whole in self.missing:
            raise UnknownSiteError(f"This model has no site {site}: {self.missing[whole]}.{self._instead(whole)}")
        raise UnknownSiteError(f"This model has no site {site}. {did_you_mean(str(site), map(str, self.points))}")

    def named(self, wanted: Iterable[str | Site]) -> list[Site]:
        """The sites that names and patterns stand for, each once.

        A kind alone is all of its layers, and `*` stands for anything: `resid_post`, `z.*`, `z.*.h1`, `z.3.h*`,
        `resid_*.5`, `blocks.*.hook_z`.

        Raises:
            UnknownSiteError: if this model has no such site, or none that fits a pattern.
        """
        return list(dict.fromkeys(site for one in wanted for site in self._named(one)))

    def _named(self, wanted: str | Site) -> list[Site]:
        if isinstance(wanted, Site) or ("*" not in wanted and wanted not in LAYER_KINDS):
            return [self[wanted].site]
        pattern = f"{wanted}.*" if wanted in LAYER_KINDS else wanted
        whole, of_heads = pattern, re.fullmatch(r"(.*)\.h(\*|\d+)", pattern)
        if of_heads:
            whole = of_heads[1]
        names = {site: (str(site), site.tl_name) for site in self.points}
        found = sorted(
            (s for s, both in names.items() if any(fnmatchcase(n, whole) for n in both)), key=lambda s: s.order
        )
        if of_heads:
            found = [site for site in found if site.kind in HEAD_KINDS]
            heads = {s: range(self.points[s].heads or 0) if of_heads[2] == "*" else [int(of_heads[2])] for s in found}
            found = [self[replace(site, head=head)].site for site in found for head in heads[site]]
        if not found:
            why = next((reason for site, reason in self.missing.items() if fnmatchcase(str(site), whole)), "")
            kinds = dict.fromkeys(site.kind for site in self.points)
            raise UnknownSiteError(
                f"This model has no site that fits {wanted!r}"
                + (f": {why}." if why else ".")
                + f" {did_you_mean(wanted.split('.')[0], kinds)}"
            )
        return found

    def resolve(self, site: str | Site) -> Site:
        """The site with its layer counted from the start.

        Raises:
            UnknownSiteError: if there is no such kind of site or no such layer.
        """
        site = Site.parse(site)
        if site.layer is None:
            return site
        if not -self.n_layers <= site.layer < self.n_layers:
            raise UnknownSiteError(
                f"Site {site}: layer {site.layer} does not exist; this model has layers 0 to {self.n_layers - 1} "
                f"(or {-self.n_layers} to -1, from the end)."
            )
        return site if site.layer >= 0 else replace(site, layer=site.layer % self.n_layers)

    def without(self, reasons: Mapping[Site, str]) -> SiteMap:
        """The same map with some sites withdrawn, each with the reason."""
        points = {site: point for site, point in self.points.items() if site not in reasons}
        return replace(self, points=points, missing={**self.missing, **reasons})

    def reaches(self, here: str | Site, there: str | Site) -> bool:
        """Whether a change at one site can change another one, or is that site; heads count.

        Raises:
            UnknownSiteError: if this model lacks one of them.
        """
        first, then = self[here], self[there]
        a, b = first.site, then.site
        if a.layer is None or a.layer != b.layer:
            return a.order <= b.order
        if a.order > b.order or b.kind in _SIDE_BY_SIDE.get(a.kind, ()):
            return False
        if self.is_parallel and a.kind in _ATTENTION and b.kind in _MLP:
            return False
        if a.head is None or b.head is None:
            return True
        # Several query heads read one head of keys and values.
        return b.head // max(1, (then.heads or 1) // (first.heads or 1)) == a.head

    def without_gradient(self, reasons: Mapping[Site, str]) -> SiteMap:
        """The same map with some sites withdrawn for gradients, each with the reason."""
        return replace(self, no_gradient={**self.no_gradient, **reasons})

    def require_gradient(self, sites: Iterable[Site]) -> None:
        """Raises UnknownSiteError if gradients are known not to reach one of these sites."""
        for site in sites:
            if (why := self.no_gradient.get(replace(site, head=None))) is not None:
                raise UnknownSiteError(f"Site {site} has no gradient in this model: {why}. Read it without grad=True.")

    def _instead(self, site: Site) -> str:
        there = [s.kind for s in self.points if s.layer == site.layer]
        return f" It has {', '.join(kind for kind in KINDS if kind in there)} there." if there else ""


def flattened(site: Site, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch pos width"]:
    """Canonical tensor of a site as one vector per token; the query position of a pattern is its token."""
    return x.transpose(1, 2).flatten(2) if site.kind == "pattern" and site.head is None else x.flatten(2)


def spanned(layers: Iterable[int | None]) -> str:
    """Numbers of layers as a range, or listed where some are left out; those that are None are not counted.

    >>> spanned([0, 1, 2]), spanned([3]), spanned([0, 2]), spanned([None])
    ('0-2', '3', '0, 2', '')
    """
    there = sorted(layer for layer in layers if layer is not None)
    if len(there) > 1 and there[-1] - there[0] + 1 == len(there):
        return f"{there[0]}-{there[-1]}"
    return ", ".join(map(str, there))


def concatenated(index: int, sizes: tuple[int, ...]) -> slice:
    """Columns of part `index` of a projection that holds its parts one after the other.

    >>> concatenated(1, (8, 4, 4))
    slice(8, 12, None)
    """
    start = sum(sizes[:index])
    return slice(start, start + sizes[index])


def interleaved(index: int, parts: int, heads: int, d_head: int) -> Tensor:
    """Columns of part `index` of a projection that holds all parts of a head side by side: (head, part, d_head).

    >>> interleaved(1, parts=3, heads=2, d_head=2).tolist()
    [2, 3, 8, 9]
    """
    return torch.arange(heads * parts * d_head).view(heads, parts, d_head)[:, index].flatten()
