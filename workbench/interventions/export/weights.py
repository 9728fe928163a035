"""An intervention as changed weights of a copy of the model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.core.errors import InvalidInputError, NotExactlyExportable
from workbench.hooks.ends import embedding, unembedding
from workbench.hooks.sites import SiteMap
from workbench.interventions.export.result import EditedLogits, Exported
from workbench.interventions.export.stream import FoldedWriter, folded_writers
from workbench.interventions.intervention import Intervention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_BIAS_FLAGS = ("attention_bias", "mlp_bias", "use_bias", "bias", "qkv_bias")
"""Names under which configs say that projections have a bias."""


def export_weights(
    hf: PreTrainedModel, sites: SiteMap, intervention: Intervention, out: Path | None, tolerance: float
) -> Exported:
    """A copy of the model whose weights do what the intervention does, checked on probe tokens.

    Raises:
        NotExactlyExportable: if there are no such weights, or if `out` is given and the family's config can't say that
            the copy has the biases that it needs.
    """
    if out is not None:
        _require_free(out)
    folded = folded_writers(hf, sites, intervention)
    probe = EditedLogits(hf, sites, intervention, tolerance)
    changed = copy.deepcopy(hf)
    notes = [untie(changed)] if any(item.writer.is_embedding for item in folded) else []
    added = [item.writer.path for item in folded if fold_into(changed.get_submodule(item.writer.path), item)]
    storable = _declare_biases(changed, added)
    difference = probe.check(changed, "The model with folded weights")
    if added:
        notes.append(f"{len(added)} projections got a bias" + ("" if storable else ", which its config can't declare"))
    if out is not None:
        if not storable:
            raise NotExactlyExportable(
                f"{added[0]} needs a bias, and no setting of {type(changed).__name__} gives it one, so the saved "
                "model would be loaded without it. Leave out `out` for the copy in memory, or export another kind."
            )
        changed.config.architectures = [type(changed).__name__]
        changed.save_pretrained(out)
    return Exported("weights", out, difference, probe.effect, changed, notes=tuple(filter(None, notes)))


def untie(hf: PreTrainedModel) -> str:
    """Gives the unembedding weights of its own where it shares those of the embedding; says so in words."""
    source, target = embedding(hf), unembedding(hf)
    if target.weight is not source.weight:
        return ""
    target.weight = nn.Parameter(source.weight.detach().clone(), requires_grad=False)
    hf.config.tie_word_embeddings = False
    # transformers 5 keeps the tied names on the instance and would leave the unembedding out of the file.
    if hasattr(hf, "all_tied_weights_keys"):
        hf.all_tied_weights_keys = {}
    return "embedding and unembedding were tied and are separate now"


def fold_into(module: nn.Module, item: FoldedWriter) -> bool:
    """Replaces the weights of a writer by the folded ones; returns whether a bias had to be added."""
    weight = module.get_parameter("weight")
    columns, transposed = item.fold.columns(item.writer.columns), item.writer.is_transposed
    if item.writer.is_embedding:
        columns, transposed = columns + item.fold.bias[:, None], True
    folded = (columns.T if transposed else columns).to(weight).contiguous()
    module.weight = nn.Parameter(folded, requires_grad=False)
    if item.writer.is_embedding:
        return False
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is None and not bool((item.fold.bias != 0).any()):
        return False
    module.bias = nn.Parameter(folded_bias(bias, item).to(weight), requires_grad=False)
    return bias is None


def folded_bias(bias: Float[Tensor, " d"] | None, item: FoldedWriter) -> Float[Tensor, " d"]:
    """`A b + c`, float64."""
    if bias is None:
        return item.fold.bias
    return item.fold.columns(bias.detach().double()[:, None])[:, 0] + item.fold.bias


def _declare_biases(hf: PreTrainedModel, added: Sequence[str]) -> bool:
    """Sets the config so that a model made from it has the added biases; False if no setting does.

    A setting may give a bias to further projections; they get zeros.
    """
    if not added:
        return True
    names = hf.state_dict().keys()
    flags = [flag for flag in _BIAS_FLAGS if getattr(hf.config, flag, None) is False]
    for chosen in itertools.chain.from_iterable(itertools.combinations(flags, n + 1) for n in range(len(flags))):
        config = copy.deepcopy(hf.config)
        for flag in chosen:
            setattr(config, flag, True)
        with torch.device("meta"):
            expected = type(hf)(config).state_dict()
        extra = [name for name in expected if name not in names]
        if names <= expected.keys() and all(name.endswith(".bias") for name in extra):
            for name in extra:
                path, _, _ = name.rpartition(".")
                module = hf.get_submodule(path)
                module.bias = nn.Parameter(
                    module.get_parameter("weight").new_zeros(expected[name].shape), requires_grad=False
                )
            for flag in chosen:
                setattr(hf.config, flag, True)
            return True
    return False


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInputError(f"{out} exists and is not an empty folder; name a new one for the changed model.")
