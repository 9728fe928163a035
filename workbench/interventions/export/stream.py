"""Which weights an intervention amounts to: edits of the residual stream, moved to the modules that write to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.core.errors import NotExactlyExportable
from workbench.hooks.families import position_tables
from workbench.hooks.sites import Point, Site, SiteMap
from workbench.interventions.export.folds import Fold, fold_of, refused
from workbench.interventions.intervention import Edit, Intervention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
_OUTPUT_PROJECTION = {"attn_out": "z", "mlp_out": "mlp_post"}
"""The site whose module computes what the sublayer adds."""


@dataclass(frozen=True)
class Writer:
    """A module that writes to the residual stream.

    Attributes:
        site: what it writes.
        path: dotted path of the module.
        module: that module: an embedding, a `Linear`, or the `Conv1D` of GPT-2.
    """

    site: str
    path: str
    module: nn.Module

    @property
    def is_embedding(self) -> bool:
        """Whether its rows are what it writes."""
        return isinstance(self.module, nn.Embedding)

    @property
    def is_transposed(self) -> bool:
        """Whether its weight is `(d_in, d_out)`."""
        return not self.is_embedding and not isinstance(self.module, nn.Linear)

    @property
    def columns(self) -> Float[Tensor, "d n"]:
        """What it can write, one column per embedding row or input, float64."""
        weight = self.module.get_parameter("weight").detach().double()
        return weight.T if self.is_embedding or self.is_transposed else weight


@dataclass(frozen=True, eq=False)
class FoldedWriter:
    """What an intervention amounts to at one writer, and the first edit that has a part in it."""

    writer: Writer
    fold: Fold
    edit: Edit


class _Stream:
    """Walks along the residual stream and moves every edit to the writers before it."""

    def __init__(self) -> None:
        self.folds: dict[str, Fold] = {}
        self.edits: dict[str, Edit] = {}
        self.read: list[str] = []
        self.unread: list[str] = []

    def write(self, name: str) -> None:
        self.unread.append(name)

    def reading(self) -> None:
        """A sublayer reads the stream: what is in it can't be changed unnoticed any more."""
        self.read += self.unread
        self.unread = []

    def change(self, name: str, fold: Fold, edit: Edit) -> None:
        """Edits what one writer adds."""
        before = self.folds.get(name)
        self.folds[name] = fold if before is None else before.then(fold)
        self.edits.setdefault(name, edit)

    def change_all(self, fold: Fold, edit: Edit) -> None:
        """Edits the stream itself: `A (sum of writers) + c`."""
        zero = Fold.constant(torch.zeros_like(fold.bias))
        constant = fold.bias
        for name in self.read:
            before = self.folds.get(name, zero)
            if not fold.changes_nothing_after(before):
                raise refused(
                    edit,
                    f"the stream at {edit.site} still holds what {name} wrote, which a sublayer before {edit.site} has "
                    "read unedited, so no change of the weights equals it; an addition, or ablate_everywhere, has one",
                )
            constant = constant + fold.columns(before.bias[:, None])[:, 0] - before.bias
        for name in self.unread:
            before = self.folds.get(name, zero)
            if not fold.changes_nothing_after(before):
                self.change(name, fold.linear, edit)
            elif name in self.folds:
                self.folds[name] = replace(before, bias=fold.columns(before.bias[:, None])[:, 0])
        if bool((constant != 0).any()):
            self.change(self.unread[-1], Fold.constant(constant), edit)


