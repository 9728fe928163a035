"""Steering with SAE features, beside the unsteered model, random directions and features that should not steer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import DegenerateInputError, InvalidInputError
from workbench.features.lens import feature_ids, lens_tokens, target_site
from workbench.hooks.sites import Site
from workbench.interventions.intervention import Intervention
from workbench.interventions.report import EditReport
from workbench.interventions.saes import SAEAddMax
from workbench.interventions.scopes import All, Generated, Last, Scope
from workbench.models.generation import Sampling, sample
from workbench.models.model import Model
from workbench.progress import Task, task
from workbench.steering.measures import TextMeasures, continuation_nll, measure
from workbench.steering.prompts import NEUTRAL_PROMPTS
from workbench.steering.report import Arm, EditSummary, SteeringReport, build_report
from workbench.tokens import TokenBatch

ScopeName = Literal["last+generated", "all"]
SCOPES: dict[str, Scope] = {"last+generated": Last() | Generated(), "all": All()}


@dataclass(frozen=True)
class SteerOptions:
    """Details of a steering run.

    Attributes:
        new_tokens: longest continuation.
        seed: of sampling and of the random directions. Rows of the same prompt share their random numbers in all arms.
        temperature: of sampling.
        scope: "last+generated" steers the last prompt token and every generated one, "all" the whole prompt as well.
        k: logit-lens tokens that count as the feature's.
        batch_size: rows per forward pass.
    """

    new_tokens: int = 20
    seed: int = 0
    temperature: float = 0.7
    scope: ScopeName = "last+generated"
    k: int = 20
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise InvalidInputError(f"SteerOptions(scope={self.scope!r}): choose {' or '.join(map(repr, SCOPES))}.")
        if self.new_tokens < 2 or self.batch_size < 1:
            raise InvalidInputError(f"{self}: new_tokens must be at least 2 and batch_size at least 1.")


def steer(
    model: Model,
    sae: Any,
    features: Sequence[int],
    strengths: Sequence[float] = (1.5, 3.0),
    prompts: Sequence[str] = NEUTRAL_PROMPTS,
    control_features: Sequence[int] = (),
    site: str | Site | None = None,
    options: SteerOptions | None = None,
) -> SteeringReport:
    """Continues every prompt with every feature at every strength and with the controls, under the same randomness.

    The edit is `x + strength * a_max * W_dec[f]`, a_max being the largest feature activation at the token. Controls:
    the unsteered model; for each feature a random direction of the norm of `W_dec[f]` at the same strengths; and
    `control_features`, such as those with the lowest output scores. Each feature's strength is chosen on every other
    prompt, and the results are from the prompts that had no say in it.

    Args:
        model: the model that the SAE was trained on.
        sae: an SAE in the sae_lens form.
        features: which features to steer with.
        strengths: factors on a_max.
        prompts: neutral texts.
        control_features: features that are expected not to steer.
        site: where to steer; the SAE's own site by default.
        options: details.

    Raises:
        InvalidInputError: for unknown features, fewer than four prompts, or strengths that are not positive.
        EditError: if an edit did not happen.

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063), equation 6 with the error kept.
    """
    options = options or SteerOptions()
    _check(features, strengths, prompts, control_features)
    where, chosen = target_site(model, sae, site), feature_ids(sae, features)
    directions = sae.W_dec.detach()[chosen].float()
    planned = [("feature", chosen, directions), ("random", chosen, _random_like(directions, options.seed))]
    if len(control_features):
        weak = feature_ids(sae, control_features)
        planned.append(("control", weak, sae.W_dec.detach()[weak].float()))
    bench = _Bench(model, sae, where, model.tokens(list(prompts)), options)
    rows = len(prompts) * (1 + len(strengths) * sum(len(ids) for _, ids, _ in planned))
    with task(total=rows, description="steering", unit="texts") as progress:
        base = bench.unsteered(progress)
        arms = [bench.arm(name, ids, vectors, strengths, progress) for name, ids, vectors in planned]
    # What the unsteered model writes, measured with the tokens of each feature.
    base_arms = [
        bench.judge("unsteered", ids, [0.0], [base] * len(ids)) for name, ids, _ in planned if name != "random"
    ]
    settings = {
        "model": model.name, "site": str(where), "scope": str(SCOPES[options.scope]), "strengths": list(strengths),
        "new_tokens": options.new_tokens, "temperature": options.temperature, "seed": options.seed, "k": options.k,
        "features": chosen.tolist(), "control_features": [int(f) for f in control_features],
    }  # fmt: skip
    words = _words(model, bench.lens_of(chosen))
    return build_report(settings, tuple(prompts), words, arms, base_arms)


def _check(
    features: Sequence[int], strengths: Sequence[float], prompts: Sequence[str], control_features: Sequence[int]
) -> None:
    if isinstance(prompts, str) or len(prompts) < 4 or len(set(prompts)) != len(prompts):
        raise InvalidInputError(
            f"steer: got {1 if isinstance(prompts, str) else len(prompts)} prompts. Give at least four different "
            "ones: half of "
            "them choose the strength, the others measure."
        )
    if not strengths or min(strengths) <= 0:
        raise InvalidInputError(
            f"steer(strengths={list(strengths)}): give positive factors; the unsteered model always runs."
        )
    both = set(map(int, features)) & set(map(int, control_features))
    if both:
        raise DegenerateInputError(
            f"steer: features {sorted(both)} are steered and controls at once. Remove them from one."
        )


def _random_like(directions: Float[Tensor, "features d"], seed: int) -> Float[Tensor, "features d"]:
    noise = torch.randn(directions.shape, generator=torch.Generator().manual_seed(seed)).to(directions.device)
    return noise / noise.norm(dim=1, keepdim=True) * directions.norm(dim=1, keepdim=True)


def _words(model: Model, ids: Tensor) -> tuple[str, ...]:
    return tuple(" · ".join(repr(model.tokenizer.decode([t]))[1:-1] for t in row[:6]) for row in ids.tolist())


@dataclass(frozen=True, eq=False)
class _Texts:
    """Continuations of every prompt, and what the unsteered model makes of them."""

    ids: tuple[Int[Tensor, " _"], ...]
    texts: tuple[str, ...]
    nll: Float[Tensor, " rows"]
    edits: tuple[EditReport, ...] = ()


class _Bench:
    """Writes and measures continuations of one set of prompts; rows of one prompt share their random numbers."""

    def __init__(self, model: Model, sae: Any, site: Site, prompts: TokenBatch, options: SteerOptions) -> None:
        self.model, self.sae, self.site, self.prompts, self.options = model, sae, site, prompts, options
        self._lens: dict[int, Tensor] = {}

    def lens_of(self, features: Tensor) -> Int[Tensor, "features k"]:
        """Lens tokens of features."""
        ids = lens_tokens(self.model, self.sae.W_dec.detach()[features], self.options.k).ids
        return ids.cpu()

    def unsteered(self, progress: Task) -> _Texts:
        """Continuations without any edit."""
        return self._write(torch.arange(len(self.prompts)), None, progress)

    def arm(self, name: str, features: Tensor, directions: Tensor, strengths: Sequence[float], progress: Task) -> Arm:
        """Continuations of all prompts with each direction at each strength."""
        n = len(self.prompts)
        prompt_rows = torch.arange(n).repeat(len(features))
        written = []
        for strength in strengths:
            op = SAEAddMax(self.sae, directions.repeat_interleave(n, dim=0), float(strength))
            edit = Intervention.at(self.site, op, SCOPES[self.options.scope])
            texts = self._write(prompt_rows, edit, progress)
            written += [_part(texts, slice(i * n, (i + 1) * n)) for i in range(len(features))]
        # written is by strength, then feature; an arm is by feature, then strength
        ordered = [written[s * len(features) + f] for f in range(len(features)) for s in range(len(strengths))]
        return self.judge(name, features, strengths, ordered)

    def judge(self, name: str, features: Tensor, strengths: Sequence[float], written: list[_Texts]) -> Arm:
        """Measures texts (by feature, then strength) with the lens tokens of the features."""
        lens = self.lens_of(features)
        measures: list[tuple[TextMeasures, ...]] = []
        for i in range(len(features)):
            per_strength = written[i * len(strengths) : (i + 1) * len(strengths)]
            measures.append(tuple(measure(t.ids, lens[i], t.nll) for t in per_strength))
        texts = tuple(t.texts for t in written)
        edits = tuple(
            EditSummary.of(float(s), [e for t in written[j :: len(strengths)] for e in t.edits])
            for j, s in enumerate(strengths)
            if written[j].edits
        )
        return Arm(name, tuple(features.tolist()), tuple(float(s) for s in strengths), tuple(measures), texts, edits)

    def _write(self, prompt_rows: Tensor, intervention: Intervention | None, progress: Task) -> _Texts:
        """Continues prompt `prompt_rows[i]` in row i; its random numbers are those of the prompt."""
        options, stop = self.options, self.model.stop_ids
        sampling = Sampling(options.new_tokens, options.temperature, options.seed, stop)
        ids: list[Tensor] = []
        nll, edits = [], []
        for rows in torch.arange(len(prompt_rows)).split(options.batch_size):
            batch = self.prompts[prompt_rows[rows]]
            if intervention is None:
                new, _ = sample(self.model.hf, batch, sampling, prompt_rows[rows])
            else:
                with self.model.plan(intervention.take(rows)) as plan:
                    new, _ = sample(self.model.hf, batch, sampling, prompt_rows[rows])
                edits += plan.report
            kept = [row[: self.model.text_length(row)].cpu() for row in new]
            nll.append(continuation_nll(self.model, batch, kept))
            ids += kept
            progress.advance(len(rows))
        texts = tuple(self.model.tokenizer.decode(row, skip_special_tokens=True) for row in ids)
        return _Texts(tuple(ids), texts, torch.cat(nll), tuple(edits))


def _part(texts: _Texts, rows: slice) -> _Texts:
    # The edit reports are of whole batches; the first part of a strength carries them.
    return _Texts(texts.ids[rows], texts.texts[rows], texts.nll[rows], texts.edits if rows.start == 0 else ())
