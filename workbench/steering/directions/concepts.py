"""Steering towards concepts given by labelled texts: every kind of direction at the same norm, beside the controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.sae import AnySAE, as_basis
from workbench.controls.arms import Sweep
from workbench.controls.directions import random_directions
from workbench.controls.tokens import TokenPolicy
from workbench.core.arguments import checked
from workbench.core.display import first_few
from workbench.core.errors import InvalidInputError
from workbench.core.jsontext import Record
from workbench.core.numbers import number
from workbench.core.progress import task
from workbench.core.stats import Estimate
from workbench.core.tokenizer import special_ids
from workbench.hooks.sites import Site
from workbench.interventions.scopes import Last
from workbench.models.model import Model
from workbench.report.base import Bars, Block, Headline, Metric, Says, Section, Table, Text, beside
from workbench.steering.directions.classical import Concept, DirectionOptions, concept_directions, concept_tokens
from workbench.steering.sweep.arms import ArmTexts
from workbench.steering.sweep.build import arm_result, choices, curve, points_of, success_key, with_front
from workbench.steering.sweep.intervals import two_level
from workbench.steering.sweep.options import SCOPES, SteerOptions
from workbench.steering.sweep.prompts import NEUTRAL_PROMPTS
from workbench.steering.sweep.rows import Pushes
from workbench.steering.sweep.steer import Bench, check_prompts
from workbench.steering.sweep.steering_report import (
    MEASURES,
    Point,
    TextsReport,
    arm_table,
    curve_lines,
    edit_table,
    pareto_blocks,
    slug,
    verdict,
)

DIRECTION_ARMS = ("random", "negated")
SAE_ARM = "best SAE feature"


@dataclass(frozen=True)
class ConceptReport(TextsReport):
    """How well each kind of direction steers, at equal norm.

    Attributes:
        settings: model, site, strengths, concepts and their tokens.
        n_evaluation: prompts that measured; the others chose the strengths.
        differences: share of concept tokens, each method minus the unsteered model and minus random directions.
        curves: per arm and strength the mean share.
        points: effect and cost of every arm and strength.
    """

    settings: Record
    n_evaluation: int
    differences: dict[str, Estimate]
    curves: dict[str, tuple[Estimate | None, ...]]
    points: tuple[Point, ...]

    def findings(self) -> tuple[str, ...]:
        """Each method against its controls."""
        return tuple(f"{name}: {verdict(value)} it, difference {value}." for name, value in self.differences.items())

    def headline(self) -> Headline:
        """Share of concept tokens of the first method beside that of random directions."""
        name = self.arms[0].name
        return Headline.of(
            Says(*(
                f"Steering by {name} writes the concepts' tokens {how} random directions of the same norm."
                for how in ("more often than", "no more often than", "less often than")
            )),
            self._beside(),
        )  # fmt: skip

    def _beside(self) -> Table:
        first, random = self.arms[0], self.arm("random")
        paired = self.differences.get(f"{first.name} against random directions")
        shares = (first.name, first.share), ("random directions", random.share)
        return beside("share of concept tokens", *shares, paired)

    def section(self) -> Section:
        """Arms, differences, and effect against cost."""
        metrics: dict[str, Metric] = {}
        for arm in self.arms:
            metrics |= {f"{slug(arm.name)}.{key}": v for key in MEASURES if (v := getattr(arm, key)) is not None}
        s = self.settings
        about = (
            f"{s['site']} of {s['model']}, steered at {s['scope']}; every direction has unit length and is multiplied "
            f"by its strength and by {number(s['norm'])}, the mean norm of the activations at the last prompt tokens. "
            "Strengths were chosen on every other prompt, everything below is from the others. Random directions and "
            "the negated difference of means choose theirs like the methods. Tokens of the concepts: "
            + "; ".join(f"{name}: {words}" for name, words in s["tokens"].items())
            + "."
        )
        blocks: list[Block] = [
            Text(about),
            arm_table(self.arms, "Means over concepts, intervals over prompts and concepts"),
            Bars("Share of concept tokens above the control", tuple(self.differences),
                 tuple(self.differences.values()), y_label="difference", reference=0.0),
            *pareto_blocks(self.points),
        ]  # fmt: skip
        if len(s["strengths"]) > 1:
            blocks.append(curve_lines(self.curves, s["strengths"]))
        blocks.append(edit_table({arm.name: arm.edits for arm in self.written if arm.edits}))
        blocks.append(self._beside())
        return Section("Steering towards concepts", tuple(blocks), self.findings(), metrics, self.headline())


@checked
def steer_concepts(
    model: Model,
    concepts: Sequence[Concept],
    site: str | Site,
    strengths: Sequence[float] = (0.2, 0.4, 0.8),
    prompts: Sequence[str] = NEUTRAL_PROMPTS,
    options: SteerOptions | None = None,
    directions: DirectionOptions | None = None,
) -> ConceptReport:
    """Continues every prompt with every kind of direction of every concept, all at equal norm, and with the controls.

    Controls: the unsteered model, random directions, the difference of means subtracted, and an instruction in the
    prompt. With an SAE, also its feature whose activations tell the two sides apart best.

    Args:
        model: the model.
        concepts: labelled texts.
        site: where the texts are read and the model is steered.
        strengths: factors on the mean norm of the activations.
        prompts: neutral texts; half of them choose the strengths.
        options: details of steering; k is cut to the fewest tokens of a concept.
        directions: which methods, how they are fitted, and maybe an SAE.

    Raises:
        InvalidInputError: for no concept, two of the same name, fewer than four prompts, or strengths that are not
            positive, or prompts and instructions that leave too few positions for the texts.
    """
    check_prompts(prompts, strengths, "steer_concepts")
    names = tuple(concept.name for concept in concepts)
    if not names or len(set(names)) != len(names):
        raise InvalidInputError(
            f"steer_concepts: concepts {first_few(names) or 'none'}. Give at least one, each name once."
        )
    options, where = options or SteerOptions(), model.resolve(site)
    directions = directions or DirectionOptions()
    tokens = _tokens_of(model, concepts, options.k)
    options = replace(options, k=tokens.shape[1])
    vectors = _vectors(model, concepts, where, directions)
    first = next(iter(vectors.values()))
    vectors |= {
        "random": random_directions(first, seed=options.seed),
        "negated": -vectors.get("difference of means", first),
    }
    bench = Bench(model, directions.sae, where, prompts, options)
    bench.require_room(tokens)
    norm = float(model.capture(list(prompts), [where], positions=Last())[where].float().norm(dim=1).mean())
    sizes = torch.full((len(names),), norm)
    edits = {name: partial(Pushes, v.to(model.device), sizes=sizes) for name, v in vectors.items()}
    controls = {name: edits.pop(name) for name in DIRECTION_ARMS}
    sweep = Sweep.over(strengths, edits, controls)
    rows = len(prompts) * (1 + len(names) * (1 + len(sweep)))
    with task(total=rows, description="steering", unit="texts") as progress:
        base = bench.measured(names, tokens, bench.unsteered(progress))
        arms = [bench.texts(sweep.of(kind), names, tokens, progress) for kind in sweep.kinds]
        arms.append(bench.prompted(names, tokens, progress))
    decode = model.tokenizer.decode
    words = [" · ".join(repr(decode([t]))[1:-1] for t in row) for row in tokens.tolist()]
    settings = {
        "model": model.name, "site": str(where), "scope": str(SCOPES[options.scope]), "strengths": list(strengths),
        "norm": norm, "new_tokens": options.new_tokens, "temperature": options.temperature, "seed": options.seed,
        "tokens": dict(zip(names, words, strict=True)),
    }  # fmt: skip
    return _report(settings, tuple(prompts), [*arms, base], success_key(options.k))


def _tokens_of(model: Model, concepts: Sequence[Concept], k: int) -> Int[Tensor, "concepts k"]:
    tokens = []
    for concept in concepts:
        sides = [model.tokens(list(texts)).to("cpu").rows() for texts in (concept.positives, concept.negatives)]
        given = torch.tensor(list(dict.fromkeys(concept.tokens)), dtype=torch.long)
        special = special_ids(model.tokenizer)
        tokens.append(given if len(given) else concept_tokens(sides[0], sides[1], model.d_vocab, k, without=special))
    shortest = min(k, *(len(row) for row in tokens))
    return torch.stack([row[:shortest] for row in tokens])


def _vectors(
    model: Model, concepts: Sequence[Concept], site: Site, options: DirectionOptions
) -> dict[str, Float[Tensor, "concepts d"]]:
    """Unit directions of every method, by concept."""
    each = [concept_directions(model, concept, site, options) for concept in concepts]
    vectors = {method: torch.stack([one[method] for one in each]) for method in options.methods}
    sae = options.sae
    if sae is not None:
        rows = as_basis(sae).rows(torch.tensor([best_feature(model, sae, concept, site) for concept in concepts]))
        vectors[SAE_ARM] = rows / rows.norm(dim=1, keepdim=True)
    if not vectors:
        raise InvalidInputError("steer_concepts: no method and no SAE. Choose at least one method.")
    return vectors


def best_feature(model: Model, sae: AnySAE, concept: Concept, site: str | Site) -> int:
    """The feature whose mean activation on the positive texts exceeds that on the negative ones most, in deviations."""
    basis, means = as_basis(sae), []
    for texts in (concept.positives, concept.negatives):
        batch = model.tokens(list(texts))
        x = model.capture(batch, [site])[site].float()
        keep = TokenPolicy.of_batch(batch, x).kept(batch, x)
        acts = torch.stack([basis.encode(row[chosen]).mean(0) for row, chosen in zip(x, keep, strict=True)])
        means.append(acts)
    spread = torch.cat(means).std(0)
    return int(((means[0].mean(0) - means[1].mean(0)) / spread.clamp_min(1e-6)).argmax())


def _report(settings: Record, prompts: tuple[str, ...], arms: Sequence[ArmTexts], key: str) -> ConceptReport:
    selection, evaluation = range(0, len(prompts), 2), list(range(1, len(prompts), 2))
    by_name = {arm.name: arm for arm in arms}
    chosen = {arm.name: [i for i, _ in choices(arm, key, selection)] for arm in arms}
    base = by_name["unsteered"]
    share = {name: arm.at("share", chosen[name], evaluation) for name, arm in by_name.items()}
    differences = {}
    for name in by_name:
        if name not in (*DIRECTION_ARMS, "unsteered"):
            for control, words in (("unsteered", "the unsteered model"), ("random", "random directions")):
                value = two_level(share[name] - share[control])
                if value is not None:
                    differences[f"{name} against {words}"] = value
    points = [p for arm in arms for p in points_of(arm, base, evaluation)]
    return ConceptReport(
        settings, len(evaluation), differences, {arm.name: curve(arm, evaluation) for arm in arms}, with_front(points),
        arms=tuple(arm_result(arm, chosen[arm.name], key, evaluation) for arm in arms),
        prompts=prompts, written=tuple(arms),
    )  # fmt: skip
