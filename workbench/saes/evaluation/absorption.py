"""Feature absorption on the first-letter task: does a feature for a letter stay silent where a word's own one fires?"""

from __future__ import annotations

import string
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.bases.base import Basis
from workbench.bases.fits import placed_at
from workbench.bases.kinds.random import random_like
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.errors import DegenerateInputError, InvalidInputError, MismatchError, ShapeError
from workbench.core.numbers import number
from workbench.core.similarity import SparseMatrix
from workbench.core.stats import SHARE, Estimate, sample_mean
from workbench.core.tokenizer import TokenizerLike
from workbench.interventions.scopes import Last
from workbench.models.model import Model
from workbench.report.base import Headline, Report, Says, Section, Table, beside
from workbench.saes.evaluation.labelled import token_texts
from workbench.saes.evaluation.sparse_probing import class_difference, dense, f1, logistic


@dataclass(frozen=True, kw_only=True)
class AbsorptionOptions:
    """The constants of the measurement.

    Attributes:
        max_words: words of the vocabulary that are run through the model.
        test_share: share of the words that are held out; absorption is counted on these.
        gate_letters: so many letters need a probe of `gate_f1`, else nothing is reported.
        gate_f1: held-out F1 of a letter's linear probe.
        split_gain: a further feature belongs to the letter while it raises the training F1 by more than this.
        max_split: most features of one letter.
        full_cosine: smallest cosine of the absorbing feature's decoder row and the probe.
        share: the absorbing feature gives at least this share of the probe projection.
        fraction_cosine: smallest cosine of a feature that counts for the fraction.
        fraction_features: so many of them count.
        examples: words that are spelled out in the prompt.
        batch: words per forward pass.
        seed: of words, split and prompt.

    Source: Chanin et al. 2024 (arXiv 2409.14507). Here the probe is one logistic regression per letter, and the
    projection is of `x - b_dec`, which is what the features have to make up.
    """

    max_words: int = 2000
    test_share: float = 0.4
    gate_letters: int = 20
    gate_f1: float = 0.6
    split_gain: float = 0.03
    max_split: int = 10
    full_cosine: float = 0.025
    share: float = 0.4
    fraction_cosine: float = 0.1
    fraction_features: int = 3
    examples: int = 3
    batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1 or self.max_words < 20 or self.max_split < 1:
            raise InvalidInputError(f"{self}: needs a test share between 0 and 1, 20 words and one feature per letter.")


@dataclass(frozen=True, kw_only=True)
class LetterScore:
    """One letter on held-out words.

    Attributes:
        probe_f1: of the linear probe on the activations.
        sparse_f1: of the probe on the letter's features.
        n: held-out words of this letter that the linear probe gets right.
        full: share of these on which the letter's features are silent and one other stands in; nan without words.
        fraction: mean share of the letter's projection that other features give.
    """

    letter: str
    probe_f1: float
    sparse_f1: float
    features: tuple[int, ...]
    n: int
    full: float
    fraction: float


@dataclass(frozen=True)
class AbsorptionReport(Report):
    """Absorption of an SAE, or that the gate failed: a model without linear letters can't show any.

    Attributes:
        n_good: letters whose probe passes the gate.
        full: mean over the good letters; None if the gate failed.
        fraction: mean over the good letters; None if the gate failed.
        control: full absorption of a random SAE; it has no letter features, so that it shows what noise gives.
    """

    letters: tuple[LetterScore, ...]
    n_good: int
    options: AbsorptionOptions
    full: Estimate | None
    fraction: Estimate | None
    control: Estimate | None = None

    @property
    def gate_passed(self) -> bool:
        """Whether enough letters are linear in this model for the numbers to mean something."""
        return self.full is not None

    def findings(self) -> tuple[str, ...]:
        """Both rates, or why there are none."""
        o = self.options
        if self.full is None:
            return (
                f"Absorption: gate failed. A linear probe reaches F1 of at least {o.gate_f1} for {self.n_good} of the "
                f"{o.gate_letters} letters needed. This says nothing about the SAE.",
            )
        control = "" if self.control is None else f" (random SAE: {number(self.control.value)})"
        return (
            f"Full absorption {self.full}{control}, absorption fraction {self.fraction}, over {self.n_good} letters.",
        )

    def headline(self) -> Headline:
        """Full absorption beside what noise gives."""
        return Headline.of(
            Says(
                "The SAE absorbs letters into other features less than a random SAE does.",
                "The SAE absorbs letters into other features as much as noise gives.",
                "The SAE absorbs letters into other features more than noise gives.",
                "Too few letters are linear in this model for absorption to be measured."
                if self.full is None
                else "No random SAE was measured beside it.",
            ),
            self._beside(),
            "lower",
        )

    def _beside(self) -> Table:
        control = None if self.control is None else ("random SAE", self.control)
        return beside("full absorption", ("this SAE", self.full), control)

    def section(self) -> Section:
        """One row per letter."""
        rows = tuple(
            (s.letter, s.probe_f1, s.sparse_f1, len(s.features), s.n, *(_cell(v) for v in (s.full, s.fraction)))
            for s in self.letters
        )
        columns = ("letter", "probe F1", "k-sparse F1", "features", "words", "full absorption", "fraction")
        table = Table(columns, rows, "Held-out words that the linear probe classifies rightly.")
        named = {"full": self.full, "fraction": self.fraction, "random_full": self.control}
        metrics = {name: value for name, value in named.items() if value is not None}
        counts = {"letters_passed": self.n_good}
        return Section("Absorption", (table, self._beside()), self.findings(), {**counts, **metrics}, self.headline())


