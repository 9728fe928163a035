"""All measurements of one SAE of a model, each beside its controls: core, k-sparse probing, absorption, method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from workbench.bases.base import Basis
from workbench.bases.kinds.random import random_like
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, MismatchError
from workbench.core.similarity import SparseMatrix
from workbench.core.tokens import TokenBatch
from workbench.models.model import Model
from workbench.report.base import Headline, Report, Section
from workbench.saes.evaluation.absorption import AbsorptionOptions, AbsorptionReport, first_letter_absorption
from workbench.saes.evaluation.evaluate import EvalOptions, Rows, evaluate_sae, token_batches
from workbench.saes.evaluation.labelled import UNLABELLED, LabelledTexts, token_labels, token_texts
from workbench.saes.evaluation.quality import SAEReport
from workbench.saes.evaluation.sparse_probing import Examples, ProbingOptions, ProbingReport, probe_sets
from workbench.saes.evaluation.splice import SpliceReader
from workbench.saes.evaluation.synthetic import SyntheticReport
from workbench.saes.evaluation.synthetic_training import SyntheticTraining, train_on_synthetic, trained_as

TOO_FEW = "This text has too few examples."


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """What is measured.

    Attributes:
        evaluation: rows and batches of the core metrics and of the token labels.
        probing: probes; None leaves them out.
        absorption: the first-letter task; None leaves it out.
        synthetic: an SAE of the same architecture, trained where the true features are known; None leaves it out.
    """

    evaluation: EvalOptions = field(default_factory=EvalOptions)
    probing: ProbingOptions | None = field(default_factory=ProbingOptions)
    absorption: AbsorptionOptions | None = field(default_factory=AbsorptionOptions)
    synthetic: SyntheticTraining | None = field(default_factory=SyntheticTraining)


@dataclass(frozen=True)
class SuiteReport(Report):
    """One SAE: core metrics, probes, absorption, and how it was trained; None for what was left out.

    Attributes:
        synthetic: another SAE of the same architecture, on data of known features.
        skipped: what could not be measured, and why.
    """

    quality: SAEReport
    probing: ProbingReport | None
    absorption: AbsorptionReport | None
    synthetic: SyntheticReport | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Report]:
        """What was measured, by name."""
        measured = {
            "core": self.quality, "probing": self.probing, "absorption": self.absorption, "synthetic": self.synthetic,
        }  # fmt: skip
        return {name: part for name, part in measured.items() if part is not None}

    def findings(self) -> tuple[str, ...]:
        """Those of every part, and what could not be measured."""
        lines = tuple(line for part in self.parts.values() for line in part.findings())
        by_reason: dict[str, list[str]] = {}
        for name, why in self.skipped.items():
            by_reason.setdefault(why, []).append(name)
        return (*lines, *(f"Not measured: {', '.join(names)}. {why}" for why, names in by_reason.items()))

    def headline(self) -> Headline:
        """That of the core metrics."""
        return self.quality.headline()

    def section(self) -> Section:
        """All tables one after the other."""
        sections = {name: part.section() for name, part in self.parts.items()}
        blocks = tuple(block for section in sections.values() for block in section.blocks)
        metrics = {f"{name}.{key}": v for name, section in sections.items() for key, v in section.metrics.items()}
        return Section(f"SAE suite, {self.quality.site}", blocks, self.findings(), metrics, self.headline())


@checked
def run_suite(
    model: Model, sae: AnySAE, rows: Rows, *, texts: Sequence[LabelledTexts] = (), options: SuiteOptions | None = None
) -> SuiteReport:
    """Everything that can be measured of an SAE without downloads.

    Raises:
        MismatchError: if the SAE does not belong to the model.
    """
    options = options or SuiteOptions()
    quality = evaluate_sae(model, sae, rows, options=options.evaluation)
    skipped: dict[str, str] = {}
    probing, absorption = None, None
    if options.probing is not None:
        sets = labelled_examples(model, sae, rows, texts, options.evaluation)
        usable = [s for s in sets if _enough(s, options.probing)]
        skipped |= {s.name: TOO_FEW for s in sets if not _enough(s, options.probing)}
        probing = probe_sets(usable, options.probing) if usable else None
    if options.absorption is not None:
        try:
            absorption = first_letter_absorption(model, sae, options.absorption)
        except (DegenerateInputError, MismatchError) as error:  # this task is not for every tokenizer and basis
            skipped["absorption"] = str(error)
    architecture, synthetic = trained_as(sae), None
    if options.synthetic is not None and architecture is not None:
        synthetic = train_on_synthetic(architecture, options.synthetic)
    return SuiteReport(quality, probing, absorption, synthetic, skipped)


@torch.no_grad()
def labelled_examples(
    model: Model, sae: AnySAE, rows: Rows, texts: Sequence[LabelledTexts], options: EvalOptions
) -> list[Examples]:
    """Token-level sets of the rows and text-level sets, as activations of the kept tokens; texts are mean-pooled."""
    batches, basis = token_batches(model, rows, options), as_basis(sae)
    reader = SpliceReader.of(model, sae, batches)
    tokens = _labelled_tokens(model, reader, batches)
    acts = basis.sparse(tokens.x)
    control = random_like(basis, round(acts.nnz / max(1, len(tokens.x))), options.seed)
    sets = _token_sets(tokens, {"SAE": acts, "random SAE": control.sparse(tokens.x)})
    bases = {"SAE": basis, "random SAE": control}
    return sets + [_text_set(model, reader, bases, s, options.batch_rows) for s in texts]


@dataclass(frozen=True, eq=False)
class _LabelledTokens:
    """The kept tokens of all rows: what the SAE reads, the row of each, and its labels by the name of the set."""

    x: Tensor
    rows: Tensor
    labels: dict[str, Tensor]


def _labelled_tokens(model: Model, reader: SpliceReader, batches: list[TokenBatch]) -> _LabelledTokens:
    x, rows, first, texts = [], [], 0, token_texts(model.tokenizer)
    labels: dict[str, list[Tensor]] = {}
    for batch in batches:
        part = reader.read(batch)
        keep = part.keep.cpu()
        logits = (model.logits(batch[i : i + 1], keep="all")[0] for i in range(len(batch)))
        entropy = _padded([_entropy(z) for z in logits], batch.ids.shape[1]).cpu()
        for name, value in token_labels(batch.to("cpu"), texts, entropy).items():
            labels.setdefault(name, []).append(value[keep])
        x.append(part.x[part.keep])
        rows.append(first + keep.nonzero()[:, 0])
        first += len(batch)
    return _LabelledTokens(torch.cat(x), torch.cat(rows), {name: torch.cat(parts) for name, parts in labels.items()})


def _token_sets(tokens: _LabelledTokens, acts: dict[str, SparseMatrix]) -> list[Examples]:
    every, of = tokens.x.cpu().numpy(), tokens.rows.numpy()
    sets = []
    for name, labels in tokens.labels.items():
        y = labels.numpy()
        used = y != UNLABELLED
        sets.append(Examples(name, every[used], {n: a[used] for n, a in acts.items()}, y[used], of[used]))
    return sets


def _padded(rows: list[Tensor], width: int) -> Tensor:
    """Rows as one tensor, left-padded as the batch is."""
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _text_set(
    model: Model, reader: SpliceReader, bases: dict[str, Basis], texts: LabelledTexts, batch_rows: int
) -> Examples:
    """Means over the kept tokens of each text; a text without any is left out."""
    from scipy.sparse import csr_matrix, vstack

    tokens = model.tokens(list(texts.texts))
    x, acts, used = [], {name: [] for name in bases}, []
    for start in range(0, len(tokens), batch_rows):
        part = reader.read(tokens[start : start + batch_rows])
        for row, keep in enumerate(part.keep):
            used.append(bool(keep.any()))
            if not used[-1]:
                continue
            here = part.x[row][keep]
            x.append(here.mean(0).cpu())
            for name, basis in bases.items():
                acts[name].append(csr_matrix(basis.sparse(here).mean(axis=0)))
    chosen = np.array(used)
    joined = {name: vstack(parts, format="csr") for name, parts in acts.items()}
    documents = np.array(texts.documents)[chosen]
    return Examples(texts.name, torch.stack(x).numpy(), joined, np.array(texts.labels)[chosen], documents)


def _enough(examples: Examples, options: ProbingOptions) -> bool:
    """Whether both classes stand in enough documents for every reseed's split to find some on both sides."""
    needed = max(5, round(5 / min(options.test_share, 1 - options.test_share)))
    counts = [examples.labels == label for label in (0, 1)]
    return all(c.sum() >= 40 and len(np.unique(examples.documents[c])) >= needed for c in counts)
