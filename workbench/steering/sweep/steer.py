"""Steering with SAE features, beside everything else that might have done the same."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.bases.sae import AnySAE, as_basis
from workbench.controls.arms import UNEDITED, Arm, Sweep
from workbench.controls.directions import random_directions
from workbench.controls.matching import eligible_features, matched_features
from workbench.core.arguments import checked
from workbench.core.display import first_few
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.progress import Task, task
from workbench.core.tokens import TokenBatch
from workbench.features.scores.logit_lens import feature_ids, lens_tokens, target_site
from workbench.features.scores.table import FeatureTable
from workbench.features.token_classes import TokenTexts
from workbench.hooks.sites import Site
from workbench.models.model import Model
from workbench.steering.sweep.arms import ArmTexts, EditSummary
from workbench.steering.sweep.build import build_report
from workbench.steering.sweep.measures import kl_divergence, lens_log_odds
from workbench.steering.sweep.options import SCOPES, SteerOptions
from workbench.steering.sweep.prompts import INSTRUCTION, NEUTRAL_PROMPTS
from workbench.steering.sweep.rows import ArmRunner, FirstToken, Harm, Pushes, Written
from workbench.steering.sweep.steering_report import SteeringReport

PLAIN_LENGTH = 64
INSTRUCTION_WORDS = 6


@checked
def steer(
    model: Model,
    sae: AnySAE,
    features: Sequence[int],
    strengths: Sequence[float] = (1.5, 3.0),
    prompts: Sequence[str] = NEUTRAL_PROMPTS,
    control_features: Sequence[int] = (),
    options: SteerOptions | None = None,
) -> SteeringReport:
    """Continues every prompt with every feature at every strength and with the controls, under the same randomness.

    The edit is `x + strength * a_max * W_dec[f]`, a_max being the largest feature activation at the token. Controls,
    always: the unsteered model; for each feature a random direction of the norm of `W_dec[f]`, the same feature
    subtracted, and its lens tokens asked for in words; random features of like frequency; and, if given,
    `control_features`, such as those with the lowest output scores. Each feature's strength is chosen on every other
    prompt, and the results are from the prompts that had no say in it; beside it stands what the paper's rule chooses.

    Args:
        model: the model that the SAE was trained on.
        sae: an SAE in the sae_lens form.
        features: which features to steer with.
        strengths: factors on a_max.
        prompts: neutral texts.
        control_features: features that are expected not to steer.
        options: details, such as a feature table that says how frequent the features are.

    Raises:
        InvalidInputError: for unknown features, fewer than four prompts, or strengths that are not positive.
        EditError: if an edit did not happen.

    Source: Arad, Mueller, Belinkov 2025 (arXiv 2505.20063), equation 6 with the error kept.
    """
    options = options or SteerOptions()
    _check(features, strengths, prompts, control_features)
    basis = as_basis(sae)
    if options.table is not None:
        options.table.check(model, basis)
    chosen, site = feature_ids(basis, features), target_site(model, basis, options.site)
    frequency = frequencies(options.table, basis.d_sae)
    matched = random_features(basis, chosen.tolist(), control_features, frequency, options.seed)
    sets = {"feature": chosen}
    sets |= {"matched": torch.tensor(matched)} if matched else {}
    sets |= {"control": feature_ids(basis, control_features)} if len(control_features) else {}
    bench = Bench(model, basis, site, prompts, options)
    lens = {name: bench.lens_of(ids) for name, ids in sets.items()}
    bench.require_room(lens["feature"])
    directions = basis.rows(chosen)
    controls = {"negated": (chosen, -directions), "random": (chosen, random_directions(directions, seed=options.seed))}
    controls |= {name: (ids, basis.rows(ids)) for name, ids in sets.items() if name != "feature"}
    sweep = Sweep.over(
        strengths, {"feature": bench.pushes(chosen, directions)},
        {name: bench.pushes(ids, vectors) for name, (ids, vectors) in controls.items()},
    )  # fmt: skip
    edits = sum(len(arm.edits or ()) for arm in sweep)
    with task(total=len(prompts) * (1 + edits + len(chosen)), description="steering", unit="texts") as progress:
        base = bench.unsteered(progress)
        arms = [
            bench.texts(sweep.of(kind), _owners(sets.get(kind, chosen)), lens.get(kind, lens["feature"]), progress)
            for kind in sweep.kinds
        ]
        arms.append(bench.prompted(_owners(chosen), lens["feature"], progress))
    bases = {name: bench.measured(_owners(ids), lens[name], base) for name, ids in sets.items()}
    settings = {
        "model": model.name, "site": str(site), "scope": str(SCOPES[options.scope]),
        "strengths": list(strengths), "new_tokens": options.new_tokens, "temperature": options.temperature,
        "seed": options.seed, "k": options.k, "a_max": options.a_max, "stop": list(options.stop),
        "features": chosen.tolist(), "control_features": [int(f) for f in control_features],
        "matched_features": matched, "matched_on_frequency": bool(frequency.isfinite().any()),
        "matched_ratio": frequency_ratio(options.table, chosen.tolist(), matched),
        "shared_prefix": bench.runner.shares_prefix,
    }  # fmt: skip
    return build_report(settings, tuple(prompts), bench.words(chosen), arms, bases)


def _check(
    features: Sequence[int], strengths: Sequence[float], prompts: Sequence[str], control_features: Sequence[int]
) -> None:
    check_prompts(prompts, strengths, "steer")
    both = set(map(int, features)) & set(map(int, control_features))
    if both:
        raise DegenerateInputError(
            f"steer: features {first_few(sorted(both))} are steered and controls at once. Remove them from one."
        )


def check_prompts(prompts: Sequence[str], strengths: Sequence[float], caller: str) -> None:
    """Raises InvalidInputError for prompts or strengths that a strength can't be chosen with."""
    if isinstance(prompts, str) or len(prompts) < 4 or len(set(prompts)) != len(prompts):
        raise InvalidInputError(
            f"{caller}: got {1 if isinstance(prompts, str) else len(prompts)} prompts. Give at least four different "
            "ones: half of them choose the strength, the others measure."
        )
    if not len(strengths) or not all(0 < s < math.inf for s in strengths) or len(set(strengths)) != len(strengths):
        raise InvalidInputError(
            f"{caller}(strengths={list(strengths)}): give different positive, finite factors; the unsteered model "
            "always runs."
        )


