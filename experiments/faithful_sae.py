"""Is an SAE better, more stable or less fooled if it is trained on the model's own text instead of other text?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from workbench.activations.harvest import harvest
from workbench.activations.sources import OWN_TEXT_TOKENS, SelfText, TextFiles
from workbench.activations.store import ActivationStore
from workbench.bases.sae import SAELike, as_basis
from workbench.cli.study import Begin, Study
from workbench.cli.training import TrainingOptions
from workbench.controls.tokens import TokenPolicy
from workbench.core.errors import InvalidInputError
from workbench.core.progress import track
from workbench.core.stats import Estimate
from workbench.core.tokens import TokenBatch
from workbench.engine.keeper import Keeper
from workbench.models.model import Model
from workbench.probes.linear import ProbeOptions, fit_probe, mean_pool
from workbench.saes.comparison.corpus import CorpusOptions, CorpusReport, check_corpus
from workbench.saes.comparison.faithful import FakeFeatureOptions, FakeFeatures, Quality, fake_features, quality
from workbench.saes.comparison.faithful_report import CORPUS, OWN, FaithfulReport, Pair, Trained
from workbench.saes.comparison.matching import MatchOptions, match_by_activations
from workbench.saes.comparison.shared import shared_features
from workbench.saes.config import SAEConfig
from workbench.saes.evaluation.evaluate import EvalOptions
from workbench.saes.evaluation.library_texts import Labelled, library_topics, read_labelled, write_corpus
from workbench.saes.formats.load import load_sae
from workbench.saes.training.checkpoint import store_id
from workbench.saes.training.train import train_sae


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes of the study.

    Attributes:
        tokens: of each text.
        context: tokens per row.
        seeds: SAEs per text.
        seed: of the texts and the first SAE.
        sae: the SAEs and their training.
        evaluation: rows and batches of the evaluation.
        fake: constants of the fake feature ratio.
        match: constants of the matching by activations.
        corpus: constants of the checks of both texts.
        probe_batch: labelled texts per forward pass.
        probe_tokens: tokens of a labelled text that are read.
    """

    tokens: int = OWN_TEXT_TOKENS
    context: int = SelfText.context
    seeds: int = 3
    seed: int = 0
    sae: SAEConfig = field(default_factory=SAEConfig)
    evaluation: EvalOptions = field(default_factory=lambda: EvalOptions(max_rows=24))
    fake: FakeFeatureOptions = field(default_factory=FakeFeatureOptions)
    match: MatchOptions = field(default_factory=MatchOptions)
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    probe_batch: int = 16
    probe_tokens: int = 128

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise InvalidInputError(f"seeds={self.seeds}: comparing two texts takes at least two seeds of each.")