def folded_writers(hf: PreTrainedModel, sites: SiteMap, intervention: Intervention) -> list[FoldedWriter]:
    """The writers that have to change, and how, for the model to compute what the edited one does.

    Raises:
        NotExactlyExportable: naming the edit and the reason.
    """
    edits = [(sites[edit.site], edit) for edit in intervention.edits]
    for point, edit in edits:
        _check_site(point, edit)
    edits.sort(key=lambda item: item[0].site.order)  # stable: edits at one site stay in list order
    stream, positions = _Stream(), position_tables(hf)
    events = _events(sites, bool(positions))
    at = {name: i for i, name in enumerate(events)}
    last = 0
    for point, edit in edits:
        name = str(point.site)
        for event in events[last : at[name] + 1]:
            _pass(stream, event)
        last = max(last, at[name] + 1)
        fold = fold_of(edit, point)
        if point.site.kind in RESIDUAL:
            stream.change_all(fold, edit)
        else:
            stream.change(name, fold, edit)
    return [
        FoldedWriter(writer, stream.folds[name], stream.edits[name])
        for name in stream.folds
        for writer in _writers(sites, name, positions, stream.edits[name])
    ]


def _pass(stream: _Stream, event: str) -> None:
    if event == "read":
        stream.reading()
    elif event.split(".")[0] not in RESIDUAL:
        stream.write(event)


def _events(sites: SiteMap, has_positions: bool) -> list[str]:
    """Writes, reads and residual sites in the order of a forward pass.

    MLPs of parallel blocks are taken to read after attention; that refuses more than needed and never too little.
    """
    found = (["position"] if has_positions else []) + ["embed"]
    for layer in range(sites.n_layers):
        parts = ("resid_pre", "read", "attn_out", "resid_mid", "read", "mlp_out", "resid_post")
        found += [part if part == "read" else f"{part}.{layer}" for part in parts]
    return found


def _check_site(point: Point, edit: Edit) -> None:
    known = (*RESIDUAL, "attn_out", "mlp_out", "embed")
    if point.site.kind not in known:
        raise refused(edit, f"{point.site} is not on the residual stream; weights are folded at {', '.join(known)}")


def _writers(sites: SiteMap, name: str, positions: list[tuple[str, nn.Module]], edit: Edit) -> list[Writer]:
    if name == "position":
        found = [Writer(name, path, module) for path, module in positions]
    elif name == "embed":
        point = sites[name]
        found = [Writer(name, point.path, point.module)]
    else:
        found = [_projection(sites, Site.parse(name), edit)]
    for writer in found:
        _check_module(writer, edit)
    return found


def _projection(sites: SiteMap, site: Site, edit: Edit) -> Writer:
    """The output projection of a sublayer, if nothing stands between it and the stream."""
    point, inner = sites[site], Site(_OUTPUT_PROJECTION[site.kind], site.layer)
    if inner not in sites.points:
        why = sites.missing.get(inner, f"there is no {inner}")
        raise refused(edit, f"the weights that write {site} are not one matrix: {why}")
    projection = sites.points[inner]
    if not projection.path.startswith(f"{point.path}."):
        raise refused(
            edit,
            f"a norm ({point.path}) stands between {projection.path} and the residual stream, so changed weights are "
            "rescaled by it, differently for every token",
        )
    return Writer(str(site), projection.path, projection.module)


def _check_module(writer: Writer, edit: Edit) -> None:
    from transformers.pytorch_utils import Conv1D

    kind = type(writer.module)
    if writer.is_embedding and kind is not nn.Embedding:
        raise refused(edit, f"{writer.path} is a {kind.__name__}, which does more than look up rows")
    if not writer.is_embedding and kind not in (nn.Linear, Conv1D):
        raise refused(edit, f"{writer.path} is a {kind.__name__}; only Linear and Conv1D weights can be changed")


def require_copyable(hf: PreTrainedModel, active: Mapping[str, object] | tuple[object, ...], needs_fp32: bool) -> None:
    """Raises NotExactlyExportable if the model can't be copied as it is now."""
    if active:
        raise NotExactlyExportable(
            f"{len(active)} plans are active on this {type(hf).__name__}; a copy made now would hold their hooks. "
            "Leave their blocks first."
        )
    dtype = next(hf.parameters()).dtype
    if needs_fp32 and dtype != torch.float32:
        raise NotExactlyExportable(
            f"The model is in {dtype}, in which changed weights round differently from edited activations. Load it "
            "with dtype='float32', export, and convert the result if it has to be smaller."
        )
