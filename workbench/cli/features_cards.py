"""The command that makes feature cards: features cards."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.cli.base import typed
from workbench.cli.saes import OneSAE
from workbench.core.errors import InvalidInputError
from workbench.core.numbers import counted

if TYPE_CHECKING:
    from workbench.features.cards.cardmaking import CardOptions
    from workbench.features.cards.cardset import CardSet

KEPT = ".rules"
"""Folder beside the cards with the rules of an unfinished set."""
UNIT = "features"
CONTROLS = {"shuffled": "that of another feature's rule", "top tokens": "that of the strongest tokens"}


@dataclass(frozen=True, kw_only=True)
class FeaturesCards(OneSAE):
    """Describe every feature: contexts, neighbours, tested rules.

    Each rule is tested on documents that it was not made from. Ctrl-C loses nothing: the same command continues.

    Example: workbench features cards sae
    """

    store: Path | None = None
    """Folder of activations stored at its site; by default what the SAE was trained on."""
    out: Path | None = None
    """Folder for the cards; by default cards/ in the SAE's folder, where `features show` and `serve` look."""
    table: Path | None = None
    """Folder of the feature table whose scores are put on the cards; by default the SAE's own, if it has one."""
    features: tuple[int, ...] = ()
    """Which features; by default all."""
    max_tokens: int = 1_000_000
    """Stored tokens that are read, from the start of the store."""
    no_explain: bool = False
    """Make no rules; making and testing them takes longer than all else."""
    no_check: bool = False
    """Take an SAE that does not fit the model's activations too."""

    def options(self) -> CardOptions:
        """What the library is called with."""
        from workbench.features.cards.cardmaking import CardOptions
        from workbench.features.explain.examples import ExampleOptions
        from workbench.features.passes.windows import WindowOptions

        windows = WindowOptions(max_tokens=self.max_tokens, seed=self.seed)
        return CardOptions(explain=not self.no_explain, windows=windows, examples=ExampleOptions(seed=self.seed))

    def run(self) -> None:
        """Makes the cards, saves them, and says what they hold."""
        from workbench.activations.store import open_store
        from workbench.engine.folder import require_local
        from workbench.features.cards.cardmaking import feature_cards
        from workbench.features.cards.cardset import CardSet
        from workbench.features.scores.table import FeatureTable
        from workbench.saes.formats.load import load_sae

        home, options = self.home(), self.options()
        store = open_store(self.store or home.require_store())
        place = self.table or (home.table if home.table.is_dir() else None)
        table = None if place is None else FeatureTable.load(place)
        folder = self.out or home.cards
        require_local(folder)
        self._spare(folder)
        model = self.load(check=True)
        sae = load_sae(self.sae_path(), model=model, check=not self.no_check)
        cards = feature_cards(model, sae, store, self.features or None, table, options, keep=folder / KEPT)
        lines = list(findings(CardSet.load(cards.save(folder))))
        shutil.rmtree(folder / KEPT, ignore_errors=True)
        self.emit(
            {"cards": folder, "features": len(cards), "findings": lines},
            [*lines, f"Cards: {folder}"],
            typed("features", "show", self.out or home.folder),
        )

    def _spare(self, folder: Path) -> None:
        """Refuses to put cards of some features in the place of cards of others."""
        from workbench.features.cards.cardset import CARDS_FILE, CardSet

        if not self.features or not (folder / CARDS_FILE).is_file():
            return
        lost = len(set(CardSet.load(folder).features) - set(self.features))
        if lost:
            raise InvalidInputError(
                f"{folder} holds {counted(lost, 'cards')} of features that are not among the {len(self.features)} "
                "asked for. Name another folder with --out, or delete it."
            )


def findings(cards: CardSet) -> Iterator[str]:
    """What a set of cards holds, in sentences."""
    from workbench.core.stats import SHARE, SIGNED_SHARE, paired_difference, sample_mean

    flags = Counter({"dead": 0, "dense": 0, "outlier": 0})
    tested, lacking = [], Counter[str]()
    for card in cards:
        for flag in card.flags:
            flags[flag.split(":")[0]] += 1
        if card.explanation is not None and card.explanation.scores:
            tested.append(card.explanation)
        elif card.explanation is not None:
            lacking[card.explanation.text] += 1
    counts = ", ".join(f"{n} {flag}" for flag, n in flags.items())
    read = counted(int(cards.meta["n_tokens"]), "tokens")
    yield f"{counted(len(cards), UNIT)}, {read} read: {counts}."
    for text, n in lacking.most_common(1):
        yield f"{counted(lacking.total(), UNIT)} without a rule, of which {n}: {text}."
    if not tested:
        return
    found = [e.scores["detection"].value for e in tested]
    accuracy = sample_mean(found, unit=UNIT, within=SHARE)
    line = f"Rules tell held-out windows with the feature from others: balanced accuracy {accuracy}"
    for control, name in CONTROLS.items():
        others = [e.controls.get(f"{control}: detection") for e in tested]
        pairs = [(a, b.value) for a, b in zip(found, others, strict=True) if b is not None]
        if pairs:
            less = paired_difference(*zip(*pairs, strict=True), unit=UNIT, within=SIGNED_SHARE)
            line += f"; {name} is lower by {less}"
    yield line + "."
