"""From a Hugging Face model to its site map, by the TransformerLens architecture adapter of its family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from workbench.core.errors import InvalidInputError, UnknownSiteError
from workbench.hooks.sites import LAYER_KINDS, Point, Side, Site, SiteMap, concatenated, interleaved

Module = tuple[str, nn.Module]
"""Path below the parent, and the module."""

Foreign: TypeAlias = Any  # a config of transformers or a part of TransformerLens, whose attributes are not declared

FUSED_QKV = {"gpt2": "concatenated", "phi3": "concatenated", "gpt_neox": "interleaved"}
"""How one projection holds q, k and v, by model type: one after the other, or all three side by side in each head."""


def _adapter(hf: nn.Module) -> Foreign:
    """The TransformerLens architecture adapter for this model, made from its config without touching the model."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    config: Foreign = hf.config
    try:
        # A config that was not loaded from a checkpoint does not name its class.
        named = getattr(config, "architectures", None)
        architecture = determine_architecture_from_hf_config(config) if named else type(hf).__name__
        bridge_config = build_bridge_config_from_hf(config, architecture, "local", next(hf.parameters()).dtype)
        return ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
    except ValueError as error:
        raise UnknownSiteError(
            f"TransformerLens has no architecture adapter for {type(hf).__name__} ({str(error)[:200]}). "
            "Only causal language models that it adapts can be hooked."
        ) from error


def _child(module: nn.Module, component: Foreign) -> Module | None:
    """Path and module of a component below `module`; None if it is not a module there."""
    path = getattr(component, "name", None)
    if not path:
        return None
    try:
        return path, module.get_submodule(path)
    except AttributeError:
        return None


def _n_in(module: nn.Module) -> int | None:
    """Input columns of a `Linear`, or of the `Conv1D` of GPT-2."""
    return getattr(module, "in_features", getattr(module, "nx", None))


def _n_out(module: nn.Module) -> int | None:
    return getattr(module, "out_features", getattr(module, "nf", None))


def _is_parallel(hf: nn.Module, bridge: Foreign) -> bool:
    config: Foreign = hf.config
    for flag in ("use_parallel_residual", "parallel_attn", "parallel_residual"):
        value = getattr(config, flag, None)
        if value is not None:
            return bool(value)
    return "Parallel" in type(bridge).__name__


def _configs(hf: nn.Module) -> tuple[object, ...]:
    """Every config object that a module of the model may ask how to compute attention."""
    configs = (getattr(module, "config", None) for module in hf.modules())
    return tuple({id(config): config for config in configs if hasattr(config, "model_type")}.values())