def _owners(features: Int[Tensor, " features"]) -> tuple[int | str, ...]:
    return tuple(features.tolist())


def random_features(
    sae: AnySAE, chosen: Sequence[int], controls: Sequence[int], frequency: Float[Tensor, " d_sae"], seed: int
) -> tuple[int, ...]:
    """A random feature for each chosen one, `controls` left out; for fewer of them where too few features are left."""
    norm, controls = as_basis(sae).rows().norm(dim=1), [int(f) for f in controls]
    room = int(eligible_features(frequency, norm=norm, excluded=(*chosen, *controls)).sum())
    if not room:
        return ()
    others = (*controls, *chosen[room:])
    return matched_features(chosen[:room], frequency, norm=norm, excluded=others, seed=seed)[0]


def frequencies(table: FeatureTable | None, d_sae: int) -> Float[Tensor, " d_sae"]:
    """How often each feature is active, from a table; nan where it does not say."""
    known = torch.full((d_sae,), torch.nan, dtype=torch.float64)
    if table is not None:
        known[torch.tensor(table.df["feature"].to_numpy())] = torch.tensor(table.df["frequency"].to_numpy(dtype=float))
    return known


def frequency_ratio(table: FeatureTable | None, features: Sequence[int], matched: Sequence[int]) -> float | None:
    """How far apart features and their matches are: geometric mean of the larger frequency over the smaller.

    None where a frequency is not known.
    """
    if table is None or not matched:
        return None
    known = table.df.set_index("feature")["frequency"]
    pairs = [(known.get(a), known.get(b)) for a, b in zip(features, matched, strict=False)]
    logs = [abs(np.log(a / b)) for a, b in pairs if a and b and np.isfinite(a) and np.isfinite(b)]
    return float(np.exp(np.mean(logs))) if logs else None


def sizes_of(features: Int[Tensor, " features"], options: SteerOptions) -> Float[Tensor, " features"] | None:
    """What the strength of each feature multiplies, or None for the largest activation at each token.

    Raises:
        DegenerateInputError: if the table does not know the largest activation of a feature.
    """
    if options.a_max == "token" or options.table is None:
        return None
    sizes = [float(options.table.row(f)["max_act"]) for f in features.tolist()]
    unknown = [f for f, size in zip(features.tolist(), sizes, strict=True) if not size > 0]
    if unknown:
        raise DegenerateInputError(
            f"SteerOptions(a_max='dataset'): the table has no largest activation of features {unknown[:5]}. Score them "
            "with a store in which they are active, or use a_max='token'."
        )
    return torch.tensor(sizes)


