"""An intervention as a LoRA adapter in the files of PEFT; adapters merged into a model and taken out again."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import CorruptFileError, DegenerateInputError, EditError, MissingFileError, ShapeError
from workbench.core.numbers import counted
from workbench.core.records import load_json, write_atomic
from workbench.hooks.ends import embedding, unembedding
from workbench.hooks.sites import SiteMap
from workbench.interventions.export.folds import refused
from workbench.interventions.export.result import EditedLogits, Exported
from workbench.interventions.export.stream import FoldedWriter, folded_writers
from workbench.interventions.export.weights import folded_bias
from workbench.interventions.intervention import Intervention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class _Delta:
    """What an adapter adds to one module: `B A` to the matrix that writes, `bias` to its bias."""

    a: Float[Tensor, "r n"]
    b: Float[Tensor, "d r"]
    bias: Float[Tensor, " d"] | None = None


def export_lora(
    hf: PreTrainedModel, sites: SiteMap, intervention: Intervention, out: Path, tolerance: float
) -> Exported:
    """Writes a folder that `peft.PeftModel.from_pretrained` reads; checked on probe tokens before it is written.

    Raises:
        NotExactlyExportable: if the change of the weights is not of low rank, or changes biases that an adapter of
            PEFT can't.
    """
    folded = folded_writers(hf, sites, intervention)
    if not folded:
        raise DegenerateInputError("export: the intervention changes no weight (strength 0?), so there is no adapter.")
    probe = EditedLogits(hf, sites, intervention, tolerance)
    deltas = {item.writer.path: _delta(item) for item in folded}
    rank = max(delta.a.shape[0] for delta in deltas.values())
    has_bias = _bias_everywhere(folded, deltas)
    tensors: dict[str, Tensor] = {}
    for item in folded:
        delta = deltas[item.writer.path]
        part = "lora_embedding_{}" if item.writer.is_embedding else "lora_{}.weight"
        spare = rank - delta.a.shape[0]
        name = _PREFIX + item.writer.path + "."
        tensors[name + part.format("A")] = nn.functional.pad(delta.a, (0, 0, 0, spare)).float().contiguous()
        tensors[name + part.format("B")] = nn.functional.pad(delta.b, (0, spare)).float().contiguous()
        if has_bias:
            zero = torch.zeros(len(delta.b), dtype=torch.float64)
            tensors[name + "lora_B.bias"] = (zero if delta.bias is None else delta.bias).float().contiguous()
    tensors = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    config = _config(hf, folded, rank, has_bias)
    changed = copy.deepcopy(hf)
    MergedLora(changed, list(deltas), 1.0, tensors)
    difference = probe.check(changed, "The model with the merged adapter")
    write_atomic(out / _TENSORS, safetensors.torch.save(tensors, {"format": "pt"}))
    write_atomic(out / _CONFIG, json.dumps(config, indent=2))
    tied = embedding(hf).weight is unembedding(hf).weight
    notes = (
        ("embedding and unembedding are tied: use the adapter unmerged, or untie them before PEFT merges it",)
        if tied and any(item.writer.is_embedding for item in folded)
        else ()
    )
    return Exported("lora", out, difference, probe.effect, notes=notes)


def _delta(item: FoldedWriter) -> _Delta:
    """The change of one writer as `B A`, float64."""
    fold, columns = item.fold, item.writer.columns
    if fold.dense is not None:
        raise refused(
            item.edit, f"it changes all of {item.writer.path}, which no adapter of low rank can; export weights"
        )
    a, b = fold.read @ columns, fold.write.T
    if item.writer.is_embedding:
        if bool((fold.bias != 0).any()):
            a = torch.cat([a, torch.ones(1, columns.shape[1]).to(a)])
            b = torch.cat([b, fold.bias[:, None]], dim=1)
        return _Delta(a, b)
    own: Tensor | None = getattr(item.writer.module, "bias", None)
    change = folded_bias(own, item) - (0 if own is None else own.detach().double())
    size = 1.0 if own is None else float(own.abs().max())
    bias = change if bool(change.abs().max() > 1e-7 * size) else None
    if not len(a):  # a rank of at least one, so that the module takes part
        a, b = columns.new_zeros(1, columns.shape[1]), columns.new_zeros(columns.shape[0], 1)
    return _Delta(a, b, bias)


def _bias_everywhere(folded: list[FoldedWriter], deltas: Mapping[str, _Delta]) -> bool:
    """Whether the adapter has biases; PEFT has them for all of its modules or for none."""
    with_bias = [item for item in folded if deltas[item.writer.path].bias is not None]
    if not with_bias:
        return False
    for item in folded:
        if item.writer.is_embedding or getattr(item.writer.module, "bias", None) is None:
            has = "an embedding" if item.writer.is_embedding else "a projection without bias"
            raise refused(
                with_bias[0].edit,
                f"the bias of {with_bias[0].writer.path} has to change, and PEFT adapters change biases only where "
                f"every adapted module has one; {item.writer.path} is {has}. Export weights instead",
            )
    return True


def _config(hf: PreTrainedModel, folded: list[FoldedWriter], rank: int, has_bias: bool) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(hf, "name_or_path", "") or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "lora_bias": has_bias,
        "bias": "none",
        "fan_in_fan_out": any(item.writer.is_transposed for item in folded),
        "inference_mode": True,
        "target_modules": [item.writer.path for item in folded],
    }


class MergedLora(OneLine):
    """An adapter merged into a model until `unmerge`, or until the end of a `with` block.

    The model's own parameters are set aside and not written to, so that unmerging restores them bit for bit, and tied
    embeddings stay two different things while the adapter is in.

    Attributes:
        modules: paths of the changed modules.
    """

    def __init__(self, hf: nn.Module, modules: Sequence[str], scale: float, tensors: Mapping[str, Tensor]) -> None:
        self._originals: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self.modules = tuple(modules)
        parts = [(hf.get_submodule(path), *_parts(tensors, path, scale)) for path in self.modules]
        try:
            for path, (module, change, bias) in zip(self.modules, parts, strict=True):
                self._merge(path, module, change, bias)
        except BaseException:
            self.unmerge()
            raise

    def _merge(self, path: str, module: nn.Module, change: Tensor, bias: Tensor | None) -> None:
        weight = module.get_parameter("weight")
        turned = change if isinstance(module, nn.Linear) else change.T
        if turned.shape != weight.shape:
            raise ShapeError(f"The adapter changes {path} by {tuple(turned.shape)}; it is {tuple(weight.shape)}.")
        self._put(module, "weight", weight + turned.to(weight))
        if bias is not None:
            self._put(module, "bias", module.get_parameter("bias") + bias.to(weight))

    def _put(self, module: nn.Module, name: str, value: Tensor) -> None:
        self._originals.append((module, name, getattr(module, name)))
        setattr(module, name, nn.Parameter(value.detach(), requires_grad=False))

    def unmerge(self) -> None:
        """Puts the model's own parameters back."""
        for module, name, original in reversed(self._originals):
            setattr(module, name, original)
        self._originals = []

    def _shown_line(self) -> str:
        return f"{counted(len(self.modules), 'modules')}, {'merged' if self._originals else 'not merged'}"

    def __enter__(self) -> MergedLora:
        if not self._originals:
            raise EditError("This adapter has been unmerged. Merge it again with merge_lora.")
        return self

    def __exit__(self, *_: object) -> None:
        self.unmerge()


