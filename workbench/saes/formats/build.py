"""From a folded `RawSAE` to a sae_lens SAE that encodes and decodes the same, and back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import field, make_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.core.errors import InvalidInputError, MismatchError
from workbench.core.jsontext import Record
from workbench.saes.formats.lensmodule import LensSAE, sae_lens_module
from workbench.saes.formats.raw import Activation, RawSAE, fold

_STOCK: dict[str, Activation] = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_STOCK_TRANSCODERS = {
    ("relu", False): "Transcoder", ("relu", True): "SkipTranscoder",
    ("jumprelu", False): "JumpReLUTranscoder", ("jumprelu", True): "JumpReLUSkipTranscoder",
}  # fmt: skip
_STOCK_CLASSES = {"relu": "StandardSAE", "topk": "TopKSAE", "jumprelu": "JumpReLUSAE", "gated": "GatedSAE"}

_GROUPMAX, _TOPK_TRANSCODER = "workbench_groupmax", "workbench_topk_transcoder"


class GroupMax(nn.Module):
    """The largest pre-activation of each of k groups of neighbouring features, if it is positive."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Tensor) -> Tensor:
        """Activations.

        >>> GroupMax(2)(torch.tensor([1.0, 2.0, -3.0, -4.0]))
        tensor([0., 2., 0., 0.])
        """
        groups = pre.relu().unflatten(-1, (self.k, -1))
        best = groups.max(-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, best.indices, best.values).flatten(-2)


def _named(architecture: str) -> Record:
    return {"architecture": classmethod(lambda _: architecture)}


@functools.cache
def _own_classes() -> dict[str, tuple[type, type]]:
    """Inference classes that sae_lens lacks, registered under names that it refuses when this package is missing."""
    lens = sae_lens_module()
    from sae_lens.registry import SAE_CLASS_REGISTRY
    from sae_lens.saes.topk_sae import TopK

    # made by hand: a dataclass statement here would be type-checked in tests, and sae_lens itself passes other types
    group_config = make_dataclass("GroupMaxSAEConfig", [], bases=(lens.TopKSAEConfig,), namespace=_named(_GROUPMAX))
    options = [("k", int, field(default=32)), ("grouped", bool, field(default=False))]
    transcoder_config = make_dataclass(
        "TopKTranscoderConfig", options, bases=(lens.SkipTranscoderConfig,), namespace=_named(_TOPK_TRANSCODER)
    )

    class GroupMaxSAE(lens.TopKSAE):
        def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
            return GroupMax(self.cfg.k)

    class TopKTranscoder(lens.SkipTranscoder):
        def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
            return GroupMax(self.cfg.k) if self.cfg.grouped else TopK(self.cfg.k)

    own = {_GROUPMAX: (GroupMaxSAE, group_config), _TOPK_TRANSCODER: (TopKTranscoder, transcoder_config)}
    for name, classes in own.items():
        if name not in SAE_CLASS_REGISTRY:
            lens.register_sae_class(name, *classes)
    return own


def register_own_classes() -> None:
    """Makes the inference classes that sae_lens lacks known to it; a second call does nothing."""
    _own_classes()


def build(raw: RawSAE, device: str = "cpu", dtype: torch.dtype | None = None) -> LensSAE:
    """The sae_lens SAE of a folded `RawSAE`.

    Thresholds stay in fp32 also where the weights do not: rounded to bf16 they switch features on and off.

    Raises:
        InvalidInputError: for a combination that no SAE class computes.
    """
    raw = fold(raw)
    is_transcoder = raw.transcodes or raw.W_skip is not None
    cls, config_class, extra = _classes(raw, is_transcoder)
    lens = sae_lens_module()
    from sae_lens.saes.sae import SAEMetadata

    config = config_class(
        d_in=raw.W_enc.shape[0], d_sae=raw.W_dec.shape[0], dtype="float32", device="cpu",
        apply_b_dec_to_input=raw.subtracts_b_dec and not is_transcoder, normalize_activations=raw.norm,
        metadata=SAEMetadata(**raw.metadata), **extra,
    )  # fmt: skip
    with warnings.catch_warnings():
        # sae_lens warns of models that need loading options; the caller has its model already
        warnings.simplefilter("ignore")
        config.device = "meta"
        sae = cls(config)
    config.device = "cpu"
    sae.load_state_dict(_state(raw, sae), assign=True)
    assert isinstance(sae, lens.SAE)
    return placed(sae, device, dtype)