class Bench:
    """Turns arms into texts, their measures and the harm done to plain text."""

    def __init__(
        self, model: Model, sae: AnySAE | None, site: Site, prompts: Sequence[str], options: SteerOptions
    ) -> None:
        self.model, self.sae, self.prompts, self.options = model, sae, tuple(prompts), options
        self.runner = ArmRunner(model, site, model.tokens(list(prompts)), options.writing)
        self.harm = Harm(model, site, plain_batch(model, options)) if options.plain_texts else None

    def lens_of(self, features: Int[Tensor, " features"]) -> Int[Tensor, "features k"]:
        """Lens tokens of features."""
        basis = as_basis(self.sae)
        if zero := features[~basis.writing().cpu()[features]].tolist():
            raise DegenerateInputError(f"steer: the decoder rows of features {zero} are zero, so they write nothing.")
        return lens_tokens(self.model, basis.rows(features), self.options.k).ids.cpu()

    def words(self, features: Int[Tensor, " features"]) -> tuple[str, ...]:
        """The first lens tokens of each feature, as text."""
        text = TokenTexts.of(self.model.tokenizer).padded(self.model.d_vocab).text
        return tuple(" · ".join(repr(text(t))[1:-1] for t in row[:6]) for row in self.lens_of(features).tolist())

    def pushes(
        self, features: Int[Tensor, " features"], vectors: Float[Tensor, "features d"]
    ) -> Callable[[float], Pushes]:
        """The pushes along these vectors at a strength, sized by the activations of these features."""
        vectors, sizes = vectors.to(self.model.device), sizes_of(features, self.options)
        return lambda strength: Pushes(vectors, strength, sizes, self.sae)

    def texts(
        self, arms: Sequence[Arm], owners: tuple[int | str, ...], tokens: Int[Tensor, "features k"], progress: Task
    ) -> ArmTexts:
        """Continuations of all prompts in the arms of one kind, each edit with the tokens that are counted under it."""
        written = [self.runner.write(arm, self._first(tokens), progress) for arm in arms]
        edited = [arm.edits for arm in arms if arm.edits is not None]
        harm = None if self.harm is None else np.stack([self.harm.of(edits) for edits in edited], axis=1)
        edits = tuple(EditSummary.of(arm.strength, w.reports) for arm, w in zip(arms, written, strict=True))
        return self._texts(arms[0].kind, owners, tuple(arm.strength for arm in arms), tokens, written, (harm, edits))

    def unsteered(self, progress: Task) -> Written:
        """Continuations of all prompts without an edit."""
        return self.runner.write(UNEDITED, lambda *_: {}, progress)

    def measured(self, owners: tuple[int | str, ...], tokens: Int[Tensor, "features k"], base: Written) -> ArmTexts:
        """The unsteered texts, measured with some tokens of each owner."""
        n = len(owners)
        zero = torch.zeros(n * len(base.ids))
        whole = Written(base.ids * n, base.texts * n, base.nll.repeat(n), {"log_odds": zero, "kl": zero})
        return self._texts(UNEDITED.kind, owners, (0.0,), tokens, [whole], (None, ()))

    def prompted(self, owners: tuple[int | str, ...], tokens: Int[Tensor, "features k"], progress: Task) -> ArmTexts:
        """Continuations of every prompt after an instruction to use some tokens, without an edit."""
        written = self.runner.instructed(self._instructed(tokens), self._first(tokens), progress)
        return self._texts("prompt", owners, (0.0,), tokens, [written], (None, ()))

    def _first(self, tokens: Int[Tensor, "features k"]) -> FirstToken:
        """Change of the log-odds of each owner's tokens, and the divergence, right after the prompt."""
        tokens, n = tokens.to(self.model.device), len(self.prompts)

        def measures(logits: Tensor, base: Tensor, rows: Tensor) -> dict[str, Tensor]:
            own = tokens[(rows // n).to(tokens.device)]
            change = lens_log_odds(logits, own) - lens_log_odds(base, own)
            return {"log_odds": change, "kl": kl_divergence(base, logits)}

        return measures

    def require_room(self, tokens: Int[Tensor, "features k"]) -> None:
        """Refuses instructions to use some tokens that leave too few positions for texts, before any is written."""
        longest = int(self._instructed(tokens).lengths.max())
        self.model.require_room(longest + self.options.new_tokens)

    def _instructed(self, tokens: Int[Tensor, "features k"]) -> TokenBatch:
        """Every prompt after an instruction to use some tokens."""
        return self.model.tokens([self.instruction(row) + prompt for row in tokens.tolist() for prompt in self.prompts])

    def instruction(self, tokens: Sequence[int]) -> str:
        """A sentence that asks for words; those with letters where there are any."""
        words = dict.fromkeys(self.model.tokenizer.decode([t]).strip() for t in tokens)
        spelt = [word for word in words if re.search(r"[^\W\d_]{2}", word)] or [word for word in words if word]
        return INSTRUCTION.format(words=", ".join(spelt[:INSTRUCTION_WORDS]) or "…")

    def _texts(
        self,
        name: str,
        owners: tuple[int | str, ...],
        strengths: tuple[float, ...],
        tokens: Tensor,
        written: Sequence[Written],
        done: tuple[np.ndarray | None, tuple[EditSummary, ...]],
    ) -> ArmTexts:
        by_strength = [w.values(tokens, self.options.ks) for w in written]
        values = {key: np.stack([v[key] for v in by_strength], axis=1) for key in by_strength[0]}
        n = len(self.prompts)
        texts = tuple(tuple(w.texts[f * n : (f + 1) * n] for w in written) for f in range(len(owners)))
        harm, edits = done
        return ArmTexts(
            name=name, features=owners, strengths=strengths, values=values, texts=texts, harm=harm, edits=edits
        )


def plain_batch(model: Model, options: SteerOptions) -> TokenBatch:
    """The plain texts as rows, cut to the same modest length."""
    batch = model.tokens(list(options.plain_texts))
    rows = [row[:PLAIN_LENGTH].tolist() for row in batch.rows()]
    return TokenBatch.pad(rows, model.tokenizer.pad_token_id or 0).to(model.device)
