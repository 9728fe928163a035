"""What the refusal study measured, arm by arm."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.display import OneLine
from workbench.core.stats import Estimate

BROKEN_NATS = 1.0
"""Replies this many nats per token less likely to the unsteered model than its own count as broken."""


@dataclass(frozen=True)
class Contrast:
    """Norms of the effects in the 2x2 of prompts and given replies.

    Attributes:
        reply: of refusing, which is the refusal direction.
        prompt: of a harmful prompt.
        interaction: of refusing a harmful prompt beyond both.
        simple: of the naive contrast, harmful with refusal minus harmless with compliance.
        cosine_simple_reply: cosine of the naive contrast with the refusal direction.
        n: prompts per cell.
    """

    reply: float
    prompt: float
    interaction: float
    simple: float
    cosine_simple_reply: float
    n: int


@dataclass(frozen=True, kw_only=True)
class RefusalArm(OneLine):
    """What one arm did on the test prompts.

    Attributes:
        name: of the arm.
        family: the kind of edit.
        strength: in the unit of the family.
        norm: mean norm that was added per edited token of the prompts.
        share: the same as a share of the mean residual norm there.
        control: name of the arm it is compared with.
        log_odds_harmful: log-odds (nats) that the reply to a harmful prompt begins with a refusal token.
        log_odds_harmless: the same after harmless prompts.
        change_harmful: difference from the unsteered model, paired by prompt; None where nothing was edited.
        change_harmless: the same for harmless prompts.
        control_harmful: difference from the control, paired by prompt.
        control_harmless: the same for harmless prompts.
        selective: change on harmful minus change on harmless prompts, paired by form; positive prefers harmful ones.
        refused_harmful: share of replies to harmful prompts that hold a refusal phrase.
        refused_harmless: the same for harmless prompts: over-refusal.
        kl_harmless: KL (nats) of the first token from the unsteered model, harmless prompts.
        text_loss: loss on plain text, nats per token.
        text_change: its difference from the unsteered model.
        reply_nats: loss of the replies under the unsteered model, nats per token: coherence.
        reply_change: its difference from the unsteered model's own replies.
        distinct_2: share of different bigrams within a reply.
        example_harmful: reply to the first harmful prompt.
        example_harmless: reply to the first harmless prompt.
    """

    name: str
    family: str
    strength: float
    norm: float
    share: float
    control: str | None
    log_odds_harmful: Estimate
    log_odds_harmless: Estimate
    change_harmful: Estimate | None = None
    change_harmless: Estimate | None = None
    control_harmful: Estimate | None = None
    control_harmless: Estimate | None = None
    selective: Estimate | None = None
    refused_harmful: Estimate
    refused_harmless: Estimate
    kl_harmless: Estimate | None = None
    text_loss: Estimate
    text_change: Estimate | None = None
    reply_nats: Estimate | None = None
    reply_change: Estimate | None = None
    distinct_2: Estimate | None
    example_harmful: str
    example_harmless: str

    @property
    def broken(self) -> bool:
        """Whether the replies are text that the unsteered model finds far less likely than its own."""
        return self.reply_change is not None and self.reply_change.low > 0 and self.reply_change.value > BROKEN_NATS