@checked
def merge_lora(hf: nn.Module, folder: str | Path) -> MergedLora:
    """Merges a LoRA adapter in the files of PEFT into a model, until it is unmerged.

    Args:
        hf: the Hugging Face model, such as `model.hf`.
        folder: with `adapter_config.json` and `adapter_model.safetensors`, as `Model.export(..., "lora", folder)`
            writes it.

    Raises:
        MissingFileError: if there is no adapter.
        CorruptFileError: if it can't be read, or uses what is not supported here (rank patterns, DoRA, rsLoRA).
        ShapeError: if it is for another model.
    """
    folder = Path(folder)
    for name in (_CONFIG, _TENSORS):
        if not (folder / name).is_file():
            raise MissingFileError(f"{folder} holds no LoRA adapter: {name} not found.")
    config = load_json(folder / _CONFIG, dict, foreign=True)
    if not isinstance(config.get("target_modules"), list) or not config.get("r"):
        raise CorruptFileError(f"{folder / _CONFIG} is not the config of a LoRA adapter with a list of modules.")
    other = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    if other:
        raise CorruptFileError(f"{folder / _CONFIG} uses {', '.join(other)}, which merge_lora can't; merge with PEFT.")
    try:
        tensors = safetensors.torch.load_file(folder / _TENSORS)
    except safetensors.SafetensorError as error:
        raise CorruptFileError(f"{folder / _TENSORS} can't be read: {error}.") from error
    known = dict(hf.named_modules())
    unknown = [path for path in config["target_modules"] if path not in known]
    if unknown:
        raise CorruptFileError(
            f"{folder / _CONFIG}: {type(hf).__name__} has no module {unknown[0]!r}; give the full paths of modules."
        )
    return MergedLora(hf, config["target_modules"], float(config["lora_alpha"]) / float(config["r"]), tensors)


def _parts(tensors: Mapping[str, Tensor], path: str, scale: float) -> tuple[Tensor, Tensor | None]:
    """Change of the matrix `(d, n)` and of the bias of one module."""
    for form in ("lora_embedding_{}", "lora_{}.weight"):
        names = [f"{_PREFIX}{path}.{form.format(part)}" for part in "AB"]
        if all(name in tensors for name in names):
            a, b = (tensors[name].double() for name in names)
            bias = tensors.get(f"{_PREFIX}{path}.lora_B.bias")
            return scale * (b @ a), None if bias is None else scale * bias
    raise CorruptFileError(f"The adapter names {path} and has no lora_A and lora_B for it.")
