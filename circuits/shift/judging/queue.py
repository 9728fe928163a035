"""A queue of features for a person: in a notebook or on a page, blind to effects, kept after every verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from circuits.shift.deciders import Decision, TokenContext
from circuits.shift.effects import effects_on
from circuits.shift.judging.annotations import Annotation, read_annotations, save_annotations, timestamp
from circuits.shift.judging.page import QueueCard, QueuePage, queue_html
from circuits.shift.reading import dossiers_of, strongest
from circuits.shift.task import ShiftStudy
from workbench.core.arguments import checked
from workbench.core.atomic import write_atomic
from workbench.core.display import visible
from workbench.core.errors import DegenerateInputError, InvalidInputError, require_known
from workbench.core.html import Shown
from workbench.core.numbers import counted, number

if TYPE_CHECKING:
    import pandas as pd


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class JudgingQueue(Shown):
    """Features that wait for the verdict of one person; shows the next one.

    Every verdict is in the file before the next feature is shown. Another queue on the same file, with the same judge,
    continues where this one was left; verdicts of other judges in the file are kept and not shown.

    Attributes:
        cards: the features, in the order in which they are shown.
        path: the file of verdicts.
        judge: who judges.
        label_names: what the probe tells.
        spurious_names: what it should not use, () if that has no name.
    """

    cards: tuple[QueueCard, ...]
    path: Path
    judge: str
    label_names: tuple[str, ...]
    spurious_names: tuple[str, ...]

    def annotations(self) -> tuple[Annotation, ...]:
        """The verdicts of this judge on these features so far."""
        names = {card.feature for card in self.cards}
        return tuple(one for one in self._kept() if one.judge == self.judge and one.feature in names)

    def current(self) -> QueueCard | None:
        """The first feature without a verdict; None when all are judged."""
        done = {one.feature for one in self.annotations()}
        return next((card for card in self.cards if card.feature not in done), None)

    @checked
    def decide(self, verdict: Decision, rationale: str = "", *, feature: str | None = None) -> JudgingQueue:
        """Keeps a verdict on the current feature, or on a named one again, and returns the queue, which shows the next.

        Raises:
            DegenerateInputError: if every feature is judged and none is named.
            UnknownNameError: if the queue has no such feature.
        """
        card = self.current()
        if feature is None and card is None:
            raise DegenerateInputError(
                f"decide: all {len(self.cards)} features are judged. Name one with feature=... to judge it again."
            )
        if feature is not None:
            require_known("feature of this queue", feature, [card.feature for card in self.cards])
        name = feature or (card.feature if card else "")
        given = Annotation(
            feature=name, verdict=verdict, rationale=rationale, judge=self.judge, timestamp=timestamp()
        )  # fmt: skip
        save_annotations(self.path, [*self._kept(), given])
        return self

    @checked
    def take(self, path: str | Path) -> int:
        """Adds the verdicts of a file that the page exported; returns how many are on features of this queue.

        Raises:
            InvalidInputError: if none is.
        """
        names = {card.feature for card in self.cards}
        given = [one for one in read_annotations(path) if one.feature in names]
        if not given:
            raise InvalidInputError(
                f"{path} has no verdict on a feature of this queue. Export it on this queue's page."
            )
        save_annotations(self.path, [*self._kept(), *given])
        return len(given)

    @checked
    def save_page(self, path: str | Path) -> Path:
        """Writes the queue as one HTML file that needs no network, and that exports verdicts. Returns the path."""
        page = QueuePage(
            title=f"Features to judge: {' or '.join(self.label_names)}", question=self.question(), judge=self.judge,
            cards=self.cards, given=self.annotations(),
        )  # fmt: skip
        return write_atomic(path, queue_html(page))

    def question(self) -> str:
        """What is asked about each feature."""
        label = " or ".join(self.label_names)
        if self.spurious_names:
            spurious = " or ".join(self.spurious_names)
            return (
                f"A probe tells {label}. Does this feature tell {spurious} (spurious: it should not be used) or "
                f"{label} (intended)? If you can't say, it is unsure and stays."
            )
        return (
            f"A probe tells {label}. Is this feature about that (intended), or about something that only goes with it "
            "in these texts (spurious: it should not be used)? If you can't say, it is unsure and stays."
        )

    def frame(self) -> pd.DataFrame:
        """One row per feature: verdict and reason so far."""
        import pandas as pd

        given = {one.feature: one for one in self.annotations()}
        rows = [
            (card.feature, one.verdict if (one := given.get(card.feature)) else "", one.rationale if one else "")
            for card in self.cards
        ]
        return pd.DataFrame(rows, columns=["feature", "verdict", "rationale"])  # pyright: ignore[reportArgumentType]

    def _kept(self) -> tuple[Annotation, ...]:
        return read_annotations(self.path) if self.path.exists() else ()

    def _shown_line(self) -> str:
        left = len(self.cards) - len(self.annotations())
        return f"{number(left)} of {counted(len(self.cards), 'features')} to judge by {visible(self.judge)}"

    def _shown_parts(self) -> Iterable[Markup]:
        card = self.current()
        if card is None:
            yield Markup(
                "<p>All features are judged: circuits.shift(..., judge=circuits.AnnotatedDecider.of({}))</p>"
            ).format(visible(repr(str(self.path))))
            return
        yield Markup("<p>{}</p>").format(visible(self.question()))
        yield Markup("<p><strong>{}</strong>, active on {}</p>").format(
            visible(card.feature), counted(card.n_tokens, "tokens")
        )
        for context in card.contexts:
            yield Markup("<p>{}<mark>{}</mark>{}</p>").format(*map(visible, _parts(context)))
        yield Markup('<p class=\'muted\'>queue.decide("spurious", "why"), or "intended", or "unsure"</p>')


@checked
def judging_queue(study: ShiftStudy, path: str | Path, *, judge: str = "a person", seed: int = 0) -> JudgingQueue:
    """A queue of the features that SHIFT would put before a judge, for one person and one file of verdicts.

    The person sees neither effects nor labels of rows, and the order is drawn, so that it does not tell the effects
    either. Give a second person a queue with another `judge`, and another seed if the order should differ.

    Args:
        study: the texts once read; see `read_study`.
        path: the file of verdicts, which may exist.
        judge: who judges.
        seed: decides the order.
    """
    options, labels = study.options, study.task.train.label
    effects = effects_on(study, study.train, labels, options.attribution, options.attribution_rows)
    cards = [
        QueueCard.of(dossier) for dossier in dossiers_of(study, strongest(effects, options.top_k, options.min_effect))
    ]
    return JudgingQueue(
        cards=_drawn(cards, seed), path=Path(path), judge=judge, label_names=study.task.label_names,
        spurious_names=study.task.spurious_names,
    )  # fmt: skip


def _drawn(cards: Sequence[QueueCard], seed: int) -> tuple[QueueCard, ...]:
    """The cards in an order that depends on their names and the seed alone, not on that in which they come."""
    by_name = sorted(cards, key=lambda card: card.feature)
    return tuple(by_name[i] for i in np.random.default_rng(seed).permutation(len(by_name)))


def _parts(context: TokenContext) -> tuple[str, str, str]:
    return context.before, context.token, context.after
