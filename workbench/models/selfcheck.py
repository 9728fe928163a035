"""What is verified on the real model when it is loaded: identities, perturbations and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from workbench.core.errors import EditError, SelfCheckError
from workbench.core.html import Shown
from workbench.core.numbers import counted, number, rounding_error
from workbench.hooks.attach import Fn, attached
from workbench.hooks.capture import Activations, capture
from workbench.hooks.ends import embedding
from workbench.hooks.sites import MODEL_KINDS, Point, Site, SiteMap
from workbench.models.head import agree
from workbench.models.innerchecks import Check, relative_error, sublayer_checks

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CheckReport(Shown):
    """Result of the self-check.

    Attributes:
        checks: what must hold.
        withdrawn: sites that were found not to be what their name says, with the reason.
        no_gradient: sites that can be read and edited, and that gradients do not reach, with the reason.
    """

    checks: tuple[Check, ...]
    withdrawn: Mapping[Site, str]
    no_gradient: Mapping[Site, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything that must hold does; withdrawn sites are refused when used, not failures."""
        return all(check.ok for check in self.checks)

    def require(self) -> None:
        """Raises SelfCheckError if a check failed."""
        failed = [f"{check.name} ({check.detail})" for check in self.checks if not check.ok]
        if failed:
            raise SelfCheckError(
                f"The loaded model fails {len(failed)} of {len(self.checks)} checks: {'; '.join(failed)}. "
                "Its edits can't be trusted; load it with check=False only to find out why."
            )

    def frame(self) -> pd.DataFrame:
        """One row per check, and one per site that was withdrawn or has no gradient."""
        import pandas as pd

        rows = [(check.name, "ok" if check.ok else "fails", check.detail) for check in self.checks]
        rows += [(str(site), "withdrawn", why) for site, why in self.withdrawn.items()]
        rows += [(str(site), "no gradient", why) for site, why in self.no_gradient.items()]
        return pd.DataFrame(rows, columns=["what", "result", "detail"])

    def _shown_line(self) -> str:
        n_ok = sum(check.ok for check in self.checks)
        parts = [f"{'ok' if self.ok else 'FAILS'}: {n_ok} of {counted(len(self.checks), 'checks')} hold"]
        for what, sites in (("withdrawn", self.withdrawn), ("without gradient", self.no_gradient)):
            parts += [f"{what}: {', '.join(map(str, sites))}"] if sites else []
        return "; ".join(parts)

    def __str__(self) -> str:
        lines = [f"{'ok  ' if c.ok else 'FAIL'} {c.name}: {c.detail}" for c in self.checks]
        lines += [f"withdrawn {site}: {why}" for site, why in self.withdrawn.items()]
        lines += [f"no gradient at {site}: {why}" for site, why in self.no_gradient.items()]
        return "\n".join(lines)


_STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "final_norm", "logits")


def _probe_ids(hf: PreTrainedModel) -> Tensor:
    """A few fixed, ordinary token ids that any vocabulary has."""
    vocab = embedding(hf).weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab, (2, 8), generator=generator).to(embedding(hf).weight.device)


