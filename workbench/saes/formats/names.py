"""Where an SAE reads, from the names that SAE libraries use for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.core.errors import MismatchError, UnknownSiteError
from workbench.hooks.sites import Site

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)[._](\d+)(?:\.(.*))?$")
_INSIDE = {
    "": "resid_post", "output": "resid_post", "input": "resid_pre",
    "mlp": "mlp_out", "mlp.output": "mlp_out", "mlp.down_proj.output": "mlp_out", "mlp.down_proj": "mlp_out",
    "post_feedforward_layernorm.output": "mlp_out", "post_feedforward_layernorm": "mlp_out",
    "mlp.down_proj.input": "mlp_post", "mlp.c_proj.input": "mlp_post", "mlp.dense_4h_to_h.input": "mlp_post",
    **{f"{attention}{end}": "attn_out" for attention in ("self_attn", "attn", "attention") for end in ("", ".output")},
    "self_attn.o_proj.input": "z", "attn.c_proj.input": "z", "attention.dense.input": "z",
}  # fmt: skip
"""What a path below a block means. In families with a norm after the sublayer `mlp` is not quite `mlp_out`; the check
on real activations tells."""

_DICTIONARY_LEARNING = re.compile(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_out|mlp_post)_layer_?(\d+)$")
_LAYER = re.compile(r"layer_(\d+)")
_GEMMA_SCOPE = {
    "transcoder": "transcoder", r"-res\b|resid_post": "resid_post", r"-mlp\b|mlp_out": "mlp_out",
    r"-att\b|attn_out": "z",
}  # fmt: skip
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "model.embed_tokens", "transformer.wte", "gpt_neox.embed_in")


def site_of(name: str) -> Site:
    """The site of a hook name: ours, of TransformerLens, or the path of a Hugging Face module.

    A module's path means its output, with `.input` its input.

    Raises:
        UnknownSiteError: if the name is none of these.

    >>> str(site_of("model.layers.15")), str(site_of("gpt_neox.layers.3.mlp")), str(site_of("resid_post_layer_8"))
    ('resid_post.15', 'mlp_out.3', 'resid_post.8')
    """
    try:
        return Site.parse(name)
    except UnknownSiteError:
        if name.startswith("blocks.") and "hook_" in name:
            raise
    if name in _EMBEDDINGS:
        return Site("embed")
    if found := _DICTIONARY_LEARNING.search(name):
        return Site(found[1], int(found[2]))
    if found := _BLOCK.search(name):
        kind = _INSIDE.get(found[2] or "")
        if kind is not None:
            return Site(kind, int(found[1]))
    raise UnknownSiteError(
        f"{name!r} is no site that is known here. Known are sites (resid_post.15), names of TransformerLens "
        "(blocks.15.hook_resid_post) and paths of Hugging Face modules (model.layers.15, layers.15.mlp, "
        "layers.15.self_attn). Pass site= with one of them."
    )


@dataclass(frozen=True)
class GemmaScopeName:
    """What the folders of Gemma Scope say about an SAE, such as `gemma-scope-2b-pt-mlp/layer_12/width_16k`.

    Only the release and what is below it count, or without a release the last `layer_N` and the folder it is in: a path
    above them is named by whoever keeps the files.

    Attributes:
        kind: "transcoder", or the kind of site: the release decides if it names one (`-res`, `-mlp`, `-att`), else the
            folders in it; the residual stream if none does.
        layer: the last `layer_N`; None without one.
    """

    kind: str
    layer: int | None

    @classmethod
    def of(cls, path: Path) -> GemmaScopeName:
        """From a path."""
        parts = path.parts
        releases = [i for i, part in enumerate(parts) if "gemma-scope" in part]
        above_layers = [max(0, i - 1) for i, part in enumerate(parts) if _LAYER.search(part)]
        begins = (releases or above_layers or [len(parts)])[-1]
        parts = parts[begins:]
        kinds = (kind for part in parts for pattern, kind in _GEMMA_SCOPE.items() if re.search(pattern, part))
        found = _LAYER.findall("/".join(parts))
        return cls(next(kinds, "resid_post"), int(found[-1]) if found else None)

    @property
    def site(self) -> Site | None:
        """Where the SAE reads; None for a transcoder, or without a layer.

        >>> GemmaScopeName.of(Path("gemma-scope-2b-pt-att/layer_12/width_16k/average_l0_82")).site
        Site(kind='z', layer=12, head=None)
        """
        return None if self.layer is None or self.kind == "transcoder" else Site(self.kind, self.layer)


def site_metadata(site: str | Site | None, site_out: str | Site | None = None) -> dict[str, Any]:
    """The metadata of sae_lens that name a site, and where a transcoder writes."""
    found: dict[str, Any] = {}
    for key, value in (("hook_name", site), ("hook_name_out", site_out)):
        if value is not None:
            parsed = site_of(value) if isinstance(value, str) else value
            found[key] = parsed.tl_name
            if parsed.head is not None:
                found[key.replace("name", "head_index")] = parsed.head
    return found


def named_site(sae: Any) -> Site:
    """The site that an SAE reads, from its metadata.

    Raises:
        MismatchError: if the metadata name none.
        UnknownSiteError: if they name something that is not a site.
    """
    metadata = sae.cfg.metadata
    name = metadata.get("hook_name") or metadata.get("hf_hook_name")
    if not name:
        raise MismatchError(
            "This SAE does not say which site it reads (metadata.hook_name). Name the site yourself, as "
            "load_sae(..., site='resid_post.15')."
        )
    return _with_head(_translated(metadata, str(name), "hf_hook_name"), metadata.get("hook_head_index"))


def named_target(sae: Any) -> Site | None:
    """The site that a transcoder writes; None for an SAE.

    Raises:
        UnknownSiteError: if the metadata name something that is not a site.
    """
    metadata = sae.cfg.metadata
    name = metadata.get("hook_name_out")
    if not name:
        return None
    return _with_head(_translated(metadata, str(name), "hf_hook_name_out"), metadata.get("hook_head_index_out"))


def _translated(metadata: Any, name: str, second: str) -> Site:
    """The site of the first name, or of the Hugging Face module that the metadata name as well."""
    other = metadata.get(second)
    try:
        return site_of(name)
    except UnknownSiteError:
        if not other or other == name:
            raise
        return site_of(str(other))


def _with_head(site: Site, head: Any) -> Site:
    return site if head is None else Site(site.kind, site.layer, int(head))