class _Block:
    """The sites of one block; `points` and `missing` together have every kind."""

    def __init__(self, hf: nn.Module, adapter: Foreign, layer: int, prefix: str, block: nn.Module) -> None:
        self.hf, self.adapter, self.layer, self.prefix, self.block = hf, adapter, layer, prefix, block
        self.bridge: Foreign = adapter.component_mapping["blocks"]
        self.subs: Mapping[str, Foreign] = self.bridge.submodules
        config = adapter.cfg
        self.d_model, self.d_head = int(config.d_model), int(config.d_head)
        self.heads = int(config.n_heads)
        self.kv_heads = int(getattr(config, "n_key_value_heads", None) or self.heads)
        self.points: dict[Site, Point] = {}
        self.missing: dict[Site, str] = {}

    def build(self, configs: tuple[Foreign, ...]) -> None:
        self._residual()
        attn, mlp = _child(self.block, self.subs.get("attn")), _child(self.block, self.subs.get("mlp"))
        if attn is not None:
            self._projections(attn)
            self._put_columns("z", attn, _part(attn, self.subs["attn"], "o"), "in", self.heads)
            self._put("pattern", attn, "inside", None, heads=self.heads, configs=configs)
        if mlp is not None:
            self._mlp(mlp)
        unmapped = f"TransformerLens' {type(self.adapter).__name__} maps no module to it"
        for kind in LAYER_KINDS:
            site = Site(kind, self.layer)
            if site not in self.points:
                self.missing.setdefault(site, unmapped)

    def _put(self, kind: str, place: Module | None, side: Side, width: int | None, **more: Foreign) -> None:
        if place is not None:
            site = Site(kind, self.layer)
            path = f"{self.prefix}.{place[0]}" if place[0] else self.prefix
            self.points[site] = Point(site, path, place[1], side, width, **more)

    def _refuse(self, kind: str, why: str) -> None:
        self.missing[Site(kind, self.layer)] = why

    def _residual(self) -> None:
        here = ("", self.block)
        self._put("resid_pre", here, "in", self.d_model)
        self._put("resid_post", here, "out", self.d_model)
        for kind in ("attn_out", "mlp_out", "resid_mid"):
            if kind == "resid_mid" and _is_parallel(self.hf, self.bridge):
                self._refuse(kind, "its blocks are parallel: attention and MLP read the same stream")
                continue
            # The alias knows post-norms, and that blocks without pre-norms have resid_mid at the MLP itself.
            alias = self.bridge.hook_aliases.get(f"hook_{kind}")
            name, _, hook = alias.partition(".") if isinstance(alias, str) else ("", "", "")
            if hook in ("hook_in", "hook_out"):
                self._put(
                    kind, _child(self.block, self.subs.get(name)), "in" if hook == "hook_in" else "out", self.d_model
                )

    def _projections(self, attn: Module) -> None:
        counts = dict(zip("qkv", (self.heads, self.kv_heads, self.kv_heads), strict=True))
        fused = _part(attn, self.subs["attn"], "qkv")
        for index, (kind, heads) in enumerate(counts.items()):
            own = _part(attn, self.subs["attn"], kind)
            if own is not None:
                self._put_columns(kind, attn, own, "out", heads, heads * self.d_head)
            elif fused is not None:
                self._put_fused(kind, attn, fused, index, tuple(n * self.d_head for n in counts.values()))

    def _put_fused(self, kind: str, attn: Module, fused: Module, index: int, sizes: tuple[int, ...]) -> None:
        model_type = getattr(self.hf.config, "model_type", "?")
        layout = FUSED_QKV.get(model_type)
        if layout is None:
            self._refuse(kind, f"{fused[0]} holds q, k and v in an order that is not known for {model_type}")
        elif _n_out(fused[1]) != sum(sizes):
            self._refuse(kind, f"{fused[0]} has {_n_out(fused[1])} columns; {sizes} for q, k, v were expected")
        else:
            heads = sizes[index] // self.d_head
            columns = (
                concatenated(index, sizes)
                if layout == "concatenated"
                else interleaved(index, len(sizes), heads, self.d_head)
            )
            path = f"{attn[0]}.{fused[0]}"
            self._put(kind, (path, fused[1]), "out", sizes[index], heads=heads, columns=columns)

    def _put_columns(
        self, kind: str, attn: Module, part: Module | None, side: Side, heads: int, expected: int | None = None
    ) -> None:
        """A site that is all columns of a projection, split in heads."""
        if part is None:
            return
        width = _n_in(part[1]) if side == "in" else _n_out(part[1])
        if width is None or width % heads or (expected is not None and width != expected):
            wanted = f"a multiple of {heads}" if expected is None else f"{expected} = {heads} heads x {self.d_head}"
            self._refuse(kind, f"{part[0]} has {width} columns where {wanted} was expected")
        else:
            self._put(kind, (f"{attn[0]}.{part[0]}", part[1]), side, width, heads=heads)

    def _mlp(self, mlp: Module) -> None:
        path, module = mlp
        bridge = self.subs["mlp"]
        stream = self.points.get(Site("resid_mid", self.layer))
        if stream is not None and stream.module is module:
            self._refuse("mlp_in", "no norm stands before its MLP, which reads resid_mid")
        else:
            self._put("mlp_in", mlp, "in", self.d_model)
        if hasattr(module, "experts") or "MoE" in type(bridge).__name__:
            for kind in ("mlp_pre", "mlp_post"):
                self._refuse(kind, "its MLP is a mixture of experts, each with its own; mlp_out is their sum")
            return
        out = _part(mlp, bridge, "out")
        if out is None:
            return
        d_mlp = _n_in(out[1])
        self._put("mlp_post", (f"{path}.{out[0]}", out[1]), "in", d_mlp)
        pre = _part(mlp, bridge, "gate") if "gate" in bridge.submodules else _part(mlp, bridge, "in")
        fused = getattr(module, "gate_up_proj", None)
        if pre is not None:
            if _n_out(pre[1]) == d_mlp:
                self._put("mlp_pre", (f"{path}.{pre[0]}", pre[1]), "out", d_mlp)
            else:
                self._refuse("mlp_pre", f"{pre[0]} has {_n_out(pre[1])} columns; mlp_post has {d_mlp}")
        elif isinstance(fused, nn.Module) and d_mlp is not None and _n_out(fused) == 2 * d_mlp:
            columns = concatenated(0, (d_mlp, d_mlp))
            self._put("mlp_pre", (f"{path}.gate_up_proj", fused), "out", d_mlp, columns=columns)


