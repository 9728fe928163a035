"""`attribution_graph`: which features of one prompt made a token likely, through which others."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from circuits.attribution_graphs.choice import Choice, ChoiceOptions
from circuits.attribution_graphs.coders import Coders, Placed, placed
from circuits.attribution_graphs.estimate import fitting
from circuits.attribution_graphs.graph import AttributionGraph
from circuits.attribution_graphs.outputs import Outputs, Wanted, outputs_of
from circuits.attribution_graphs.replacement import MLPs, Replacement, Targets
from circuits.attribution_graphs.sparse import CAP, MASS, SparseRows
from circuits.attribution_graphs.sublayers import WHO
from circuits.attribution_graphs.tables import (
    CONSTANT,
    EMBED,
    ERRORS,
    FEATURE,
    LOGIT,
    LOGITS,
    REST,
    TOKEN,
    GraphNodes,
    Origin,
)
from workbench.core import progress
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.numbers import counted, number, setting
from workbench.core.tokens import TokenBatch
from workbench.engine.keeper import Keeper
from workbench.models.model import Model


@checked
def attribution_graph(
    model: Model,
    coders: Coders,
    text: str | TokenBatch,
    features: int = 1000,
    budget_gb: float = 2.0,
    *,
    targets: Wanted = None,
    mlps: MLPs = "half",
    first_token: bool = False,
    mass: float = MASS,
    batch_size: int = 64,
    out: str | Path | None = None,
) -> AttributionGraph:
    """The features behind a prompt's next token and the direct effects between them.

    In the replacement model of the prompt attention patterns and the scales of norms are constants, and what a coder
    writes is the sum of its active features, a constant and an error. Each target is then a sum over sources: for a
    feature what its encoder reads, for a token its logit minus the mean logit, before a soft cap. Rows of this sum are
    made for the features with the most influence, best first.

    Memory is estimated before anything is made, and refused above the budget; of a row the largest entries are held.

    Args:
        model: the model; in fp32, since rounding of the stream in half precision shows as a gap.
        coders: transcoders, SAEs or other bases by site, as for `circuits.bases`; or a `CrossLayerTranscoder`. What
            leads through a site with a coder leads through its features.
        text: one prompt; tokens, such as `pairs.clean[:1]`, without padding.
        features: how many features become nodes, at most; the others are in `rest`.
        budget_gb: memory above that of the model and its dictionaries.
        targets: tokens, pairs of tokens whose logits are compared, or directions behind the final norm by name; by
            default the likeliest tokens with 95 % of the probability, at most 10.
        mlps: how paths lead through MLPs without a coder. "half": each is the linear map that gives its own output,
            where half of a gated neuron belongs to its gate and half to the projection beside it. "leaf": they end
            there, in an error.
        first_token: whether features and errors of the first token are nodes. Its activations are often hundreds of
            times as large and say nothing of the prompt, so by default what its coders write is a constant.
        mass: share of a row's absolute sum that its held entries have, at most 4096 of them.
        batch_size: rows made together, halved where the budget asks for it.
        out: a folder for the rows; a stopped run goes on from there.

    Raises:
        InvalidInputError: for several prompts, sites that can't be followed, a target that is not one token.
        MismatchError: for a coder of another model, or a model whose sublayers can't be followed.
        ResourceError: if it takes more memory than the budget.
        DegenerateInputError: for a prompt of a single token.

    Source: Ameisen et al. 2025, "Circuit tracing: revealing computational graphs in language models"; constant, rest
    and the half rule are additions.
    """
    batch = _one_prompt(model, text)
    options = _options(features, batch_size, mass, budget_gb, mlps)
    given, outputs = placed(model, coders), outputs_of(model, batch, targets)
    n_tokens, budget = batch.ids.shape[1], budget_gb * 1e9
    fitting(model, given, mlps, options, n_tokens, 0, budget)
    run = Replacement(model, given, batch, mlps=mlps, first=first_token)
    estimate, options = fitting(model, given, mlps, options, n_tokens, run.columns.n_features, budget)
    progress.say(estimate.words())
    target = run.outputs(outputs.directions, outputs.added)
    progress.say(
        f"about {number(_seconds(run, target, estimate.nodes))} seconds at most for {counted(estimate.nodes, 'rows')}"
    )
    if out is None:
        choice = Choice(run, options)
        rows = choice.made(target, outputs.weights)
    else:
        with Keeper.open(out, _key(model, given, batch, outputs, options, mlps, first_token=first_token)) as keep:
            choice = Choice(run, options, keep)
            rows = choice.made(target, outputs.weights)
    return _graph(run, rows, choice, outputs, _made(options, mlps, run))


def _one_prompt(model: Model, text: str | TokenBatch) -> TokenBatch:
    batch = model.tokens(text) if isinstance(text, str) else text.to(model.device)
    if len(batch) != 1 or not bool(batch.mask.all()):
        raise InvalidInputError(f"{WHO}: it explains one prompt without padding, and got {len(batch)}. Give one text.")
    if batch.ids.shape[1] < 2:
        raise DegenerateInputError(f"{WHO}: a prompt of one token has nothing to explain. Give a longer text.")
    return batch


def _options(features: int, batch_size: int, mass: float, budget_gb: float, mlps: str) -> ChoiceOptions:
    if mlps not in ("half", "leaf"):
        raise InvalidInputError(f"{WHO}(mlps={mlps!r}): paths through MLPs without a coder are 'half' or 'leaf'.")
    if features < 1 or batch_size < 1:
        raise InvalidInputError(f"{WHO}(features={features}, batch_size={batch_size}): both are at least 1.")
    if not 0 < mass <= 1 or budget_gb <= 0:
        raise InvalidInputError(
            f"{WHO}(mass={setting(mass)}, budget_gb={setting(budget_gb)}): mass is a share above 0, the budget is "
            "above 0."
        )
    return ChoiceOptions(features=features, batch_size=batch_size, mass=mass, cap=CAP)


def _seconds(run: Replacement, target: Targets, nodes: int) -> float:
    """Time of so many rows, from that of one output: a feature's row ends lower, so it takes less."""
    one = target.some(torch.tensor([0]))
    run.rows(one)  # the first run also reads weights from disk
    begin = time.perf_counter()
    run.rows(one)
    return nodes * (time.perf_counter() - begin)


