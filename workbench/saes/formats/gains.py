"""Transcoders that read a norm without its gain, made to read the MLP's input, which is a site."""

from __future__ import annotations

import re

import torch

from workbench.core.errors import MismatchError
from workbench.core.precision import precise
from workbench.hooks.sites import Site
from workbench.models.frozennorm import norm_before
from workbench.models.model import Model
from workbench.saes.formats.lensmodule import LensSAE

_NORMALISED = re.compile(r"blocks\.(\d+)\.ln2\.hook_normalized")


@torch.no_grad()
def take_up_gain(model: Model, sae: LensSAE) -> None:
    """Changes a transcoder that names `blocks.l.ln2.hook_normalized` into the same one at `mlp_in.l`; leaves others.

    What a gained norm gives is `gain * normalised`, so encoder rows and linear path are divided by the gain. A layer
    norm of TransformerLens has weight and bias before that hook, so there nothing but the name changes.

    Raises:
        MismatchError: if there is no such norm, the width is another, or a gain is 0, behind which nothing can be read.
    """
    metadata = sae.cfg.metadata
    found = _NORMALISED.fullmatch(str(metadata.get("hook_name")))
    if found is None:
        return
    site = model.resolve(str(Site("mlp_in", int(found[1]))))
    stream = model.resolve(str(Site("resid_pre" if model.site_map.is_parallel else "resid_mid", int(found[1]))))
    norm = norm_before(model, model.site_map[site], stream, "load_sae")
    gain = norm.gain.to(sae.W_enc.device)
    if len(gain) != len(sae.W_enc):
        raise MismatchError(
            f"load_sae: the transcoder for {site} reads {len(sae.W_enc)} numbers per token; {model.name} has "
            f"{len(gain)} there. Load the model that it was trained on."
        )
    metadata["hook_name"] = site.tl_name
    if norm.centres:
        return
    if not bool(gain.all()):
        raise MismatchError(
            f"load_sae: the norm before the MLP of layer {site.layer} of {model.name} has a gain of 0, so what the "
            "transcoder reads can't be found behind it. Load the model that it was trained on."
        )
    sae.W_enc.copy_((precise(sae.W_enc) / precise(gain)[:, None]).to(sae.W_enc))
    if (skip := getattr(sae, "W_skip", None)) is not None:
        skip.copy_((precise(skip) / precise(gain)).to(skip))
