"""Whether the weights of a checkpoint are those that the model's config describes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from workbench.core.errors import CorruptFileError, MismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_COMPUTED = re.compile(
    r"(^|\.)(masked_bias|causal_mask|position_ids|(\w+_)?inv_freq|cos_cached|sin_cached|attn_bias|(attn|attention)\.bias)$"
)
"""Constants that older versions of transformers stored with the weights."""

_OTHER_PARTS = re.compile(
    r"^(?:[a-z_]\w*\.){0,2}(vision|visual|image|audio|speech|video|multi_?modal|mm|mtp|nextn|medusa|eagle|talker|v_head|value_head|"
    r"score|classifier|reward|regression)(_\w+|\d*)?\."
)
"""Towers of other modalities, multi-token prediction and further heads: next to the language model, not part of it."""

_SHOWN = 3
_FLOAT = re.compile(r"B?F\d")
"""Names of floating-point types in the header of a safetensors file."""


def weight_files(folder: Path) -> list[Path]:
    """The files of a model folder that hold weights."""
    return [file for kind in ("*.safetensors", "*.bin") for file in sorted(folder.glob(kind)) if file.is_file()]


def stored_dtypes(folder: Path) -> dict[str, str]:
    """The data type of each tensor in the safetensors files of a folder, in the words of their headers (F32, BF16)."""
    stored = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                stored |= {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
    return stored


def is_float(stored: str) -> bool:
    """Whether a data type of a safetensors header is one of floating-point numbers.

    >>> is_float("BF16"), is_float("F8_E4M3"), is_float("I8"), is_float("C64")
    (True, True, False, False)
    """
    return _FLOAT.match(stored) is not None


def require_real_numbers(hf: PreTrainedModel, stored: Mapping[str, str], where: str) -> None:
    """Checks that no weight is stored as integers, truth values or complex numbers, unless the config quantises.

    Raises:
        CorruptFileError: with the name of the weight.
    """
    if hasattr(hf.config, "quantization_config"):
        return
    parameters = {name for name, _ in hf.named_parameters()}
    for name, dtype in stored.items():
        if not is_float(dtype) and {name, f"{hf.base_model_prefix}.{name}"} & parameters:
            raise CorruptFileError(
                f"Model {where!r}: {name} is stored as {dtype}, which is no floating-point type, and its config names "
                "no quantisation. Fetch both again from the same revision."
            )


def pickled_class(error: Exception) -> str | None:
    """What a file holds besides tensors, by torch's refusal to unpickle it; None for another error."""
    named = re.search(r"(?:GLOBAL|class|function) `?([\w.]+)", str(error))
    if type(error).__name__ != "UnpicklingError":
        return None
    return f"a pickled {named[1]}" if named else "pickled objects"


def require_every_weight(hf: PreTrainedModel, loaded: Mapping[str, Collection[Any]], where: str) -> None:
    """Checks what `from_pretrained(..., output_loading_info=True)` reports: every weight used, none made up.

    Not counted: tied weights that are stored once, what the class in transformers declares as not needed, constants
    that the model computes, scales of quantised weights, and parts next to the language model, such as a vision tower
    or layers for multi-token prediction.

    Raises:
        MismatchError: for missing or unexpected weights, or weights of another shape.
        CorruptFileError: for weights that hold NaN or infinite values.
    """
    wrong = [f"{name} is {tuple(there)} in the file, {tuple(here)} by the config"
             for name, there, here in sorted(loaded["mismatched_keys"])]  # fmt: skip
    _refuse(where, "differ in shape", wrong)
    _refuse(where, "are missing in its files", loaded["missing_keys"])
    dropped = [name for name in loaded["unexpected_keys"] if not _is_beside(hf, name)]
    _refuse(where, f"are in its files and not in a {type(hf).__name__} of this config", dropped)
    for name, parameter in hf.named_parameters():
        if _is_spoilt(parameter):
            raise CorruptFileError(
                f"Model {where!r}: {name} holds NaN or infinite values as {parameter.dtype}. Fetch the file again, or "
                "load the model as 'float32' if its values are beyond the range of this type."
            )


def _refuse(where: str, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise MismatchError(
            f"Model {where!r}: {len(names)} weights {what}: {'; '.join(names[:_SHOWN])}{more}. Its config.json and its "
            "weights don't belong together, or a file is incomplete; fetch both again from the same revision."
        )


def _is_beside(hf: PreTrainedModel, name: str) -> bool:
    """Whether the language model is complete without a weight that it has no place for."""
    if _COMPUTED.search(name) or _OTHER_PARTS.search(name):
        return True
    stored = hf.state_dict().keys()
    buffers = [path for path, _ in hf.named_buffers() if path not in stored]
    if any(path == name or path.endswith(f".{name}") for path in buffers):
        return True
    config = hf.config.get_text_config()
    extra = getattr(config, "num_nextn_predict_layers", None) or 0
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if layer and 0 <= int(layer[1]) - config.num_hidden_layers < extra:
        return True
    # scales and maps that a quantiser stores next to a weight, and has read or does without
    parent, _, last = name.rpartition(".")
    return _is_quantised(hf) and last not in ("weight", "bias") and _has_module(hf, parent)


def _is_quantised(hf: PreTrainedModel) -> bool:
    return getattr(hf, "hf_quantizer", None) is not None


def _has_module(hf: nn.Module, path: str) -> bool:
    return any(known == path or known.endswith(f".{path}") for known, _ in hf.named_modules())


def _is_spoilt(parameter: torch.Tensor) -> bool:
    """Whether NaN or infinite values are in it; -inf is allowed in a bias, where it rules a token out."""
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2 or not parameter.numel():
        return False
    low, high = (float(bound) for bound in parameter.detach().aminmax())
    return low != low or high == float("inf") or (low == -float("inf") and parameter.ndim > 1)
