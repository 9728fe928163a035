"""Files that keep the edit outside the weights: a control vector, a steering file, a hook of a few lines."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypedDict

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.core.errors import InvalidInputError
from workbench.core.records import write_atomic
from workbench.hooks.attach import Fn, attached
from workbench.hooks.families import position_tables
from workbench.hooks.sites import Point, Site, SiteMap
from workbench.interventions.export.folds import Fold, fold_of, refused
from workbench.interventions.export.result import EditedLogits, Exported
from workbench.interventions.intervention import Edit, Intervention

_GGUF_ARCH = "controlvector"


class _LmEvalEntry(TypedDict):
    """One entry of a steering file of lm-evaluation-harness."""

    action: str
    steering_coefficient: float
    bias: None
    head_index: None
    steering_vector: Tensor


def export_gguf(hf: nn.Module, sites: SiteMap, intervention: Intervention, out: Path, tolerance: float) -> Exported:  # noqa: ARG001
    """Writes a control vector of llama.cpp: `direction.l` is added to the output of block l, l from 1.

    Raises:
        NotExactlyExportable: for anything but additions to the residual stream after a block, and for block 0, whose
            output llama.cpp has no vector for.
    """
    import gguf

    _ends_with(out, "gguf", ".gguf")
    directions: dict[int, Tensor] = {}
    for edit in intervention.edits:
        layer, added = _added_after(sites, edit)
        directions[layer] = directions.get(layer, torch.zeros_like(added)) + added
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "vector.gguf"
        writer = gguf.GGUFWriter(file, _GGUF_ARCH)
        writer.add_string(f"{_GGUF_ARCH}.model_hint", str(getattr(hf.config, "model_type", "")))
        writer.add_uint32(f"{_GGUF_ARCH}.layer_count", len(directions))
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", direction.float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_atomic(out, file.read_bytes())
    return Exported("gguf", out, notes=("strengths are part of the vectors: load it with a scale of 1",))


def _added_after(sites: SiteMap, edit: Edit) -> tuple[int, Tensor]:
    """Block and vector of an addition to its output."""
    site = _after(sites.resolve(edit.site))
    if site.kind == "mlp_out" and site in sites.points:
        site = Site("resid_post", site.layer)
    if site.kind != "resid_post":
        raise refused(edit, "a control vector is added to the output of a block: resid_post, or mlp_out")
    fold = fold_of(edit, sites[site])
    if not fold.is_constant:
        raise refused(edit, "a control vector is added, whatever the activation is; this edit reads the activation")
    assert site.layer is not None
    if site.layer == 0:
        raise refused(edit, "llama.cpp keeps no vector for the output of block 0 and refuses files that have one")
    return site.layer, fold.bias


def _after(site: Site) -> Site:
    """The input of a block as the output of the one before."""
    if site.kind == "resid_pre" and site.layer:
        return Site("resid_post", site.layer - 1)
    return site


def export_lm_eval(hf: nn.Module, sites: SiteMap, intervention: Intervention, out: Path, tolerance: float) -> Exported:
    """Writes a steering file for `lm_eval --model steered --model_args steer_path=...`, checked on probe tokens.

    Its entries add a vector, or set the projection on a direction. lm-evaluation-harness 0.4 reads only files of
    `torch.save` for vectors; this one holds tensors, numbers and texts alone, and loads with `weights_only=True`.

    Raises:
        NotExactlyExportable: for edits of another form, and for several at one place that are not all additions.
    """
    _ends_with(out, "lm_eval", ".pt")
    base = getattr(hf, "base_model_prefix", "")
    entries: dict[str, _LmEvalEntry] = {}
    for point, edit, fold in _at_outputs(hf, sites, intervention):
        if not point.path.startswith(f"{base}."):
            raise refused(
                edit, f"lm-evaluation-harness finds only modules inside `{base}`, and {point.path} is outside"
            )
        hookpoint, entry = point.path.removeprefix(f"{base}."), _lm_eval_entry(edit, fold)
        before = entries.get(hookpoint)
        if before is not None:
            if (before["action"], entry["action"]) != ("add", "add"):
                raise refused(edit, f"a steering file has one entry for each place, and {hookpoint} has another edit")
            entry["steering_vector"] = entry["steering_vector"] + before["steering_vector"]
        entries[hookpoint] = entry
    probe = EditedLogits(hf, sites, intervention, tolerance)
    with _edited(hf, sites, intervention, entries):
        difference = probe.check(hf, "The steering file")
    buffer = io.BytesIO()
    torch.save(entries, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)  # proves that reading it runs no code
    return Exported("lm_eval", write_atomic(out, buffer.getvalue()), difference, probe.effect)


def _lm_eval_entry(edit: Edit, fold: Fold) -> _LmEvalEntry:
    if fold.is_constant:
        return _entry("add", 1.0, fold.bias)
    if fold.dense is None and len(fold.read) == 1:
        direction = fold.write[0] / fold.write[0].norm()
        value = float(fold.bias @ direction)
        sets = torch.allclose(fold.read[0] * fold.write[0].norm(), -direction, atol=1e-6)
        if sets and torch.allclose(fold.bias, value * direction, atol=1e-6 * max(1.0, abs(value))):
            return _entry("clamp", value, direction)
    raise refused(edit, "a steering file adds a vector, or sets the projection on one direction to a value")


def _entry(action: str, coefficient: float, vector: Tensor) -> _LmEvalEntry:
    return {
        "action": action, "steering_coefficient": coefficient, "bias": None, "head_index": None,
        "steering_vector": vector.float().cpu(),
    }  # fmt: skip


def _edited(
    hf: nn.Module, sites: SiteMap, intervention: Intervention, entries: Mapping[str, _LmEvalEntry]
) -> AbstractContextManager[None]:
    """The model with the entries of a steering file in effect, as their definition says."""
    base = getattr(hf, "base_model_prefix", "")
    points = {point.path.removeprefix(f"{base}."): point for point, _, _ in _at_outputs(hf, sites, intervention)}

    def edit_of(entry: _LmEvalEntry) -> Fn:
        v = entry["steering_vector"]

        def edit(h: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
            own = v.to(h)
            if entry["action"] == "add":
                return h + own * entry["steering_coefficient"]
            return h + own * (entry["steering_coefficient"] - (h * own).sum(-1, keepdim=True))

        return edit

    return attached([(points[name], edit_of(entry)) for name, entry in entries.items()])


_HOOK = '''"""Steers a model with {tensors} beside this file; needs torch, safetensors and transformers."""
from pathlib import Path

from safetensors.torch import load_file



def steer(model, file=Path(__file__).with_name("{tensors}")):
    """Registers the edits of {n} modules; `[handle.remove() for handle in handles]` takes them off."""
    def hook(read, write, bias):
        def edit(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            new = h.float() + (h.float() @ read.to(h.device).T) @ write.to(h.device) + bias.to(h.device)
            return (new.to(h.dtype), *output[1:]) if isinstance(output, tuple) else new.to(h.dtype)
        return edit

    t = load_file(file)
    return [
        model.get_submodule(path).register_forward_hook(hook(*(t[path + x] for x in (":read", ":write", ":bias"))))
        for path in {paths}
    ]
'''


def export_hook(hf: nn.Module, sites: SiteMap, intervention: Intervention, out: Path, tolerance: float) -> Exported:
    """Writes `steer.py`, a few lines of plain transformers, and `vectors.safetensors`; checked on probe tokens.

    Raises:
        NotExactlyExportable: for edits that are not `h + (h U^T) V + b` on every token at the output of a module.
    """
    merged: dict[str, Fold] = {}
    points: dict[str, Point] = {}
    for point, edit, fold in _at_outputs(hf, sites, intervention):
        if fold.dense is not None:
            raise refused(edit, "the hook writes h + (h U^T) V + b; this edit replaces the whole activation")
        merged[point.path] = merged[point.path].then(fold) if point.path in merged else fold
        points[point.path] = point
    tensors = {
        f"{path}:{name}": getattr(fold, name).float().cpu().contiguous().clone()
        for path, fold in merged.items()
        for name in ("read", "write", "bias")
    }
    text = _HOOK.format(tensors="vectors.safetensors", n=len(merged), paths=list(merged))
    probe = EditedLogits(hf, sites, intervention, tolerance)

    def edit_of(fold: Fold) -> Fn:
        read, write, bias = (part.float() for part in (fold.read, fold.write, fold.bias))
        return lambda h: (h.float() + (h.float() @ read.T) @ write + bias).to(h.dtype)

    with attached([(points[path], edit_of(fold)) for path, fold in merged.items()]):
        difference = probe.check(hf, "The hooks")
    write_atomic(out / "vectors.safetensors", safetensors.torch.save(tensors))
    write_atomic(out / "steer.py", text)
    return Exported("hook", out, difference, probe.effect, text=text)


def _at_outputs(hf: nn.Module, sites: SiteMap, intervention: Intervention) -> Iterator[tuple[Point, Edit, Fold]]:
    """The edits in the order of a forward pass, each at the output of a module."""
    found = []
    for edit in intervention.edits:
        fold = fold_of(edit, sites[edit.site])
        site = _after(sites.resolve(edit.site))
        if site == Site("resid_pre", 0) and (fold.is_constant or not position_tables(hf)):
            site = Site("embed")
        point = sites[site]
        if point.side != "out" or point.columns is not None or point.heads is not None:
            raise refused(edit, f"{edit.site} is not the output of a module of its own, and this file edits only those")
        found.append((point, edit, fold))
    yield from sorted(found, key=lambda item: item[0].site.order)


def _ends_with(out: Path, kind: str, suffix: str) -> None:
    if out.suffix != suffix:
        raise InvalidInputError(f"export(kind={kind!r}, out={str(out)!r}): the name has to end with {suffix}.")
