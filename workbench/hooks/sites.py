"""Where activations live: site names, and the map from a site to a module of the unmodified model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from workbench.errors import UnknownSiteError, did_you_mean

Side = Literal["in", "out"]

LAYER_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "mlp_post")
MODEL_KINDS = ("embed", "final_norm", "logits")
KINDS = LAYER_KINDS + MODEL_KINDS

_TL_PATTERNS = {
    "resid_pre": "blocks.{}.hook_resid_pre", "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post", "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out", "z": "blocks.{}.attn.hook_z", "mlp_post": "blocks.{}.mlp.hook_post",
    "embed": "hook_embed", "final_norm": "ln_final.hook_normalized", "logits": "unembed.hook_out",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Site:
    """One place in the network; text form `resid_post.10`, or `embed` for places outside the blocks."""

    kind: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    @property
    def tl_name(self) -> str:
        """The TransformerLens name of this site, such as `blocks.10.hook_resid_post`."""
        return _TL_PATTERNS[self.kind].format(self.layer)

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Reads `resid_post.10`, `embed`, or a TransformerLens name.

        Raises:
            UnknownSiteError: if no such kind of site exists; names the closest.

        >>> Site.parse("blocks.10.hook_resid_post")
        Site(kind='resid_post', layer=10)
        """
        if isinstance(text, Site):
            return text
        for kind, pattern in _TL_PATTERNS.items():
            found = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), text)
            if found:
                return cls(kind, int(found[1]) if found.groups() else None)
        kind, _, layer = text.partition(".")
        if kind in MODEL_KINDS and not layer:
            return cls(kind)
        if kind in LAYER_KINDS and layer.isdecimal():
            return cls(kind, int(layer))
        if kind in LAYER_KINDS:
            raise UnknownSiteError(f"Site {text!r} needs a layer number, such as {kind}.0.")
        raise UnknownSiteError(f"There is no site {text!r}. {did_you_mean(kind, KINDS)} Write it as resid_post.10.")


@dataclass(frozen=True)
class Point:
    """Where a site is read and written: one side of one module.

    Attributes:
        site: the site.
        path: dotted path of the module in the Hugging Face model.
        module: that module.
        side: "in" for the module's first argument, "out" for its output.
        width: size of the last axis, or None where only a forward pass can tell.
    """

    site: Site
    path: str
    module: nn.Module
    side: Side
    width: int | None


@dataclass(frozen=True)
class SiteMap:
    """All sites of one model: where they are, or why they are not."""

    points: Mapping[Site, Point]
    missing: Mapping[Site, str]
    n_layers: int

    def __getitem__(self, site: str | Site) -> Point:
        """The point of a site.

        Raises:
            UnknownSiteError: if this model has no such site, with the reason.
        """
        site = Site.parse(site)
        if site in self.points:
            return self.points[site]
        if site in self.missing:
            raise UnknownSiteError(f"This model has no site {site}: {self.missing[site]}.")
        if site.layer is not None and site.layer >= self.n_layers:
            raise UnknownSiteError(
                f"Site {site}: layer {site.layer} does not exist; this model has layers 0 to {self.n_layers - 1}."
            )
        raise UnknownSiteError(f"This model has no site {site}. {did_you_mean(str(site), map(str, self.points))}")

    def without(self, reasons: Mapping[Site, str]) -> SiteMap:
        """The same map with some sites withdrawn, each with the reason."""
        points = {site: point for site, point in self.points.items() if site not in reasons}
        return SiteMap(points, {**self.missing, **reasons}, self.n_layers)


