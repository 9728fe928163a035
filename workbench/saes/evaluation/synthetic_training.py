"""Does a way of training find features that are known to be there? An SAE is trained for it on synthetic data."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from workbench.activations.manifest import Manifest, ShardFile, SiteStats
from workbench.activations.store import ActivationStore, Split
from workbench.bases.sae import AnySAE, as_basis
from workbench.core.errors import InvalidInputError, UnknownNameError
from workbench.saes.config import ARCHITECTURES, SAEConfig, architecture_name
from workbench.saes.evaluation.synthetic import SyntheticOptions, SyntheticReport, SyntheticTruth, evaluate_on_synthetic
from workbench.saes.formats.load import load_sae
from workbench.saes.training.train import train_sae

SITE = "resid_post.0"
"""What the synthetic tokens are called: a store and an SAE need the name of a site."""
FIRST_SEED = 1000
"""Of the first shard; smaller seeds are for tokens to judge on."""
TRANSCODERS = {"transcoder": "relu", "skip_transcoder": "relu", "jumprelu_transcoder": "jumprelu"}
"""The SAE whose non-linearity a transcoder has."""


@dataclass(frozen=True, kw_only=True)
class SyntheticTraining:
    """What is trained on which synthetic data.

    Attributes:
        d_sae: features of the SAE; None takes as many as are true.
        seed: of the SAE and of the tokens.
    """

    world: SyntheticOptions = field(default_factory=SyntheticOptions)
    d_sae: int | None = None
    steps: int = 1200
    batch: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2:
            raise InvalidInputError(f"{self}: train for at least one step of two tokens.")

    def config(self, architecture: str) -> SAEConfig:
        """The SAE; where k is fixed, with room for one feature more than are there on average."""
        has_k = "k" in ARCHITECTURES[architecture_name(architecture)].options
        return SAEConfig(
            architecture=architecture, d_sae=self.d_sae or self.world.n_features,
            k=round(self.world.mean_active) + 1 if has_k else None, tokens=self.steps * self.batch, batch=self.batch,
            lr=3e-3, warmup=0.1, decay=0.2, buffer=16 * self.batch, kernel="csr", device="cpu", site=SITE,
            seed=self.seed,
        )  # fmt: skip


class SyntheticStore(ActivationStore):
    """Tokens of a synthetic world as a store that makes them when they are read; nothing is on disk."""

    def __init__(self, truth: SyntheticTruth, *, shards: int = 8, shard_rows: int = 50_000) -> None:
        self.truth, self.shard_rows = truth, shard_rows
        listed = tuple(
            ShardFile(
                file=f"{i}",
                sha256=f"synthetic{i}",
                first_row=i * shard_rows,
                n_rows=shard_rows,
                kept=shard_rows,
                dropped={},
            )  # fmt: skip
            for i in range(shards)
        )
        width, rows = truth.directions.shape[1], shards * shard_rows
        manifest = Manifest(
            model_name="synthetic", model_fingerprint="synthetic", source={},
            sites={SITE: SiteStats(d=width, max_norm=1e6)},
            context=1, special_ids=(), shard_rows=shard_rows, batch_rows=shard_rows, n_tokens=rows, kept=rows,
            kept_share=1.0, shards=listed, done=True,
        )  # fmt: skip
        super().__init__(Path("synthetic"), manifest)
        self._made: dict[int, Tensor] = {}

    def aligned_block(self, index: int, sites: Sequence[str], split: Split = "all") -> dict[str, Float[Tensor, "n _"]]:
        """The tokens of one shard; the first of each `held_out_every` are held out."""
        if index not in self._made:
            self._made[index] = self.truth.tokens(self.shard_rows, FIRST_SEED + index)
        held_out = self.shard_rows // self.manifest.held_out_every
        rows = {"all": slice(None), "heldout": slice(held_out), "train": slice(held_out, None)}[split]
        return {site: self._made[index][rows] for site in sites}


def trained_as(sae: AnySAE) -> str | None:
    """The architecture that an SAE was trained as, by its metadata; None if it is none that can be trained here."""
    try:
        basis = as_basis(sae)
        name = str(basis.metadata.get("training_architecture") or basis.architecture)
        return architecture_name(TRANSCODERS.get(name, name))
    except (InvalidInputError, UnknownNameError):  # the former for a temporal SAE
        return None


def train_on_synthetic(architecture: str, training: SyntheticTraining | None = None) -> SyntheticReport:
    """Trains an SAE of this architecture where the true features are known, and says how many it found.

    It tells whether the way of training works where the assumptions of SAEs hold, and nothing about an SAE that was
    trained on something else.

    Raises:
        UnknownNameError: for an unknown architecture.
    """
    training = training or SyntheticTraining()
    config, truth = training.config(architecture), SyntheticTruth.make(training.world)
    shard_rows = min(50_000, max(2_000, config.tokens // 8))
    store = SyntheticStore(truth, shard_rows=shard_rows)
    with tempfile.TemporaryDirectory() as folder:
        sae = load_sae(train_sae(store, config, Path(folder) / "sae").path)
    return replace(evaluate_on_synthetic(sae, truth), trained=config.architecture)