def _cell(value: float) -> float | None:
    return None if np.isnan(value) else value


@torch.no_grad()
def first_letter_absorption(model: Model, sae: AnySAE, options: AbsorptionOptions | None = None) -> AbsorptionReport:
    """Absorption measured on the words of the model's own vocabulary; no data needed.

    Raises:
        MismatchError: if the SAE does not belong to the model, or is a transcoder.
        DegenerateInputError: if the vocabulary has too few words.
    """
    options, basis = options or AbsorptionOptions(), _sae_alone(sae)
    site = str(placed_at(basis, model).site)
    ids, letters = vocabulary_words(model.tokenizer, options)
    prompts = torch.cat([_prompt(model, options).expand(len(ids), -1), ids[:, None]], dim=1)
    parts = [model.capture(p, [site], positions=Last())[site].float().cpu() for p in prompts.split(options.batch)]
    x = torch.cat(parts)
    test = torch.rand(len(x), generator=torch.Generator().manual_seed(options.seed)) < options.test_share
    report = absorption(basis, x, letters, test, options)
    control = random_like(basis, round(basis.sparse(x).nnz / len(x)), options.seed)
    of_random = absorption(control, x, letters, test, options).full
    return AbsorptionReport(report.letters, report.n_good, options, report.full, report.fraction, of_random)


def vocabulary_words(tokenizer: TokenizerLike, options: AbsorptionOptions) -> tuple[Int[Tensor, " words"], list[str]]:
    """Ids and first letters of tokens that are a space and at least three lower-case letters.

    Raises:
        DegenerateInputError: if there are fewer than a hundred.
    """
    words = []
    for i, text in enumerate(token_texts(tokenizer)):
        if len(text) >= 4 and text[0] == " " and set(text[1:]) <= set(string.ascii_lowercase):
            words.append((i, text[1]))
    if len(words) < 100:
        raise DegenerateInputError(
            f"The vocabulary has {len(words)} tokens that are whole lower-case words; at least 100 are needed for the "
            "first-letter task. This model can't be measured by it."
        )
    chosen = np.random.default_rng(options.seed).permutation(len(words))[: options.max_words]
    ids, letters = zip(*(words[i] for i in sorted(chosen)), strict=True)
    return torch.tensor(ids), list(letters)


def _sae_alone(sae: AnySAE) -> Basis:
    """The SAE; a transcoder's decoder is not where its probe and activations are."""
    basis = as_basis(sae)
    if basis.transcodes:
        raise MismatchError(
            f"Absorption of a transcoder ({basis.name}): the letter's probe is where it reads, its decoder where it "
            "writes, so they can't be compared. Absorption needs an SAE of one site."
        )
    return basis


def _prompt(model: Model, options: AbsorptionOptions) -> Int[Tensor, "1 pos"]:
    """Spelled-out examples in front of the word; what follows the word can't reach it."""
    examples = ("dog", "water", "apple", "stone", "river", "music", "light", "grass")[: options.examples]
    text = "".join(f" {word} has the first letter: {word[0].upper()}\n" for word in examples) or "\n"
    return model.tokens(text).ids.cpu()