def self_check(hf: PreTrainedModel, sites: SiteMap) -> CheckReport:
    """Runs all checks on a batch of 2 x 8 tokens; costs about a dozen small forward passes.

    Checked on every layer: `resid_pre + attn_out == resid_mid`, `resid_mid + mlp_out == resid_post` (or the parallel
    form), `resid_post == next resid_pre`; once: `unembed(final_norm(last resid_post)) == logits`, and the sum again
    with an edited resid_mid; on the first, middle and last layer: `pattern @ v == z`, that q and k make the pattern,
    that mlp_in alone makes mlp_out and mlp_pre makes mlp_post; a perturbation at each kind of site changes the logits;
    gradients reach each kind of site; no token sees a later one. A site that breaks its identity is withdrawn; one
    inside a sublayer that gradients do not reach, as in quantised weights without a backward pass, is kept for reading
    and editing.
    """
    ids = _probe_ids(hf)
    inputs = {"input_ids": ids}
    outer = sorted((s for s in sites.points if s.kind in (*_STREAM, "mlp_in")), key=lambda s: s.kind in MODEL_KINDS)
    acts = capture(hf, sites, inputs, outer)
    spoilt = next((site for site in outer if bool(acts[site].isnan().any())), None)
    if spoilt is not None:
        columns = acts[spoilt].isnan().flatten(0, -2).any(0).nonzero()[:, 0].tolist()
        where = f"{len(columns)} of {acts[spoilt].shape[-1]} columns of {spoilt}, such as {columns[:3]}, hold NaN"
        return CheckReport((Check("no value is NaN", False, where),), {})
    tolerance = 8 * torch.finfo(next(hf.parameters()).dtype).eps
    withdrawn = _misshapen(outer, acts, ids)
    sites = sites.without(withdrawn)
    checks, broken = _identities(sites, acts, tolerance)
    withdrawn |= broken
    inner, broken = sublayer_checks(hf, sites, inputs, tolerance)
    checks += inner
    withdrawn |= broken | _unreadable_pattern(hf, sites.without(broken), inputs)
    withdrawn |= _stream_writes(hf, sites.without(withdrawn), inputs, tolerance)
    remaining = sites.without(withdrawn)
    checks += _perturbations(hf, remaining, inputs)
    checks.append(_causal(hf, ids))
    reached, no_gradient = _gradients(hf, remaining, {"input_ids": ids[:1]})
    checks.append(reached)
    again = capture(hf, sites, inputs, outer[-1:])
    if not torch.equal(again[outer[-1]], acts[outer[-1]]):
        checks.append(Check(f"{outer[-1]} is bit-equal after the hooks are gone", False, "it differs"))
    return CheckReport(tuple(checks), withdrawn, no_gradient)


def _causal(hf: PreTrainedModel, ids: Tensor) -> Check:
    """Another last token leaves the logits before it as they were."""
    pair = ids[:1].repeat(2, 1)
    pair[1, -1] = (ids[0, -1] + 1) % embedding(hf).weight.shape[0]
    with torch.no_grad():
        before, after = hf(input_ids=pair, use_cache=False).logits[:, :-1]
    # experts are computed for the rows that they have, so equal rows of a batch are equal up to rounding
    same = agree(after, before, next(hf.parameters()).dtype)
    return Check("no token sees a later one", same, f"relative error {rounding_error(relative_error(after, before))}")


def _misshapen(outer: list[Site], acts: Activations, ids: Tensor) -> dict[Site, str]:
    """Sites whose module has no vector per token: it joins batch and position, or keeps several streams."""
    return {
        site: f"its module is given {tuple(acts[site].shape)} for {tuple(ids.shape)} tokens, not (batch, pos, d)"
        for site in outer
        if acts[site].shape[:-1] != ids.shape
    }


def _unreadable_pattern(hf: PreTrainedModel, sites: SiteMap, inputs: Mapping[str, Tensor]) -> dict[Site, str]:
    """Withdraws pattern where attention can't be followed and no other check has found it."""
    patterns = [site for site in sites.points if site.kind == "pattern"]
    if not patterns or any(site.kind == "v" for site in sites.points):
        return {}
    try:
        capture(hf, sites, inputs, patterns[:1])
    except EditError as failure:
        return {site: str(failure) for site in patterns}
    return {}