def _key(
    model: Model, given: list[Placed], batch: TokenBatch, outputs: Outputs, options: ChoiceOptions, mlps: MLPs, *,
    first_token: bool,
) -> dict[str, object]:  # fmt: skip
    """All that the rows depend on."""
    return {
        "model": model.fingerprint, "coders": {str(place.site): place.basis.fingerprint for place in given},
        "later": [[str(place.site), str(site), _digest(rows)] for place in given for site, rows in place.later.items()],
        "ids": batch.ids[0].tolist(), "outputs": _digest(outputs.directions), "features": options.features,
        "batch_size": options.batch_size, "mass": options.mass, "cap": options.cap, "mlps": mlps,
        "first_token": first_token,
    }  # fmt: skip


def _digest(rows: Tensor) -> list[float]:
    """Two sums that change with any entry."""
    flat = rows.detach().double().flatten().cpu()
    return [float(flat.sum()), float(flat @ torch.linspace(1, 2, len(flat), dtype=torch.float64))]


def _made(options: ChoiceOptions, mlps: MLPs, run: Replacement) -> str:
    paths = "followed by the half rule" if mlps == "half" else "left as errors"
    first = "" if run.first else "; what coders write at the first token is a constant"
    return (
        f"{counted(options.features, 'features')} at most of {number(run.columns.n_features)} active ones, best first; "
        f"MLPs without a coder {paths}{first}"
    )


def _graph(run: Replacement, rows: SparseRows, choice: Choice, outputs: Outputs, made: str) -> AttributionGraph:
    """Nodes and links from all rows; what is no node goes into `rest`."""
    c, n_active = run.columns, choice.n_active
    node = rows.node.numpy()
    chosen = np.sort(node[node < n_active])
    nodes = _nodes(run, chosen, choice, outputs)
    n, n_outputs = len(nodes), len(outputs.each)
    place = np.full(c.n + n_outputs, -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    place[n_active:] = len(chosen) + np.arange(c.n - n_active + n_outputs)
    target_of = place[node + np.where(node >= n_active, c.n - n_active, 0)]
    source, target = place[rows.column.long().numpy()], target_of[rows.row.numpy()]
    weight = rows.entry.double().numpy()
    shown = source >= 0
    held, held_size = (np.bincount(target[shown], w[shown], n)[target_of] for w in (weight, np.abs(weight)))
    rest, constant = rows.total.numpy() - held, rows.constant.numpy()
    rest_size = np.maximum(rows.size.numpy() - held_size, np.abs(rest))
    gaps = np.abs(rows.value.numpy() - rows.total.numpy() - constant) / np.maximum(
        rows.size.numpy() + np.abs(constant), 1e-30
    )
    bases = tuple((str(coder.site), coder.basis.fingerprint) for coder in run.coders)
    return AttributionGraph(
        nodes=nodes, source=np.concatenate([source[shown], np.full(len(node), n - 2), np.full(len(node), n - 1)]),
        target=np.concatenate([target[shown], target_of, target_of]),
        weight=np.concatenate([weight[shown], constant, rest]),
        size=np.concatenate([np.abs(weight[shown]), np.abs(constant), rest_size]),
        outputs=outputs.each, tokens=tuple(run.batch.str_tokens[0]), gap=float(gaps.max()), made=made,
        identity=(("model", run.model.fingerprint), *bases), origin=Origin(run, outputs),
    )  # fmt: skip


def _nodes(run: Replacement, chosen: np.ndarray, choice: Choice, outputs: Outputs) -> GraphNodes:
    """Features, errors, tokens, outputs, constant, rest."""
    n_tokens, every = run.n_tokens, np.arange(run.n_tokens)
    parts: list[tuple[int, list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for coder in run.coders:
        own = chosen[(chosen >= coder.start) & (chosen < coder.start + len(coder))]
        index = torch.from_numpy(own - coder.start)
        pos, feature, value = (x.cpu()[index].numpy() for x in (coder.pos, coder.feature, coder.value.double()))
        parts.append((FEATURE, [str(coder.site)] * len(own), pos, feature, value, choice.level[own]))

    def more(kind: int, site: str, pos: np.ndarray, feature: np.ndarray, level: int) -> None:
        parts.append((kind, [site] * len(pos), pos, feature, np.full(len(pos), np.nan), np.full(len(pos), level)))

    for site in run.columns.sites:
        more(ERRORS, str(site), every, np.full(n_tokens, -1), -1)
    more(TOKEN, EMBED, every, run.batch.ids[0].cpu().numpy(), -1)
    ids = np.array([output.token for output in outputs.each])
    more(LOGIT, LOGITS, np.full(len(ids), n_tokens - 1), ids, len(run.coders))
    for kind in (CONSTANT, REST):
        more(kind, "", np.array([-1]), np.array([-1]), -1)
    return GraphNodes(
        kind=np.concatenate([np.full(len(part[2]), part[0]) for part in parts]),
        site=np.array([site for part in parts for site in part[1]], dtype=object),
        pos=np.concatenate([part[2] for part in parts]), feature=np.concatenate([part[3] for part in parts]),
        activation=np.concatenate([part[4] for part in parts]), level=np.concatenate([part[5] for part in parts]),
    )  # fmt: skip
