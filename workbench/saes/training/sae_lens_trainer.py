"""Our architectures for sae_lens' own trainer: its training classes, their loss and gradients from the sparse step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, make_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.jsontext import Record
from workbench.saes.architectures.base import AuxTask, StepOptions, StepResult
from workbench.saes.config import ARCHITECTURES, LensSpec
from workbench.saes.formats.lensmodule import sae_lens_module
from workbench.saes.kernels.weights import SAEWeights
from workbench.saes.training.kernel_choice import with_kernel

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput, TrainStepOutput

    _Stock = TrainingSAE[TrainingSAEConfig]
else:
    _Stock = object

PREFIX = "workbench_"
_OUTSIDE = ("none", "expected_average_only_in", "covariance_whitening")
"""Normalisations that sae_lens' trainer applies before the SAE sees its input."""


@checked
def register_with_sae_lens() -> dict[str, tuple[type, type]]:
    """Makes `workbench_relu, _topk, _batchtopk, _jumprelu, _gated, _matryoshka` training architectures of sae_lens.

    Returns the training class and config class of each, by name; a second call returns the same. They take the configs
    of the classes they replace, train in `SAETrainer` with the kernels of this package, and save stock inference
    folders. Two things differ on purpose: `aux_loss_coefficient` weighs a loss that is normalised by the variance of
    the residual (1/32 by default, as in Gao et al. 2024), and the threshold of BatchTopK is corrected for its start at
    zero, which sae_lens saves too low after a short run.
    """
    lens = sae_lens_module()
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    names = [name for name, spec in ARCHITECTURES.items() if spec.lens.trained_as is not None]
    for name in names:
        if PREFIX + name not in SAE_TRAINING_CLASS_REGISTRY:
            lens.register_sae_training_class(PREFIX + name, *_classes(name, ARCHITECTURES[name].lens))
    return {PREFIX + name: SAE_TRAINING_CLASS_REGISTRY[PREFIX + name] for name in names}


def _classes(name: str, spec: LensSpec) -> tuple[type, type]:
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    stock, stock_config = SAE_TRAINING_CLASS_REGISTRY[str(spec.trained_as)]
    _, inference = SAE_CLASS_REGISTRY[spec.saved_as]
    namespace = {
        "architecture": classmethod(lambda _: PREFIX + name),
        "get_inference_config_class": lambda _: inference,
    }
    has_aux = "aux_loss_coefficient" in stock_config.__dataclass_fields__
    aux = [("aux_loss_coefficient", float, field(default=1 / 32))] if has_aux else []
    config = make_dataclass(
        f"Workbench{stock_config.__name__}", [("kernel", str, field(default="csr")), *aux], bases=(stock_config,),
        namespace=namespace, kw_only=True,
    )  # fmt: skip
    base = _WithThreshold if hasattr(stock, "update_topk_threshold") else _SparselyTrained
    return type(f"Workbench{stock.__name__}", (base, stock), {"spec": spec}), config