def _identities(sites: SiteMap, acts: Activations, tolerance: float) -> tuple[list[Check], dict[Site, str]]:
    checks: list[Check] = []
    withdrawn: dict[Site, str] = {}
    worst = {"block": 0.0, "stream": 0.0}
    for layer in range(sites.n_layers):
        if not {Site("resid_pre", layer), Site("resid_post", layer)} <= sites.points.keys():
            continue
        error, broken = _block_identity(sites, acts, layer, tolerance)
        withdrawn.update(broken)
        if not broken:
            worst["block"] = max(worst["block"], error)
        if layer and Site("resid_post", layer - 1) in sites.points:
            stream = relative_error(acts[f"resid_pre.{layer}"], acts[f"resid_post.{layer - 1}"])
            worst["stream"] = max(worst["stream"], stream)
    checks.append(
        Check(
            "resid_post of each block is resid_pre of the next",
            worst["stream"] <= tolerance,
            rounding_error(worst["stream"]),
        )
    )
    checks.append(
        Check("resid_pre + attn_out + mlp_out == resid_post where those sites are offered", worst["block"] <= tolerance,
              f"largest relative error {rounding_error(worst['block'])}")
    )  # fmt: skip
    last = f"resid_post.{sites.n_layers - 1}"
    if all(site in sites.points for site in (Site("final_norm"), Site("logits"), Site.parse(last))):
        norm, unembed = sites["final_norm"].module, sites["logits"].module
        with torch.no_grad():
            again = unembed(norm(acts[last])).to(acts["logits"].device)
        error, statement = relative_error(again, acts["logits"]), "unembed(final_norm(last resid_post)) == logits"
        if error <= tolerance:
            checks.append(Check(statement, True, f"relative error {rounding_error(error)}"))
        else:
            withdrawn[Site("final_norm")] = f"{statement} fails by {rounding_error(error)} (relative)"
    return checks, withdrawn


def _block_identity(sites: SiteMap, acts: Activations, layer: int, tolerance: float) -> tuple[float, dict[Site, str]]:
    """Relative error of the block's sum, and the sites that break it."""
    names = [Site(kind, layer) for kind in ("attn_out", "mlp_out")]
    pre, post = acts[Site("resid_pre", layer)], acts[Site("resid_post", layer)]
    if any(site not in sites.points for site in names):
        return 0.0, _mid_alone(sites, acts, layer, tolerance)
    attn, mlp = (acts[site] for site in names)
    sums = ((pre + attn) + mlp, (attn + mlp) + pre, (mlp + attn) + pre)
    error = min(relative_error(total, post) for total in sums)
    broken: dict[Site, str] = {}
    if error > tolerance:
        off = f"{rounding_error(error)} (relative) at layer {layer}"
        why = f"resid_pre + attn_out + mlp_out differs from resid_post by {off}"
        broken = {site: why for site in names}
    mid = Site("resid_mid", layer)
    if mid in sites.points:
        error_mid = relative_error(pre + attn, acts[mid])
        if error_mid > tolerance:
            broken[mid] = f"resid_pre + attn_out differs from it by {rounding_error(error_mid)} (relative)"
    return error, broken


def _mid_alone(sites: SiteMap, acts: Activations, layer: int, tolerance: float) -> dict[Site, str]:
    """resid_mid against the one sublayer that can be read, or withdrawn if none can."""
    mid, attn, mlp = (Site(kind, layer) for kind in ("resid_mid", "attn_out", "mlp_out"))
    if mid not in sites.points:
        return {}
    if attn in sites.points:
        error = relative_error(acts[Site("resid_pre", layer)] + acts[attn], acts[mid])
    elif mlp in sites.points:
        error = relative_error(acts[mid] + acts[mlp], acts[Site("resid_post", layer)])
    else:
        return {mid: "neither attn_out nor mlp_out can be read, so what it is can't be verified"}
    return {} if error <= tolerance else {mid: f"it breaks the sum of the block by {rounding_error(error)} (relative)"}


