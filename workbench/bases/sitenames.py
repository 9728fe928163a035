"""Where an SAE reads and writes, from the names that SAE libraries use for it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workbench.core.errors import UnknownSiteError
from workbench.core.jsontext import Record
from workbench.hooks.sites import Site

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)[._](\d+)(?:\.(.*))?$")
_INSIDE = {
    "": "resid_post", "output": "resid_post", "input": "resid_pre",
    "mlp": "mlp_out", "mlp.output": "mlp_out", "mlp.down_proj.output": "mlp_out", "mlp.down_proj": "mlp_out",
    "mlp.input": "mlp_in", "pre_feedforward_layernorm.output": "mlp_in", "pre_feedforward_layernorm": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out", "post_feedforward_layernorm": "mlp_out",
    "mlp.down_proj.input": "mlp_post", "mlp.c_proj.input": "mlp_post", "mlp.dense_4h_to_h.input": "mlp_post",
    **{f"{attention}{end}": "attn_out" for attention in ("self_attn", "attn", "attention") for end in ("", ".output")},
    "self_attn.o_proj.input": "z", "attn.c_proj.input": "z", "attention.dense.input": "z",
}  # fmt: skip
"""What a path below a block means. In families with a norm after the sublayer `mlp` is not quite `mlp_out`; the check
on real activations tells."""

_DICTIONARY_LEARNING = re.compile(r"(resid_pre|resid_mid|resid_post|attn_out|mlp_in|mlp_out|mlp_post)_layer_?(\d+)$")
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


def site_metadata(site: str | Site | None, site_out: str | Site | None = None) -> Record:
    """The metadata of sae_lens that name a site, and where a transcoder writes."""
    found: Record = {}
    for key, value in (("hook_name", site), ("hook_name_out", site_out)):
        if value is not None:
            parsed = site_of(value) if isinstance(value, str) else value
            found[key] = parsed.tl_name
            if parsed.head is not None:
                found[key.replace("name", "head_index")] = parsed.head
    return found


def named_site(metadata: Mapping[str, Any], end: str = "") -> Site | None:
    """The site that an SAE reads by its metadata of sae_lens, or with `end="_out"` the one that it writes.

    None where they name none, or none that is known here.
    """
    head = metadata.get(f"hook_head_index{end}")
    names = [metadata.get(f"{key}{end}") for key in ("hook_name", "hf_hook_name")]
    for name in names if names[0] or not end else ():
        with contextlib.suppress(UnknownSiteError):
            if name:
                site = site_of(str(name))
                return site if head is None else replace(site, head=int(head))
    return None
