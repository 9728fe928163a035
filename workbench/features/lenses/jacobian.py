"""The Jacobian lens: how the last block's output follows an earlier activation, on average over prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.activations.store import ActivationStore
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.html import Shown
from workbench.core.numbers import byte_size, counted, number
from workbench.core.progress import task
from workbench.core.tokens import TokenBatch
from workbench.engine.keeper import Keeper
from workbench.features.lenses.linear import DISTANT, PERMUTED, RANDOM, LinearLens
from workbench.features.lenses.places import distant_sites, lens_sites, target_of
from workbench.features.lenses.products import ColumnProducts, How, RowProducts, first_of, supports_forward
from workbench.features.lenses.reading import HALF_A, HALF_B, LOGIT, LensMap, LensReading, read_with
from workbench.features.lenses.regression import fit_regression
from workbench.features.lenses.source import CONTEXT, batches_of, longer_than, rows_of
from workbench.features.lenses.sums import JacobianSums
from workbench.features.lenses.vectors import TokenVectors, named_ids
from workbench.hooks.ends import unembedding
from workbench.models.model import Model
from workbench.models.wrapped import Batch

SKIP_FIRST = 16
"""Tokens at the start of a prompt that are not counted: attention sinks and little context."""
_ROWS = 8
_SUMS = "sums.safetensors"


@dataclass(frozen=True, kw_only=True)
class LensEstimate(Shown):
    """What a fit will take.

    Attributes:
        seconds: measured on one backward pass.
        memory_bytes: of sums, on top of the model and one graph.
        disk_bytes: of what is saved.
        what: of how many of what.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    what: str

    def _shown_line(self) -> str:
        return (
            f"about {number(self.seconds)} s for {self.what}; {byte_size(self.memory_bytes)} of memory, "
            f"{byte_size(self.disk_bytes)} of disk"
        )


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class JacobianLens(Shown):
    """Prompts and a model; what is asked for is computed from them, no more.

    `J_l = mean over prompts and source tokens of the sum over target tokens of d h_L[target] / d h_l[source]`. The lens
    reads `J_l h`; J = 1 is the logit lens. A row of all J costs a backward pass per prompt, a product `J_l h` a forward
    derivative per prompt, the whole of J a backward pass per prompt and dimension.

    Attributes:
        prompts: rows that it is averaged over; even ones are half A, odd ones half B.
        sites: where it reads.
        skip_first: tokens at the start of each row that are not counted; the last one is not either.
        dropped: rows that were too short.
    """

    model: Model
    prompts: TokenBatch
    sites: tuple[str, ...]
    skip_first: int = SKIP_FIRST
    dropped: int = 0

    def rows(self, tokens: Sequence[str | int]) -> TokenVectors:
        """The direction of each token at every site at once, `J^T W_U[:, token]`: (1 + tokens) passes per prompt.

        Raises:
            InvalidInputError: for a text that is not one token.
        """
        ids = named_ids(self.model, tokens)
        read = unembedding(self.model.hf).weight.detach()[torch.tensor(list(ids), device=self.model.device)]
        sums = [{site: torch.zeros(0) for site in self.sites} for _ in range(2)]
        norms: dict[str, list[Tensor]] = {site: [] for site in self.sites}
        start = 0
        with task(total=len(self.prompts), description="Directions", unit="prompts") as running:
            for part in batches_of(self.prompts, _ROWS):
                products = RowProducts(self.model, part, self.sites, self._target, self.skip_first)
                each = [products.of(u.expand(len(part), -1)) for u in read]
                for site, values in products.norms().items():
                    norms[site].append(values.cpu())
                for half in (0, 1):
                    chosen = slice((half - start) % 2, None, 2)
                    for site in self.sites:
                        added = torch.stack([found[site][chosen].sum(0) for found in each])
                        sums[half][site] = sums[half][site] + added if sums[half][site].numel() else added
                start += len(part)
                running.advance(len(part))
        counts = self._counts(len(self.prompts))
        whole = {site: (sums[0][site] + sums[1][site]) / sum(counts) for site in self.sites}
        halves = tuple({site: s / n for site, s in half.items()} for half, n in zip(sums, counts, strict=True) if n)
        return TokenVectors(
            tokens=ids, vectors=whole, halves=halves if len(halves) == 2 else None, n_fit=sum(counts), lens="jacobian",
            norms={site: float(torch.cat(parts).median()) for site, parts in norms.items()},
            fingerprint=self.model.fingerprint,
        )  # fmt: skip

    @torch.no_grad()
    def apply(
        self, site: str, h: Float[Tensor, "n d"], how: How | None = None
    ) -> tuple[Float[Tensor, "n d"], tuple[Tensor, Tensor] | None]:
        """`J h` of some activations at one site, and the same from either half of the prompts.

        Args:
            site: one of those of the lens.
            h: activations.
            how: "forward" for a forward derivative, "difference" for a central difference, which any model has but
                which needs fp32; None takes the first where the model has it.

        Raises:
            InvalidInputError: for a central difference of a model in bf16 or fp16, where it is mostly rounding.
        """
        if how is None:
            how = "forward" if supports_forward(self.model, self.prompts, site, self._target) else "difference"
        if how == "difference" and self.model.dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(
                f"A central difference in {self.model.dtype} is mostly rounding. Load the model with dtype='float32', "
                "or take rows or a whole fit, which need no difference."
            )
        sums = torch.zeros(2, *h.shape, dtype=torch.double)
        start = 0
        for part in batches_of(self.prompts, _ROWS):
            products = ColumnProducts(self.model, part, site, self._target, self.skip_first)
            for i, found in enumerate(products.of(h, how)):
                for half in (0, 1):
                    sums[half, i] += found[(half - start) % 2 :: 2].sum(0).double().cpu()
            start += len(part)
        counts = self._counts(len(self.prompts))
        dtype = torch.double if h.dtype == torch.double else torch.float
        whole = (sums.sum(0) / sum(counts)).to(h.device, dtype)
        if min(counts) == 0:
            return whole, None
        a, b = (sums[half].div(counts[half]).to(h.device, dtype) for half in (0, 1))
        return whole, (a, b)

    def read(
        self,
        text: Batch,
        *,
        positions: Sequence[int] | None = (-1,),
        sites: Sequence[str] | None = None,
        k: int = 10,
        target: str | Int[Tensor, " rows"] | None = None,
        beside: Mapping[str, LinearLens] | None = None,
        how: How | None = None,
        seed: int = 0,
    ) -> LensReading:
        """What the lens reads, beside its controls, without fitting the whole of J.

        It costs about two passes per prompt, site and token, and as many for the control of a distant layer. For many
        tokens `fit` is cheaper.

        Args:
            text: a text, texts or tokens.
            positions: which tokens, from the end if negative; None for all.
            sites: some of those of the lens; None for all.
            k: tokens that are kept for each reading.
            target: a single token that is looked for behind the texts, or the id of one for each; else the token that
                follows there.
            beside: further lenses, by name; without, a regression lens of the same prompts if they have enough tokens.
            how: see `apply`.
            seed: of the permutation and of the random directions.

        Raises:
            InvalidInputError: for a target that is not one token.
        """
        chosen = self.sites if sites is None else lens_sites(self.model, sites)
        others = dict(beside or {}) or self._regression(chosen)
        maps = self._maps(chosen, how, seed)
        found: dict[str, LensMap] = {
            "jacobian": maps.pop("jacobian"),
            LOGIT: LinearLens.logit(self.model, chosen).apply,
        }
        found |= {name: lens.apply for name, lens in others.items()} | maps
        fits = {name: len(self.prompts) for name in found}
        fits |= {name: lens.n_fit for name, lens in others.items()}
        halves = self._counts(len(self.prompts))
        fits |= {name: n for name, n in ((HALF_A, halves[0]), (HALF_B, halves[1])) if name in found}
        return read_with(self.model, text, chosen, found, positions=positions, k=k, target=target, n_fit=fits)

    def _maps(self, sites: Sequence[str], how: How | None, seed: int) -> dict[str, LensMap]:
        """The lens and its controls; products of an activation are computed once for all."""
        kept: dict[tuple[str, int], tuple[Tensor, tuple[Tensor, tuple[Tensor, Tensor] | None]]] = {}
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.model.d_model, generator=generator).to(self.model.device)
        far = distant_sites(list(sites))

        def product(site: str, h: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
            key = (site, h.data_ptr())
            if key not in kept:  # h is held too, so that no later activation can stand at its address
                kept[key] = h, self.apply(site, h, how)
            return kept[key][1]

        def half(i: int) -> LensMap:
            def of(site: str, h: Tensor) -> Tensor:
                _, halves = product(site, h)
                assert halves is not None
                return halves[i]

            return of

        def random(site: str, h: Tensor) -> Tensor:
            size = product(site, h)[0]
            drawn = torch.randn(size.shape, generator=generator).to(size)
            return drawn * size.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)

        found: dict[str, LensMap] = {"jacobian": lambda site, h: product(site, h)[0]}
        found |= {PERMUTED: lambda site, h: product(site, h)[0][:, order], RANDOM: random}
        if len(sites) > 2:
            found[DISTANT] = lambda site, h: self.apply(far[site], h, how)[0]
        return found | ({HALF_A: half(0), HALF_B: half(1)} if len(self.prompts) > 1 else {})

    def _regression(self, sites: tuple[str, ...]) -> dict[str, LinearLens]:
        try:
            return {"regression": fit_regression(self.model, self.prompts, sites)}
        except DegenerateInputError:  # fewer tokens than dimensions
            return {}

    def estimate(self, dim_batch: int = 8) -> LensEstimate:
        """What `fit` will take, from one backward pass of one prompt."""
        prompt = self.prompts[:1]
        products = RowProducts(self.model, _copies(prompt, dim_batch), self.sites, self._target, self.skip_first)
        u = torch.ones(dim_batch, self.model.d_model, device=self.model.device)
        products.of(u)
        began = time.perf_counter()
        products.of(u)
        passes = -(-self.model.d_model // dim_batch) * len(self.prompts)
        maps = len(self.sites) * self.model.d_model**2 * 4
        return LensEstimate(
            seconds=(time.perf_counter() - began) * passes, memory_bytes=3 * maps, disk_bytes=5 * maps,
            what=f"{counted(len(self.prompts), 'prompts')} x {self.model.d_model} rows",
        )  # fmt: skip

    def fit(self, out: str | Path | None = None, *, resume: bool = True, dim_batch: int = 8) -> LinearLens:
        """The whole of J at every site: a running sum per half, kept in `out` after each prompt.

        A stopped fit continues at the prompt where it stopped, and one with more prompts continues from a finished one
        with fewer, if they begin with the same.

        Args:
            out: folder of the lens; None keeps nothing.
            resume: continue what is in `out`; False begins again.
            dim_batch: rows of J per backward pass; more take more memory.

        Raises:
            MismatchError: if `out` holds sums of another model, other sites or other prompts.
        """
        if dim_batch < 1:
            raise InvalidInputError(f"fit(dim_batch={dim_batch}): at least 1.")
        if out is None:
            return self._finished(self._summed(JacobianSums.empty(self.model, self.sites), None, dim_batch))
        key = {"model": self.model.fingerprint, "sites": self.sites, "target": self._target, "skip": self.skip_first,
               "dtype": str(self.model.dtype)}  # fmt: skip
        with Keeper.open(Path(out) / "fit", key) as keep:
            file = keep.scratch("sums") / _SUMS
            if not resume:
                file.unlink(missing_ok=True)
            sums = (
                JacobianSums.read(file, self.sites, self.prompts)
                if file.exists()
                else JacobianSums.empty(self.model, self.sites)
            )
            lens = self._finished(self._summed(sums, file, dim_batch))
            lens.save(out)
        return lens

    def _summed(self, sums: JacobianSums, file: Path | None, dim_batch: int) -> JacobianSums:
        d = self.model.d_model
        eye = torch.eye(d, dtype=self.model.dtype, device=self.model.device)
        with task(total=(len(self.prompts) - sums.done) * d, description="Jacobian", unit="rows") as running:
            for i in range(sums.done, len(self.prompts)):
                copies = _copies(self.prompts[i : i + 1], dim_batch)
                products = RowProducts(self.model, copies, self.sites, self._target, self.skip_first)
                found: dict[str, list[Tensor]] = {site: [] for site in self.sites}
                for wanted in eye.split(dim_batch):
                    padded = torch.cat([wanted, wanted.new_zeros(dim_batch - len(wanted), d)])
                    for site, rows in products.of(padded).items():
                        found[site].append(rows[: len(wanted)])
                    running.advance(len(wanted))
                sums = sums.plus({site: torch.cat(rows) for site, rows in found.items()}, products.norms())
                if file is not None:
                    sums.write(file, self.prompts)
        return sums

    def _finished(self, sums: JacobianSums) -> LinearLens:
        counts = self._counts(sums.done)
        whole = LinearLens(
            kind="jacobian", target=self._target, sites=self.sites, n_fit=sum(counts), unit="prompts",
            weights={site: (sums.halves[0][site] + sums.halves[1][site]) / sum(counts) for site in self.sites},
            norms={site: sums.norms[site] / sum(counts) for site in self.sites}, model_name=self.model.name,
            fingerprint=self.model.fingerprint,
            recipe={"skip_first": self.skip_first, "context": int(self.prompts.lengths.max())},
        )  # fmt: skip
        if min(counts) == 0:
            return whole
        a, b = (
            whole.with_maps({site: x / n for site, x in half.items()})
            for half, n in zip(sums.halves, counts, strict=True)
        )
        return replace(whole, halves=(replace(a, n_fit=counts[0]), replace(b, n_fit=counts[1])))

    @property
    def _target(self) -> str:
        return target_of(self.model)

    @staticmethod
    def _counts(done: int) -> tuple[int, int]:
        """Prompts in either half."""
        return (done + 1) // 2, done // 2

    def _shown_line(self) -> str:
        dropped = f", {self.dropped} too short" if self.dropped else ""
        return (
            f"{self.model.name}: {counted(len(self.prompts), 'prompts')}{dropped}, {counted(len(self.sites), 'sites')} "
            f"from {first_of(self.sites)} on"
        )


def _copies(prompt: TokenBatch, n: int) -> TokenBatch:
    return replace(prompt, ids=prompt.ids.expand(n, -1), mask=prompt.mask.expand(n, -1))


@checked
def jacobian_lens(
    model: Model,
    source: ActivationStore | TokenBatch | Sequence[str],
    prompts: int = 25,
    *,
    sites: Sequence[str] | None = None,
    context: int = CONTEXT,
    skip_first: int = SKIP_FIRST,
) -> JacobianLens:
    """The Jacobian lens of a model over some prompts; nothing is computed yet.

    Args:
        model: the model; in fp32 for `read` by differences.
        source: texts, tokens, or a store whose rows of tokens are taken.
        prompts: how many. The error of J falls as one over the square root: about 0.28 of its size at 25 prompts of a
            large model, 0.14 at 100.
        sites: in the residual stream; by default the output of every block but the last. Later ones alone are cheaper.
        context: tokens of a prompt that are used.
        skip_first: tokens at the start that are not counted.

    Raises:
        DegenerateInputError: if no prompt is longer than `skip_first` + 1 tokens.
        MismatchError: for a site outside the residual stream.

    Source: Gurnee et al. 2026, Jacobian lens.
    """
    if prompts < 1 or skip_first < 0:
        raise InvalidInputError(f"jacobian_lens(prompts={prompts}, skip_first={skip_first}): at least 1, and 0.")
    rows, dropped = longer_than(rows_of(model, source, context), skip_first + 2, "A Jacobian lens")
    chosen = lens_sites(model, sites)
    if target_of(model) in chosen:
        raise InvalidInputError(
            f"jacobian_lens(sites={list(sites or ())}): {target_of(model)} is what it leads to. Name earlier sites."
        )
    model.site_map.require_gradient(model.resolve(site) for site in chosen)
    return JacobianLens(model=model, prompts=rows[:prompts], sites=chosen, skip_first=skip_first, dropped=dropped)