def _stream_writes(
    hf: PreTrainedModel, sites: SiteMap, inputs: Mapping[str, Tensor], tolerance: float
) -> dict[Site, str]:
    """Withdraws resid_mid unless what is written there reaches both the MLP and the sum behind it."""
    layer = sites.n_layers // 2
    mid, names = Site("resid_mid", layer), [Site(kind, layer) for kind in ("resid_mid", "mlp_out", "resid_post")]
    if any(site not in sites.points for site in names):
        return {}
    with attached([(sites[mid], lambda x: x * 2)]):
        acts = capture(hf, sites, inputs, names)
    error = relative_error(acts[names[0]] + acts[names[1]], acts[names[2]])
    if error <= tolerance:
        return {}
    off = f"resid_mid + mlp_out differs from resid_post by {rounding_error(error)}"
    why = f"an edit of it does not reach the residual stream: {off}"
    return {site: why for site in sites.points if site.kind == "resid_mid"}


def _representatives(sites: SiteMap) -> list[Point]:
    """One point per kind of site, in the middle of the network."""
    middle = sites.n_layers // 2
    chosen = {}
    for site, point in sites.points.items():
        if site.layer in (None, middle):
            chosen[site.kind] = point
    return list(chosen.values())


def _perturbations(hf: PreTrainedModel, sites: SiteMap, inputs: Mapping[str, Tensor]) -> list[Check]:
    """Adding noise of the site's own size at one kind of site must change the logits.

    Each kind has its own batch row, so two forward passes do for all.
    """
    points = _representatives(sites)
    ids = inputs["input_ids"][:1, :3].expand(len(points), -1)

    def push(row: int, seed: int) -> Fn:
        def fn(x: Tensor) -> Tensor:
            noise = torch.randn(x[row].shape, generator=torch.Generator().manual_seed(seed)).to(x)
            out = x.clone()
            out[row] += noise * x[row][x[row].isfinite()].float().std().to(x)
            return out

        return fn

    def untouched(x: Tensor) -> None:
        """Hooked all the same, so that both passes compute attention alike."""

    with torch.no_grad():
        with attached([(point, untouched) for point in points]):
            clean = hf(input_ids=ids, use_cache=False).logits
        with attached([(point, push(row, row)) for row, point in enumerate(points)]):
            changed = hf(input_ids=ids, use_cache=False).logits
        # where both are -inf, as for a token that is ruled out, their difference is not a number
        moved = torch.where(changed == clean, 0, changed.float() - clean.float())
        shifts = moved.abs().amax(dim=(1, 2)).tolist()
    return [
        Check(f"perturbing {point.site} changes the logits", shift > 0, f"largest change {number(shift)}")
        for point, shift in zip(points, shifts, strict=True)
    ]


def _gradients(hf: nn.Module, sites: SiteMap, inputs: Mapping[str, Tensor]) -> tuple[Check, dict[Site, str]]:
    """Gradients of the logits must reach the stream; the kinds inside the sublayers that they do not reach."""
    leaves: dict[str, Tensor] = {}

    def leaf(point: Point) -> Fn:
        def fn(x: Tensor) -> Tensor:
            leaves[str(point.site)] = torch.zeros_like(x, requires_grad=True)
            return x + leaves[str(point.site)]

        return fn

    points = _representatives(sites)
    with torch.enable_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(attached([(point, leaf(point)) for point in points]))
        logits = hf(**inputs, use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
    missing = [str(p.site) for p in points if str(p.site) not in leaves]
    if missing:
        raise EditError(f"self_check: the hooks at {', '.join(missing)} never ran.")
    dead = [p.site for p in points if (g := leaves[str(p.site)].grad) is None or not bool((g != 0).any())]
    cut = ", ".join(str(site) for site in dead if site.kind in _STREAM)
    inside = {site.kind for site in dead if site.kind not in _STREAM}
    why = "gradients of the logits do not reach it; the modules behind it have no backward pass"
    return (
        Check(f"gradients reach {len(leaves) - len(inside)} kinds of site", not cut, f"not {cut}" if cut else "all"),
        {site: why for site in sites.points if site.kind in inside},
    )