def _part(parent: Module, bridge: Foreign, name: str) -> Module | None:
    """A named part of a sublayer, if it is a module of the Hugging Face model."""
    return _child(parent[1], bridge.submodules.get(name))


def position_tables(hf: Foreign) -> list[Module]:
    """Modules that add a learned or stored row per absolute position to the token embeddings."""
    tokens = hf.get_input_embeddings()
    # next to the token embeddings: another tower of the model, such as that of images, has a table of its own
    beside = next(path for path, module in hf.named_modules() if module is tokens).rpartition(".")[0]

    def is_table(module: Foreign) -> bool:
        computed_once = getattr(getattr(module, "weights", None), "ndim", 0) == 2  # as of sinusoids
        return isinstance(module, nn.Embedding) or computed_once

    return [
        (f"{beside}.{path}" if beside else path, module)
        for path, module in hf.get_submodule(beside).named_modules()
        if re.search("wpe|pos", path.rpartition(".")[2]) and is_table(module)
    ]


def _refuse_wrapper(hf: Foreign) -> None:
    """Raises InvalidInputError for torch.compile, PEFT, DDP and others that hold the model itself inside."""
    from transformers import PreTrainedModel

    if not isinstance(hf, nn.Module):
        raise InvalidInputError(f"Model({type(hf).__name__}): give a Hugging Face causal language model.")
    if isinstance(hf, PreTrainedModel):
        return
    for path, inner in hf.named_modules():
        if isinstance(inner, PreTrainedModel):
            raise InvalidInputError(
                f"Model({type(hf).__name__}): this is a wrapper around a {type(inner).__name__}, and hooks need the "
                f"model itself. Give wrapper.{path}; adapters that PEFT has put into it stay on."
            )


def build_site_map(hf: nn.Module) -> SiteMap:
    """Maps every site to a module of the model, by the TransformerLens adapter of its family.

    Raises:
        InvalidInputError: for what is no model, or a wrapper around one.
        UnknownSiteError: if TransformerLens has no adapter for this architecture.
    """
    _refuse_wrapper(hf)
    adapter = _adapter(hf)
    components: Mapping[str, Foreign] = adapter.component_mapping
    points: dict[Site, Point] = {}
    missing: dict[Site, str] = {}
    d_model, d_vocab = int(adapter.cfg.d_model), int(adapter.cfg.d_vocab)
    if getattr(hf, "lm_head", None) is None and hasattr(hf, "embed_out"):
        components["unembed"].name = "embed_out"
    unmapped = f"TransformerLens' {type(adapter).__name__} maps no module to it"
    for kind, name in (("embed", "embed"), ("final_norm", "ln_final"), ("logits", "unembed")):
        place = _child(hf, components.get(name))
        if place is None:
            missing[Site(kind)] = unmapped
        else:
            points[Site(kind)] = Point(Site(kind), *place, "out", d_vocab if kind == "logits" else d_model)
    stack = _child(hf, components.get("blocks"))
    if stack is None:
        raise UnknownSiteError(
            f"{type(hf).__name__}: TransformerLens' {type(adapter).__name__} maps no stack of blocks that this model "
            "has, so it has no sites. Use a model whose blocks follow one another."
        )
    blocks, configs = list(stack[1].children()), _configs(hf)
    for layer, module in enumerate(blocks):
        block = _Block(hf, adapter, layer, f"{stack[0]}.{layer}", module)
        block.build(configs)
        points.update(block.points)
        missing.update(block.missing)
    return SiteMap(points, missing, len(blocks), _is_parallel(hf, components["blocks"]))