def study(
    model: Model,
    site: str,
    folder: Path,
    *,
    corpus: Path | None = None,
    labelled: Labelled | None = None,
    options: Options | None = None,
) -> FaithfulReport:
    """Both texts to stores to SAEs to measurements; whatever of these is in `folder` is resumed or used again.

    Args:
        model: the model.
        site: where to read.
        folder: gets `own`, `corpus`, a folder per SAE, and `measured`.
        corpus: text to compare with; None takes the documentation strings of Python's standard library.
        labelled: texts of two classes for the probes; None takes documentation strings of two topics.
        options: sizes.

    Raises:
        InvalidInputError: if the corpus is shorter than the own text.
    """
    options, folder = options or Options(), Path(folder)
    evaluation, checks = options.evaluation, options.corpus
    texts = labelled or library_topics(seed=options.seed)
    said = str(corpus.name) if corpus else "documentation strings of Python's standard library"
    stores = _stores(model, site, folder, corpus or write_corpus(folder / "corpus.jsonl", options.seed), options)
    saes = _trained(stores, site, folder, options)
    heldout = {data: store.token_rows("heldout") for data, store in stores.items()}
    made_of = [*map(store_id, stores.values()), *(as_basis(sae).fingerprint for sae in saes.values())]
    parts = Keeper.of_key(folder / "measured", (model.fingerprint, site, options, texts, made_of))
    alike = torch.cat([rows[: evaluation.max_rows] for rows in heldout.values()])
    named = {_name(key): sae for key, sae in saes.items()}
    fake = parts.once("fake", dict[str, FakeFeatures], lambda: fake_features(model, named, alike, options=options.fake))
    probes = parts.once(
        "probes", dict[str, tuple[Estimate, Estimate]], lambda: _probes(model, named, site, texts, options)
    )
    trained = []
    for (data, seed), sae in track(saes.items(), description="Evaluating the SAEs", unit="SAEs"):
        name = _name((data, seed))
        on = {
            kind: parts.once(
                f"{name}-on-{kind}", Quality,
                lambda sae=sae, rows=rows: quality(model, sae, rows, options=evaluation),
            )
            for kind, rows in heldout.items()
        }  # fmt: skip
        probe, shuffled = probes[name]
        trained.append(Trained(data=data, seed=seed, on=on, fake=fake[name], probe=probe, shuffled=shuffled))
    return FaithfulReport(
        site=site, tokens=stores[OWN].manifest.n_tokens, corpus=said, saes=tuple(trained),
        pairs=tuple(_pairs(saes, stores, options, parts)),
        texts={kind: parts.once(
            f"text-{kind}", CorpusReport,
            lambda store=store: check_corpus(model, store.token_rows("all"), options=checks),
        ) for kind, store in stores.items()},
        classes=texts.names, raw_probe=probes[site][0], raw_shuffled=probes[site][1],
    )  # fmt: skip


def _name(key: tuple[str, int]) -> str:
    return f"{key[0]}-{key[1]}"


def _stores(model: Model, site: str, folder: Path, corpus: Path, options: Options) -> dict[str, ActivationStore]:
    own = harvest(
        model, SelfText(tokens=options.tokens, context=options.context, seed=options.seed), [site], folder / OWN
    )
    other = harvest(model, TextFiles([corpus], tokens=options.tokens, context=options.context), [site], folder / CORPUS)
    if other.manifest.n_tokens != own.manifest.n_tokens:
        raise InvalidInputError(
            f"{corpus} gives {other.manifest.n_tokens} tokens and the model wrote {own.manifest.n_tokens}; the "
            "comparison needs as many of both. Give a longer corpus, or fewer --tokens."
        )
    return {OWN: own, CORPUS: other}


def _trained(
    stores: dict[str, ActivationStore], site: str, folder: Path, options: Options
) -> dict[tuple[str, int], SAELike]:
    saes = {}
    for data, store in stores.items():
        for seed in range(options.seed, options.seed + options.seeds):
            config = replace(options.sae, seed=seed, site=site)
            saes[data, seed] = load_sae(train_sae(store, config, folder / "saes" / _name((data, seed))).path)
    return saes


