"""Which features of an SAE fire on glitch tokens and not on ordinary ones, and how well it reconstructs both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.bases.base import Basis
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.errors import DegenerateInputError, InvalidInputError, require
from workbench.core.metrics import squared_error
from workbench.core.progress import track
from workbench.core.stats import POSITIVE, Estimate, discovery_rates, paired_difference, sample_mean, sample_ratio
from workbench.core.tokens import TokenBatch
from workbench.glitch.ranking.weights import in_memory
from workbench.glitch.scanning.sae_feature_report import FeatureRow, GlitchFeatures
from workbench.glitch.vocabulary.tokenizer import Vocabulary, matched_controls, vocabulary_of
from workbench.models.model import Model
from workbench.saes.evaluation.splice import SpliceReader

if TYPE_CHECKING:
    pass

CONTEXTS = (
    "She pointed at the word", "The file is called", "They had a long talk about", "Yesterday we read something on",
)  # fmt: skip
"""Texts behind which each token is read: the same position and the same words for all."""
MIN_TOKENS = 5

Beside = Mapping[int, np.ndarray]
"""Rows of the controls that are left of each glitch token, by its row."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """How tokens are compared.

    Attributes:
        controls: ordinary tokens per glitch token, alike in length and leading space.
        contexts: texts behind which each token is read.
        most: glitch tokens to compare; of more, so many are drawn at random, since activations of all tokens and
            features are held at once.
        fdr: expected share of false ones among the features that are named.
        shuffles: how often labels are shuffled to count what is found by chance.
    """

    controls: int = 4
    contexts: tuple[str, ...] = CONTEXTS
    most: int = 200
    fdr: float = 0.05
    shuffles: int = 10
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        least = min(self.controls, len(self.contexts), self.shuffles, self.batch_size)
        rule = f"fdr lies between 0 and 1, most is at least {MIN_TOKENS}, the others are at least 1."
        require(least >= 1 and self.most >= MIN_TOKENS and 0 < self.fdr < 1, self, rule)


@dataclass(frozen=True, eq=False)
class _Read:
    """What was read at each token, over its contexts.

    Attributes:
        acts: mean feature activations, nan rows where no context is left.
        x: sum of the targets over contexts that count, for their mean.
        error: squared error of the reconstruction, summed over contexts that count.
        n: contexts that count.
    """

    acts: Float[np.ndarray, "tokens d_sae"]
    x: Float[np.ndarray, "tokens d_out"]
    error: Float[np.ndarray, " tokens"]
    square: Float[np.ndarray, " tokens"]
    n: Float[np.ndarray, " tokens"]


def glitch_features(
    model: Model, sae: AnySAE, tokens: Sequence[int], *, avoid: Sequence[int] = (),
    options: FeatureOptions | None = None, vocabulary: Vocabulary | None = None,
) -> GlitchFeatures:  # fmt: skip
    """Compares an SAE's features on glitch tokens with those on matched ordinary tokens in the same places.

    Each token is put by its id behind the same few texts, and a token's mean over them is one observation. Tokens with
    bit-identical input rows are one token to the model, so only the first of them counts. Features are compared by the
    Mann-Whitney test over tokens, with the false discovery rate of Benjamini and Hochberg 1995 over all features that
    fire at all. Where an SAE leaves out sinks and special tokens, they are left out here.

    Args:
        model: a `Model`.
        sae: an SAE or transcoder of it, from `load_sae`.
        tokens: glitch tokens, such as those that a scan verified.
        avoid: further ids that must not be controls, such as all that a scan suspects.
        options: how many controls, which contexts.
        vocabulary: the analysis of the model's tokenizer, if it is at hand.

    Raises:
        DegenerateInputError: if fewer than `MIN_TOKENS` different tokens are left to compare.
        MismatchError: if the SAE is not one of this model.
    """
    options, vocabulary = options or FeatureOptions(), vocabulary or vocabulary_of(model)
    asked = list(dict.fromkeys(int(i) for i in tokens))
    distinct = _distinct(model, asked)
    _require_some(len(distinct), f"{len(asked)} tokens were given, {len(distinct)} with a row of their own")
    drawn = _drawn(distinct, options)
    controls = matched_controls(model, vocabulary, drawn, {*asked, *avoid}, options.controls, options.seed)
    ids = [*drawn, *(i for group in controls for i in group)]
    basis, reader = as_basis(sae), SpliceReader.of(model, sae, _batches(model, ids[len(drawn) :], options))
    read = _read(model, reader, basis, ids, options)
    owner = np.array([-1] * len(drawn) + [k for k, group in enumerate(controls) for _ in group])
    kept = read.n > 0
    _require_some(int(kept[: len(drawn)].sum()), "the others are special tokens or attention sinks at this site")
    glitch, control = (owner < 0) & kept, (owner >= 0) & kept
    beside = {k: own for k in np.flatnonzero(glitch).tolist() if len(own := np.flatnonzero(kept & (owner == k)))}
    if not beside:
        raise DegenerateInputError("glitch_features: no control is left beside any glitch token. Ask for more of them.")
    rows, tested, shuffled = _compared(read, owner, kept, beside, options)
    l0 = (read.acts > 0).sum(1)
    return GlitchFeatures(
        model=str(model.name), site=reader.sites.read, target_site=reader.sites.write, sae=basis.name,
        d_sae=basis.d_sae, ids=tuple(np.asarray(ids)[glitch].tolist()),
        texts=tuple(vocabulary.text[i] for i in np.asarray(ids)[glitch]), asked=len(asked), distinct=len(distinct),
        n_controls=int(control.sum()), dropped=(int((~kept & (owner < 0)).sum()), int((~kept & (owner >= 0)).sum())),
        contexts=options.contexts, rows=rows, tested=tested, fdr=options.fdr, shuffled=shuffled,
        l0=(
            sample_mean(l0[glitch], unit="glitch tokens", within=POSITIVE),
            sample_mean(l0[control], unit="control tokens", within=POSITIVE),
        ),
        **_fvu(read, glitch, control, beside, options.seed),
    )  # fmt: skip


def _distinct(model: Model, tokens: Sequence[int]) -> list[int]:
    rows = in_memory(model.hf).E_in
    bad = [i for i in tokens if not 0 <= i < rows.n_rows]
    if bad:
        raise InvalidInputError(f"tokens={list(tokens)[:8]}: {bad[:8]} have no row; give 0 to {rows.n_rows - 1}.")
    first: dict[bytes, int] = {}
    for i in tokens:
        first.setdefault(rows.rows([i]).numpy().tobytes(), i)
    return list(first.values())


def _drawn(tokens: list[int], options: FeatureOptions) -> list[int]:
    """All of them, or as many as fit, in the order in which they were given."""
    n = min(len(tokens), options.most)
    return [tokens[k] for k in sorted(np.random.default_rng([options.seed, 1]).choice(len(tokens), n, replace=False))]


def _require_some(n: int, why: str) -> None:
    if n < MIN_TOKENS:
        raise DegenerateInputError(
            f"glitch_features: {n} glitch tokens are left to compare ({why}); give at least {MIN_TOKENS}."
        )


def _batches(model: Model, ids: Sequence[int], options: FeatureOptions) -> list[TokenBatch]:
    """Every token behind every context, the context outermost; the token is the last of its row."""
    batches = []
    for text in options.contexts:
        begun = model.tokens(text).ids[0].tolist()
        rows = torch.tensor([[*begun, i] for i in ids])
        batches += [TokenBatch.of_rows(part).to(model.device) for part in rows.split(options.batch_size)]
    return batches


@torch.no_grad()
def _read(model: Model, reader: SpliceReader, basis: Basis, ids: Sequence[int], options: FeatureOptions) -> _Read:
    acts = np.zeros((len(ids), basis.d_sae), dtype=np.float32)
    x = np.zeros((len(ids), basis.d_out))
    error, square, n = np.zeros(len(ids)), np.zeros(len(ids)), np.zeros(len(ids))
    batches, start = _batches(model, ids, options), 0
    for batch in track(batches, description="read glitch tokens and controls", unit="batches"):
        part = reader.read(batch)
        keep: Bool[Tensor, " rows"] = part.keep[:, -1]
        inputs, target = part.x[:, -1][keep], part.target[:, -1][keep]
        rows = (np.arange(start, start + len(batch)) % len(ids))[keep.cpu().numpy()]
        for chosen, some in basis.chunks(inputs):
            acts[rows[chosen]] += some.cpu().numpy()
        error[rows] += squared_error(target, basis.reconstruct(inputs)).cpu().numpy()
        square[rows] += target.double().square().sum(1).cpu().numpy()
        x[rows] += target.double().cpu().numpy()
        n[rows] += 1
        start += len(batch)
    with np.errstate(invalid="ignore", divide="ignore"):
        acts /= n[:, None].astype(np.float32)
    return _Read(acts, x, error, square, n)


def _compared(
    read: _Read, owner: np.ndarray, kept: np.ndarray, beside: Beside, options: FeatureOptions
) -> tuple[tuple[FeatureRow, ...], int, tuple[float, int]]:
    """Features that differ, the number tested, and how many are found when labels are shuffled: mean and most."""
    acts, label = read.acts[kept], (owner < 0)[kept]
    alive = np.flatnonzero((acts > 0).any(0))
    if not len(alive):
        return (), 0, (0.0, 0)
    random = np.random.default_rng(options.seed)
    labels = np.stack([label, *(random.permutation(label) for _ in range(options.shuffles))])
    q, *shuffled = discovery_rates(acts, alive, labels)
    by_chance = [int((rates <= options.fdr).sum()) for rates in shuffled]
    rows = []
    for column in np.flatnonzero(q <= options.fdr):
        feature = int(alive[column])
        glitch, control = acts[label, feature], acts[~label, feature]
        rows.append(FeatureRow(
            feature=feature, glitch=float(glitch.mean()), control=float(control.mean()),
            difference=_paired(read.acts[:, feature], beside, options.seed), fires_glitch=float((glitch > 0).mean()),
            fires_control=float((control > 0).mean()), q=float(q[column]),
        ))  # fmt: skip
    rows.sort(key=lambda row: (-abs(row.difference.value), row.feature))
    return tuple(rows), len(alive), (float(np.mean(by_chance)), max(by_chance))


def _fvu(read: _Read, glitch: np.ndarray, control: np.ndarray, beside: Beside, seed: int) -> dict[str, Estimate]:
    """Unexplained over total variance of each kind, both about the mean of the controls.

    About their own mean, tokens that are all alike would have no variance, and any error on them would look large.
    """
    mean = read.x[control].sum(0) / read.n[control].sum()
    spread = read.square - 2 * read.x @ mean + read.n * float(mean @ mean)
    ratio = {
        name: sample_ratio(read.error[chosen], spread[chosen], unit=f"{unit} tokens", seed=seed)
        for name, chosen, unit in (("fvu_glitch", glitch, "glitch"), ("fvu_control", control, "control"))
    }
    return {**ratio, "fvu_difference": _paired(read.error / np.where(spread > 0, spread, 1.0), beside, seed)}


def _paired(values: np.ndarray, beside: Beside, seed: int) -> Estimate:
    """Each glitch token's value minus the mean of its own controls."""
    others = [float(values[controls].mean()) for controls in beside.values()]
    return paired_difference(values[list(beside)].tolist(), others, unit="glitch tokens", seed=seed)