def _adapter(hf: nn.Module) -> Any:
    """The TransformerLens architecture adapter for this model, made from its config without touching the model."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    config: Any = hf.config
    try:
        architecture = determine_architecture_from_hf_config(config)
        bridge_config = build_bridge_config_from_hf(config, architecture, "local", next(hf.parameters()).dtype)
        return ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
    except ValueError as error:
        raise UnknownSiteError(
            f"TransformerLens has no architecture adapter for {type(hf).__name__} ({error}). "
            "Only causal language models that it adapts can be hooked."
        ) from error


def _child(module: nn.Module, component: Any) -> tuple[str, nn.Module] | None:
    """Path and module of a component below `module`; None if it is not a module there."""
    path = getattr(component, "name", None)
    if not path:
        return None
    try:
        return path, module.get_submodule(path)
    except AttributeError:
        return None


def build_site_map(hf: nn.Module) -> SiteMap:
    """Maps every site to a module of the model, by the TransformerLens adapter of its family.

    Raises:
        UnknownSiteError: if TransformerLens has no adapter for this architecture.
    """
    adapter = _adapter(hf)
    components: Mapping[str, Any] = adapter.component_mapping
    config = adapter.cfg
    points: dict[Site, Point] = {}
    missing: dict[Site, str] = {}

    def put(site: Site, found: tuple[str, nn.Module] | None, prefix: str, side: Side, width: int | None) -> None:
        if found is None:
            missing[site] = f"TransformerLens' {type(adapter).__name__} maps no module to it"
        else:
            path = f"{prefix}.{found[0]}" if prefix else found[0]
            points[site] = Point(site, path, found[1], side, width)

    d_model, d_vocab = int(config.d_model), int(config.d_vocab)
    if getattr(hf, "lm_head", None) is None and hasattr(hf, "embed_out"):
        components["unembed"].name = "embed_out"
    put(Site("embed"), _child(hf, components.get("embed")), "", "out", d_model)
    put(Site("final_norm"), _child(hf, components.get("ln_final")), "", "out", d_model)
    put(Site("logits"), _child(hf, components.get("unembed")), "", "out", d_vocab)
    stack = _child(hf, components["blocks"])
    if stack is None:
        raise UnknownSiteError(f"{type(hf).__name__} has no module {components['blocks'].name} that holds its blocks.")
    blocks = list(stack[1].children())
    for layer, block in enumerate(blocks):
        prefix = f"{stack[0]}.{layer}"
        points[Site("resid_pre", layer)] = Point(Site("resid_pre", layer), prefix, block, "in", d_model)
        points[Site("resid_post", layer)] = Point(Site("resid_post", layer), prefix, block, "out", d_model)
        subs = components["blocks"].submodules
        attn, mlp = _child(block, subs.get("attn")), _child(block, subs.get("mlp"))
        attn_add = _child(block, subs.get("ln1_post")) or attn
        mlp_add = _child(block, subs.get("ln2_post")) or mlp
        put(Site("attn_out", layer), attn_add, prefix, "out", d_model)
        put(Site("mlp_out", layer), mlp_add, prefix, "out", d_model)
        for kind, parent, name in (("z", attn, "o"), ("mlp_post", mlp, "out")):
            part = subs[{"z": "attn", "mlp_post": "mlp"}[kind]].submodules.get(name) if parent else None
            found = _child(parent[1], part) if parent and part is not None else None
            weight = getattr(found[1], "weight", None) if found else None
            width = None if weight is None else next((s for s in weight.shape if s != d_model), d_model)
            put(Site(kind, layer), found, f"{prefix}.{parent[0]}" if parent else prefix, "in", width)
        ln2 = _child(block, subs.get("ln2"))
        if _is_parallel(hf, components["blocks"]):
            missing[Site("resid_mid", layer)] = "its blocks are parallel: attention and MLP read the same stream"
        else:
            put(Site("resid_mid", layer), ln2, prefix, "in", d_model)
    return SiteMap(points, missing, len(blocks))


def _is_parallel(hf: nn.Module, bridge: Any) -> bool:
    config: Any = hf.config
    flags = ("use_parallel_residual", "parallel_attn", "parallel_residual")
    for flag in flags:
        value = getattr(config, flag, None)
        if value is not None:
            return bool(value)
    return "Parallel" in type(bridge).__name__