def placed(sae: LensSAE, device: str, dtype: torch.dtype | None) -> LensSAE:
    """The SAE on a device and in a dtype, ready for inference."""
    threshold = getattr(sae, "threshold", None)
    exact = None if threshold is None else threshold.detach().float()
    sae = sae.to(device=device) if dtype is None else sae.to(device=device, dtype=dtype)
    sae.device = torch.device(device)
    if exact is not None and dtype is not None:
        sae.threshold.data = exact.to(device)
    # heads stand side by side in the activations of this package
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.eval().requires_grad_(False)


def _classes(raw: RawSAE, is_transcoder: bool) -> tuple[Any, Any, Record]:
    lens = sae_lens_module()
    if not is_transcoder:
        if raw.activation == "groupmax":
            return *_own_classes()[_GROUPMAX], {"k": raw.k}
        name = _STOCK_CLASSES[raw.activation]
        return getattr(lens, name), getattr(lens, f"{name}Config"), {"k": raw.k} if raw.activation == "topk" else {}
    extra: Record = {"d_out": raw.W_dec.shape[1]}
    if raw.norm != "none":
        raise InvalidInputError(f"A transcoder that normalises its input by {raw.norm} can't be built by sae_lens.")
    if raw.activation in ("topk", "groupmax"):
        extra |= {"k": raw.k, "grouped": raw.activation == "groupmax"}
        return *_own_classes()[_TOPK_TRANSCODER], extra
    name = _STOCK_TRANSCODERS.get((raw.activation, raw.W_skip is not None))
    if name is None:
        raise InvalidInputError(f"There is no transcoder with activation {raw.activation}; load it as tensors.")
    from sae_lens.saes import transcoder

    return getattr(transcoder, name), getattr(transcoder, f"{name}Config"), extra


def _state(raw: RawSAE, sae: LensSAE) -> dict[str, nn.Parameter]:
    tensors = raw.tensors()
    if raw.activation == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    wanted = set(sae.state_dict())
    if "W_skip" in wanted and "W_skip" not in tensors:
        tensors["W_skip"] = torch.zeros(raw.W_dec.shape[1], raw.W_enc.shape[0])
    assert wanted == set(tensors), f"{type(sae).__name__} has {sorted(wanted)}, given {sorted(tensors)}"
    return {name: nn.Parameter(tensor.float().contiguous()) for name, tensor in tensors.items()}


def unbuilt(sae: LensSAE, scale: float | None = None) -> RawSAE | None:
    """What a sae_lens SAE leaves to be folded; None if nothing, or if its kind is unknown here.

    Args:
        sae: a sae_lens inference SAE.
        scale: by what its activations were multiplied in training, for "expected_average_only_in".

    Raises:
        MismatchError: if it needs such a scale and there is none.
    """
    config = sae.cfg
    needs_scale = config.normalize_activations == "expected_average_only_in"
    rescales = bool(getattr(config, "rescale_acts_by_decoder_norm", False))
    if config.normalize_activations == "covariance_whitening":
        raise MismatchError(
            "This SAE was trained on whitened activations, and the whitening is not in its weights. Save it with "
            "sae_lens' final checkpoint, which folds it."
        )
    if needs_scale and scale is None:
        raise MismatchError(
            "This SAE was trained on activations scaled to a mean norm of sqrt(d_in) (expected_average_only_in), and "
            "neither its weights nor an activation_scaler.json beside them hold the factor. Pass scale=, the factor "
            "by which activations were multiplied (sqrt(d_in) over their mean norm)."
        )
    activation = _STOCK.get(config.architecture())
    if not (needs_scale or rescales or scale not in (None, 1.0)):
        return None
    if activation is None:
        if not needs_scale and scale in (None, 1.0):
            return None  # its own code divides by the decoder norms
        raise InvalidInputError(f"scale={scale} can't be folded into an SAE of kind {config.architecture()!r}.")
    tensors = {name: value.detach() for name, value in sae.state_dict().items()}
    if activation == "gated":
        tensors["b_enc"] = tensors.pop("b_gate")
    norm = (
        config.normalize_activations
        if config.normalize_activations in ("layer_norm", "constant_norm_rescale")
        else "none"
    )
    return RawSAE(
        activation=activation, k=getattr(config, "k", None), subtracts_b_dec=config.apply_b_dec_to_input,
        rescales=rescales, scale=scale or 1.0, norm=norm, metadata=config.metadata.to_dict(), **tensors,
    )  # fmt: skip