def _pairs(
    saes: dict[tuple[str, int], SAELike], stores: dict[str, ActivationStore], options: Options, parts: Keeper
) -> Iterator[Pair]:
    share = max(2, options.match.max_tokens // len(stores))
    acts = [part for store in stores.values() for part in _first(store, share)]

    def pair(a: tuple[str, int], b: tuple[str, int]) -> Pair:
        directions = shared_features(saes[a], saes[b], draws=1, seed=options.seed)
        activations = match_by_activations(saes[a], saes[b], acts, options=options.match)
        return Pair((a[0], b[0]), (_name(a), _name(b)), (a[1], b[1]), directions, activations)

    every = list(itertools.combinations(saes, 2))
    for a, b in track(every, description="Matching features", unit="pairs"):
        yield parts.once(f"{_name(a)}-and-{_name(b)}", Pair, lambda a=a, b=b: pair(a, b))


def _first(store: ActivationStore, limit: int) -> Iterator[Tensor]:
    for block in store.read(split="heldout"):
        yield block[:limit]
        limit -= len(block)
        if limit <= 0:
            return


def _probes(
    model: Model, saes: dict[str, SAELike], site: str, texts: Labelled, options: Options
) -> dict[str, tuple[Estimate, Estimate]]:
    """Accuracy of a probe on the model's own activations (by the site's name) and on each SAE, with its control."""
    pooled = _pooled(model, {site: None, **saes}, site, texts, options)
    return {name: _probe(x, texts, site, options) for name, x in pooled.items()}


@torch.no_grad()
def _pooled(
    model: Model, saes: Mapping[str, SAELike | None], site: str, texts: Labelled, options: Options
) -> dict[str, Tensor]:
    """Mean activations per text, of the model (`None`) and of each SAE; sinks and first tokens left out."""
    pooled: dict[str, list[Tensor]] = {name: [] for name in saes}
    parts = [texts.texts[i : i + options.probe_batch] for i in range(0, len(texts.texts), options.probe_batch)]
    policy: TokenPolicy | None = None
    for part in track(parts, description="Reading labelled texts", unit="batches"):
        batch = _cut(model.tokens(list(part)), options.probe_tokens)
        x = model.capture(batch, [site]).flat(site).float()
        policy = policy or TokenPolicy.of_batch(batch, x)
        keep = policy.kept(batch, x)
        for name, sae in saes.items():
            acts = x if sae is None else torch.stack([as_basis(sae).encode(row) for row in x])
            pooled[name].append(mean_pool(acts.to(x.device), keep).cpu())
    return {name: torch.cat(parts) for name, parts in pooled.items()}


def _cut(batch: TokenBatch, tokens: int) -> TokenBatch:
    """The first tokens of each row; padding stays on the left."""
    rows = [row[:tokens].tolist() for row in batch.rows()]
    return TokenBatch.pad(rows, 0).to(batch.ids.device)


def _probe(x: Tensor, texts: Labelled, site: str, options: Options) -> tuple[Estimate, Estimate]:
    probe = fit_probe(x, torch.tensor(texts.labels), site, options=ProbeOptions(seed=options.seed))
    assert probe.accuracy is not None and probe.shuffled is not None
    return probe.accuracy, probe.shuffled


@dataclass(frozen=True, kw_only=True)
class FaithfulSAE(TrainingOptions, Study[FaithfulReport]):
    """Compare SAEs on the model's own text and on other text.

    Quality, stability over seeds, fake features, probes.

    Example: workbench sae faithful --tokens 100000 --seeds 3
    """

    run_name, step = "faithful-sae", "faithful"

    site: str | None = None
    """Where to read; by default the residual stream after the middle layer."""
    corpus: Path | None = None
    """Text to compare with (.txt or .jsonl); by default the documentation strings of Python's standard library."""
    labelled: Path | None = None
    """JSON lines with text and label, two labels, for the probes; by default documentation strings of two topics."""
    tokens: int = OWN_TEXT_TOKENS
    """Tokens of each text."""
    context: int = SelfText.context
    """Tokens per row."""
    seeds: int = 3
    """SAEs per text."""
    rows: int = 24
    """Held-out rows of each text that the evaluation runs through the model."""
    random_tokens: int = 100_000
    """Random tokens of each of the three sets that the fake feature ratio is measured on."""

    def measure(self, begin: Begin) -> FaithfulReport:
        labelled = None if self.labelled is None else read_labelled(self.labelled)
        model = self.load_model()
        site = str(model.resolve(self.site or f"resid_post.{model.n_layers // 2}"))
        options = Options(
            tokens=self.tokens, context=self.context, seeds=self.seeds, seed=self.seed,
            sae=self.sae_config(model.width(site)), evaluation=EvalOptions(max_rows=self.rows, seed=self.seed),
            fake=FakeFeatureOptions(tokens=self.random_tokens, context=self.context, seed=self.seed),
        )  # fmt: skip
        run = begin(model)
        return study(model, site, run.artifacts, corpus=self.corpus, labelled=labelled, options=options)

    def title(self, report: FaithfulReport) -> str:
        return f"SAEs on own text and on a corpus, {report.site}"


if __name__ == "__main__":
    import tyro

    tyro.cli(FaithfulSAE).run()