def absorption(
    sae: AnySAE,
    x: Float[Tensor, "words d_in"],
    letters: list[str],
    test: Bool[Tensor, " words"],
    options: AbsorptionOptions | None = None,
) -> AbsorptionReport:
    """Absorption on given activations of words.

    `test` marks the words that are held out. With fewer letters than `options.gate_letters` the gate fails.

    Raises:
        ShapeError: if words and letters don't pair up.
        MismatchError: for a transcoder.
    """
    options, basis = options or AbsorptionOptions(), _sae_alone(sae)
    if not len(x) == len(letters) == len(test):
        raise ShapeError(
            f"absorption: {len(x)} activations, {len(letters)} letters, {len(test)} marks; they must pair."
        )
    acts, names, held = basis.sparse(x), np.array(letters), test.numpy()
    task = _Task(basis, x.double().numpy(), acts, held, options)
    counts = {
        letter: (int((names[~held] == letter).sum()), int((names[held] == letter).sum())) for letter in set(names)
    }
    tried = sorted(letter for letter, (n_train, n_test) in counts.items() if n_train >= 3 and n_test >= 2)
    scores = tuple(task.score(letter, names == letter) for letter in tried)
    good = [s for s in scores if s.probe_f1 >= options.gate_f1]
    counted = [s for s in good if s.n]
    if len(good) < options.gate_letters or not counted:
        return AbsorptionReport(scores, len(good), options, None, None)
    full, fraction = (
        sample_mean([getattr(s, name) for s in counted], unit="letters", seed=options.seed, within=SHARE)
        for name in ("full", "fraction")
    )
    return AbsorptionReport(scores, len(good), options, full, fraction)


@dataclass(frozen=True, eq=False)
class _Task:
    basis: Basis
    x: np.ndarray
    acts: SparseMatrix
    held: np.ndarray
    options: AbsorptionOptions

    def score(self, letter: str, labels: np.ndarray) -> LetterScore:
        train = ~self.held
        probe = logistic(self.x[train], labels[train].astype(int))
        predicted = probe.predict(self.x[self.held])
        features, sparse_f1 = self._split_features(labels)
        right = np.flatnonzero(self.held)[(predicted == 1) & labels[self.held]]
        full, fraction = self._absorbed(right, features, probe.direction / np.linalg.norm(probe.direction))
        return LetterScore(
            letter=letter, probe_f1=f1(labels[self.held], predicted), sparse_f1=sparse_f1, features=tuple(features),
            n=len(right), full=float(full.mean()) if len(right) else float("nan"),
            fraction=float(fraction.mean()) if len(right) else float("nan"),
        )  # fmt: skip

    def _split_features(self, labels: np.ndarray) -> tuple[list[int], float]:
        """The letter's features, and the training F1 of a probe on them."""
        train = ~self.held
        y = labels[train].astype(int)
        order = np.argsort(-class_difference(self.acts[train], y), kind="stable")[: self.options.max_split]
        chosen, best = 1, -1.0
        for k in range(1, len(order) + 1):
            columns = dense(self.acts[train][:, order[:k]])
            gained = f1(y, logistic(columns, y).predict(columns))
            if k > 1 and gained <= best + self.options.split_gain:
                break
            chosen, best = k, gained
        return [int(j) for j in order[:chosen]], best

    def _absorbed(self, rows: np.ndarray, features: list[int], probe: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per word: whether the letter is fully absorbed, and the share that other features give."""
        o = self.options
        decoder = self.basis.rows().double().cpu().numpy()
        along = decoder @ probe
        cosine = along / np.maximum(np.linalg.norm(decoder, axis=1), 1e-12)
        target = (self.x[rows] - self.basis.bias.double().cpu().numpy()) @ probe
        given = dense(self.acts[rows]) * along
        main = given[:, features].sum(1)
        others = given.copy()
        others[:, features] = 0.0
        silent = dense(self.acts[rows][:, features]).max(1, initial=0.0) <= 0
        top = others.argmax(1)
        best = np.take_along_axis(others, top[:, None], 1)[:, 0]
        full = silent & (cosine[top] >= o.full_cosine) & (best >= o.share * target) & (best > 0)
        aligned = np.where(cosine >= o.fraction_cosine, others, 0.0).clip(min=0)
        absorbing = np.sort(aligned, axis=1)[:, -o.fraction_features :].sum(1)
        share = absorbing / np.maximum(absorbing + main.clip(min=0), 1e-12)
        return full.astype(float), np.where(absorbing >= o.share * target, share, 0.0)