class _SparselyTrained(_Stock):
    """What replaces the dense forward pass of a training SAE of sae_lens, which is its other base class."""

    spec: LensSpec

    def __init__(self, cfg: TrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        if cfg.normalize_activations not in _OUTSIDE or not cfg.apply_b_dec_to_input:
            raise InvalidInputError(
                f"normalize_activations={cfg.normalize_activations!r}, apply_b_dec_to_input="
                f"{cfg.apply_b_dec_to_input}: the sparse step needs one of {', '.join(_OUTSIDE)} and True."
            )
        assert self.spec.build is not None, "only kinds that sae_lens can train are registered"
        self.sparse_architecture = with_kernel(self.spec.build(cfg), self._own.kernel)

    @property
    def _own(self) -> Any:
        """The config with the options of its own class, which differs by architecture."""
        return self.cfg

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Loss of one batch, whose backward pass hands out gradients that are computed already."""
        from sae_lens.saes.sae import TrainStepOutput

        x = step_input.sae_in.float()
        results: list[StepResult] = []
        names, parameters = zip(*_parameters(self).items(), strict=True)

        def run() -> tuple[Tensor, list[Tensor]]:
            # autocast would round products of which gradients are made
            with torch.autocast(x.device.type, enabled=False):
                weights = _weights(dict(zip(names, parameters, strict=True)))
                self.sparse_architecture.after_step(weights)
                result = self.sparse_architecture.step(weights, x, None, self._options(step_input))
            results.append(result)
            total = result.loss + result.aux_loss + result.sparsity_loss
            return total, [_as_stored(name, result.gradients) for name in names]

        loss = _Step.apply(run, *parameters)
        result = results[0]
        self._after(result)
        losses = {"mse_loss": result.loss, "auxiliary_reconstruction_loss": result.aux_loss}
        if self.spec.penalty:
            losses[self.spec.penalty] = result.sparsity_loss
        acts, out = self._shown(step_input, x, result)
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=out,
            feature_acts=acts,
            hidden_pre=x.new_zeros(0),
            loss=loss,
            losses=losses,
        )

    def _options(self, step_input: TrainStepInput) -> StepOptions:
        sparsity = float(step_input.coefficients.get(self.spec.coefficient, 0.0)) if self.spec.coefficient else 0.0
        return StepOptions(aux=self._aux(step_input.dead_neuron_mask), sparsity=sparsity)

    def _aux(self, dead: Tensor | None) -> AuxTask | None:
        if dead is None or not self.sparse_architecture.revives or not bool(dead.any()):
            return None
        indices = dead.nonzero().flatten()
        return AuxTask(indices, min(max(1, self.cfg.d_in // 2), len(indices)), self._own.aux_loss_coefficient)

    def _after(self, result: StepResult) -> None:
        """Nothing to keep from a step."""
        del result

    @torch.no_grad()
    def _shown(self, step_input: TrainStepInput, x: Tensor, result: StepResult) -> tuple[Any, Tensor]:
        """What the trainer reads of the activations; the tensors themselves only where it logs them."""
        if not step_input.is_logging_step:
            return _Fired(result.fired, len(x)), x
        acts = self.encode(step_input.sae_in)
        return acts, self.decode(acts)


class _WithThreshold(_SparselyTrained):
    """BatchTopK and Matryoshka keep a running threshold, corrected for its start at zero when it is saved."""

    topk_threshold: Tensor
    threshold_weight: Tensor

    def __init__(self, cfg: TrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        weight = torch.zeros((), dtype=torch.double, device=self.topk_threshold.device)
        self.register_buffer("threshold_weight", weight)

    @torch.no_grad()
    def _after(self, result: StepResult) -> None:
        rate, least = self._own.topk_threshold_lr, result.threshold.double()
        there = least.isfinite()
        self.topk_threshold.copy_(
            torch.where(there, self.topk_threshold.lerp(least.nan_to_num(), rate), self.topk_threshold)
        )
        one = torch.ones_like(self.threshold_weight)
        self.threshold_weight.copy_(torch.where(there, self.threshold_weight.lerp(one, rate), self.threshold_weight))

    def process_state_dict_for_saving_inference(self, state_dict: Record) -> None:
        """Replaces the running threshold by what it stands for."""
        weight = state_dict.pop("threshold_weight")
        state_dict["topk_threshold"] = state_dict["topk_threshold"] / weight.clamp_min(1e-12)
        super().process_state_dict_for_saving_inference(state_dict)


class _Fired:
    """Stands for feature activations where the trainer only counts them: which fired on how many tokens."""

    is_sparse = False

    def __init__(self, counts: Tensor, rows: int) -> None:
        self.counts, self.rows = counts, rows

    def bool(self) -> _Fired:
        """Itself: counting is all it does."""
        return self

    def float(self) -> _Fired:
        """Itself."""
        return self

    def sum(self, dim: int) -> Tensor:
        """Tokens per feature over the tokens; features per token, on average, over the features."""
        if dim in (0, -2):
            return self.counts.to(torch.float32)
        return (self.counts.sum() / self.rows).expand(self.rows)


class _Step(torch.autograd.Function):
    """A scalar whose gradients are known when it is."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], tuple[Tensor, list[Tensor]]], *parameters: Tensor) -> Tensor:
        del parameters
        total, ctx.gradients = run()
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient * grad_outputs[0] for gradient in ctx.gradients)


def _parameters(sae: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters of a training SAE by their name in `SAEWeights`."""
    parameters: dict[str, Tensor] = dict(sae.named_parameters())
    if "b_gate" in parameters:
        parameters["b_enc"] = parameters.pop("b_gate")
    return parameters


def _weights(parameters: dict[str, Tensor]) -> SAEWeights:
    parts = {name: value.detach() for name, value in parameters.items()}
    return SAEWeights(**{**parts, "W_enc": parts["W_enc"].T.contiguous()})


def _as_stored(name: str, gradients: SAEWeights) -> Tensor:
    gradient = getattr(gradients, name)
    assert isinstance(gradient, Tensor), f"the step gave no gradient of {name}"
    return gradient.T if name == "W_enc" else gradient
