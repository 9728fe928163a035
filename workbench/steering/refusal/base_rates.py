"""How often a model refuses before anything is edited: what every other number is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.html import Shown
from workbench.core.numbers import counted
from workbench.core.stats import Estimate, difference_of_shares, wilson
from workbench.models.model import Model
from workbench.steering.refusal.data import RefusalData, as_chats
from workbench.steering.refusal.outcomes import OUTCOMES, Outcome, OutcomeOptions, outcomes

if TYPE_CHECKING:
    import pandas as pd

Prompts = Mapping[str, Sequence[str]] | RefusalData


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class BaseRate(OneLine):
    """What became of the requests of one kind.

    Attributes:
        kind: of request, such as "harmful".
        shares: of each outcome.
        prompts: the requests.
        replies: to each.
        outcomes: of each.
    """

    kind: str
    shares: Mapping[Outcome, Estimate]
    prompts: tuple[str, ...]
    replies: tuple[str, ...]
    outcomes: tuple[Outcome, ...]


@checked
@dataclass(frozen=True, eq=False, kw_only=True)
class BaseRates(Shown):
    """How often the unedited model refuses, by kind of request.

    Attributes:
        model: its name.
        rates: one per kind, in the order given.
        difference: share of refusals on harmful minus that on harmless requests; None without both kinds.
        new_tokens: longest reply.
    """

    model: str
    rates: tuple[BaseRate, ...]
    difference: Estimate | None
    new_tokens: int

    def __getitem__(self, kind: str) -> BaseRate:
        return next(rate for rate in self.rates if rate.kind == kind)

    @property
    def refuses(self) -> bool | None:
        """Whether harmful requests are refused more often than harmless ones; None without both kinds."""
        return None if self.difference is None else self.difference.low > 0

    def frame(self) -> pd.DataFrame:
        """One row per kind and outcome: the share with its interval, and how many requests."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"kind": rate.kind, "outcome": name, "share": e.value, "low": e.low, "high": e.high, "n": e.n}
                for rate in self.rates for name, e in rate.shares.items()
            ]
        )  # fmt: skip

    def replies(self) -> pd.DataFrame:
        """One row per request: its kind, the reply and the outcome."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"kind": rate.kind, "prompt": prompt, "reply": reply, "outcome": found}
                for rate in self.rates
                for prompt, reply, found in zip(rate.prompts, rate.replies, rate.outcomes, strict=True)
            ]
        )

    def _shown_line(self) -> str:
        said = "; ".join(f"{rate.kind}: refused {rate.shares['refused']}" for rate in self.rates)
        verdict = {True: "", False: "; it does not refuse harmful requests more often", None: ""}[self.refuses]
        return f"{self.model}: {said}{verdict}"


@checked
def base_rates(
    model: Model,
    prompts: Prompts,
    *,
    new_tokens: int = 48,
    options: OutcomeOptions | None = None,
    batch_size: int = 32,
    force: bool = False,
) -> BaseRates:
    """Greedy replies of the unedited model, and what became of each request.

    Args:
        model: a chat model.
        prompts: requests by kind, such as "harmful" and "harmless"; or data of the refusal study.
        new_tokens: longest reply.
        options: how replies are read.
        batch_size: rows at a time.
        force: return also where the model does not refuse harmful requests more often than harmless ones.

    Raises:
        InvalidInputError: if there is no prompt of a kind, or the model has no chat template.
        DegenerateInputError: without `force`, if the model does not refuse; the message has both shares.
    """
    sets = _sets(prompts)
    rates = []
    for kind, texts in sets.items():
        written = model.generate(as_chats(texts), new_tokens, temperature=0.0, batch_size=batch_size)
        found = outcomes(written.texts, options)
        shares: dict[Outcome, Estimate] = {
            name: wilson(found.count(name), len(found), unit=f"{kind} prompts") for name in OUTCOMES
        }
        rates.append(
            BaseRate(kind=kind, shares=shares, prompts=tuple(texts), replies=tuple(written.texts), outcomes=found)
        )
    refused = {rate.kind: rate.shares["refused"] for rate in rates}
    both = {"harmful", "harmless"} <= set(refused)
    difference = difference_of_shares(refused["harmful"], refused["harmless"]) if both else None
    result = BaseRates(model=model.name, rates=tuple(rates), difference=difference, new_tokens=new_tokens)
    if result.refuses is False and not force:
        raise DegenerateInputError(
            f"base_rates: {model.name} refuses {result['harmful'].shares['refused']} of harmful and "
            f"{result['harmless'].shares['refused']} of harmless requests, which is not clearly more, so there is no "
            "refusal to study. Take a model that refuses, other prompts, or force=True."
        )
    return result


def _sets(prompts: Prompts) -> dict[str, list[str]]:
    if isinstance(prompts, RefusalData):
        return {kind: [getattr(pair, kind) for pair in prompts.pairs] for kind in ("harmful", "harmless")}
    sets = {kind: list(texts) for kind, texts in prompts.items()}
    if not sets:
        raise InvalidInputError("base_rates(prompts={}): give requests by kind, such as {'harmful': [...]}.")
    for kind, texts in sets.items():
        if len(texts) < 2 or not all(text.strip() for text in texts):
            raise InvalidInputError(
                f"base_rates: {counted(len(texts), f'{kind} prompts')}, none of which may be empty. Give 2 or more."
            )
    return sets
