"""The page of a judging queue: one file that needs no network, keeps verdicts in the browser, and exports them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from markupsafe import Markup

from circuits.shift.deciders import FeatureDossier, TokenContext
from circuits.shift.judging.annotations import Annotation
from workbench.core.arguments import checked
from workbench.core.display import OneLine, visible
from workbench.report.features.render import inline_source, page_template, safe_json, theme

_FOLDER = Path(__file__).parent


@checked
@dataclass(frozen=True, kw_only=True)
class QueueCard(OneLine):
    """What a person is shown of a feature: where it is active, and not what it does to the probe.

    Attributes:
        feature: its name.
        tokens: tokens on which it is most active.
        contexts: the same with the text around them, one per text.
        n_tokens: tokens of the training texts on which it is active.
    """

    feature: str
    tokens: tuple[str, ...]
    contexts: tuple[TokenContext, ...]
    n_tokens: int

    @classmethod
    def of(cls, dossier: FeatureDossier) -> QueueCard:
        """The card of a dossier, without effects, activations, labels and shares."""
        tokens = tuple(token for token, _ in dossier.top_tokens)
        return cls(
            feature=str(dossier.node), tokens=tokens, contexts=dossier.contexts, n_tokens=dossier.n_tokens
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QueuePage:
    """What a page shows.

    Attributes:
        title: of the page.
        question: what is asked about each feature.
        judge: who judges.
        cards: the features in order.
        given: verdicts that were given before.
    """

    title: str
    question: str
    judge: str
    cards: Sequence[QueueCard]
    given: Sequence[Annotation]


def queue_html(page: QueuePage) -> str:
    """The page as text."""
    data = {
        "judge": page.judge,
        "cards": [
            {"feature": card.feature, "n": card.n_tokens,
             "contexts": [[visible(c.before), visible(c.token), visible(c.after)] for c in card.contexts]}
            for card in page.cards
        ],
        "given": [asdict(one) for one in page.given],
    }  # fmt: skip
    style, script = theme() + _read("queue.css"), _read("queue.js")
    policy = (
        f"default-src 'none'; script-src {inline_source(script)}; style-src {inline_source(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return page_template(_read("queue.html.jinja")).render(
        title=page.title, question=page.question, judge=page.judge, policy=policy, style=Markup(style),
        script=Markup(script), data=Markup(safe_json(data)),
    )  # fmt: skip


@functools.cache
def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
