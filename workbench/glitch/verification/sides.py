"""Which side of a token is broken: can the model read it, and can it write it? Compared with other tokens' spelling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.controls.area import chance_above
from workbench.core.codec import Codec, token_bytes
from workbench.core.errors import DegenerateInputError
from workbench.core.metrics import kl_divergence
from workbench.core.progress import task
from workbench.core.stats import Estimate, clopper_pearson
from workbench.core.tokens import TokenBatch
from workbench.glitch.verification.prompts import Template, TokenPrompt, prompt_set
from workbench.glitch.verification.scoring import target_probabilities
from workbench.glitch.verification.verify import Outcome, Outcomes
from workbench.glitch.vocabulary.segments import Pieces, Speller
from workbench.glitch.vocabulary.tokenizer import Vocabulary
from workbench.models.model import Model

Broken = Literal["input", "output", "both", "neither", "unknown"]
BROKEN: dict[str, str] = {
    "input": "cannot be read, can be written: its input row is broken",
    "output": "can be read, cannot be written: its output row is broken",
    "both": "can neither be read nor written",
    "neither": "read and written as ordinary tokens are",
    "unknown": "no other tokens spell it, or one of the two measures does not work on this model",
}
READ = (
    TokenPrompt("next", "", "The next line of the list is\n{token}", "{token}"),
    TokenPrompt("meaning", "", "Another way to say «{token}» is «", "{token}"),
    TokenPrompt("letter", "", "Spelled letter by letter, «{token}» begins with the letter «", "{token}"),
)
"""Texts that go on in a way that depends on what the token says."""
WRITE = (
    TokenPrompt("pair", "What stands on the left stands on the right once more.\n«river» «river»\n"
                "« seventeen» « seventeen»\n«Mountain» «Mountain»\n« window» « window»\n", "«{token}»", " «{token}»"),
    TokenPrompt("again", "", "The sign says «{token}». I read it to you: it says «", "{token}"),
)  # fmt: skip
"""Texts that ask for the token after its text was shown in other tokens."""
LEVEL = 0.05
"""Share of ordinary tokens that each of the two measures calls broken."""
MIN_AUC, MIN_CONTROLS = 0.9, 19
"""A measure is used if it tells a token from another one this well on the controls, and has so many of them."""


@dataclass(frozen=True, kw_only=True)
class Side(Outcome):
    """Reading and writing of one token.

    Attributes:
        pieces: the tokens that write the same text; empty if there are none.
        read_kl: KL divergence (nats, mean over the texts) of what follows the token from what follows its pieces.
        read_agreement: share of the texts in which both make the same token the most probable one.
        write_logp: highest log-probability (nats) of the token where its text was shown in pieces.
    """

    pieces: Pieces
    read_kl: float
    read_agreement: float
    write_logp: float
    broken: Broken


@dataclass(frozen=True, kw_only=True)
class Sides(Outcomes[Side]):
    """Reading and writing of tokens and controls.

    Attributes:
        read_limit: a token is not read if its divergence is above this quantile (1 - `LEVEL`) of the controls; nan if
            reading can't be judged.
        write_limit: it is not written if its log-probability is below this quantile (`LEVEL`) of the controls.
        read_auc: chance that a control lies closer to its own pieces than to those of another control.
        write_auc: chance that after a control's pieces the control is more probable than another one is elsewhere.
        n_controls: controls that other tokens spell.
        failing: share of these controls called not read, and not written (about `LEVEL` each, by construction).
    """

    read_limit: float
    write_limit: float
    read_auc: float
    write_auc: float
    n_controls: int
    failing: dict[str, Estimate]

    def count(self, broken: Broken) -> int:
        """Number of candidates with this result."""
        return sum(side.broken == broken for side in self.candidates)


@dataclass(frozen=True, eq=False)
class _Measured:
    """Columns over tokens; nan where no other tokens spell one. `other_*`: the same against the token before it."""

    kl: np.ndarray
    agreement: np.ndarray
    logp: np.ndarray
    other_kl: np.ndarray
    other_logp: np.ndarray


def measure_sides(
    model: Model, codec: Codec, vocabulary: Vocabulary, candidates: Sequence[int], controls: Sequence[int],
    suspects: Sequence[int] = (), batch_size: int = 32,
) -> Sides:  # fmt: skip
    """Reading and writing of candidates, judged by random ordinary tokens.

    Reading: the next-token distribution after the token is compared with the one after other tokens that spell the same
    text, in a few texts. A token whose input row was never trained leads elsewhere. Writing: its text is shown in those
    other tokens, and the model is asked for it; what is measured is the probability of the token itself, so an input
    row that was never trained does no harm. How far ordinary tokens go in both is the measure of what is broken.
    Candidates and suspects are never used as pieces.

    Raises:
        DegenerateInputError: if none of the texts can be built for this tokenizer.
    """
    allowed = vocabulary.ordinary
    allowed[[i for i in (*candidates, *suspects) if i < len(allowed)]] = False
    allowed[getattr(model, "d_vocab", len(allowed)) :] = False
    texts = token_bytes(model.tokenizer)
    speller = Speller(texts[: len(allowed)], allowed)
    try:
        frames = [prompt_set(model, vocabulary, prompts, "raw").templates for prompts in (READ, WRITE)]
    except DegenerateInputError as error:
        raise DegenerateInputError(
            f"Reading and writing can't be told apart with this tokenizer; leave this part out. {error}"
        ) from error
    parts = []
    with task(total=len(candidates) + len(controls), description="read and write", unit="tokens") as running:
        for ids in (candidates, controls):
            pieces = [_pieces(codec, texts, speller, i) for i in ids]
            parts.append((ids, pieces, _measure(model, frames, ids, pieces, batch_size, running.advance)))
    return _judged(parts)


def _pieces(codec: Codec, texts: Sequence[bytes], speller: Speller, i: int) -> Pieces:
    pieces = speller(texts[i], without=i) if i < len(texts) and texts[i] else None
    if pieces is None or len(pieces) < 2:
        return ()
    anchor = codec.encode(["a"])[0]
    whole, parts = codec.decode([[*anchor, i], [*anchor, *pieces]])
    return pieces if whole == parts else ()


def _measure(
    model: Model, frames: Sequence[tuple[Template, ...]], ids: Sequence[int], pieces: Sequence[Pieces], batch_size: int,
    advance: Callable[[int], None],
) -> _Measured:  # fmt: skip
    """Both measures of some tokens; the token before each, in the batch, plays the other one."""
    read, write = frames
    columns = [np.full(len(ids), np.nan) for _ in range(5)]
    spelled = [k for k, spelling in enumerate(pieces) if spelling]
    advance(len(ids) - len(spelled))
    for start in range(0, len(spelled), batch_size):
        part = spelled[start : start + batch_size]
        tokens, spellings = torch.tensor([ids[k] for k in part]), [pieces[k] for k in part]
        reads = zip(*(_read(model, made, tokens, spellings) for made in read), strict=True)
        kl, same, other_kl = (torch.stack(each).float().mean(0) for each in reads)
        writes = zip(*(_written(model, made, tokens, spellings) for made in write), strict=True)
        logp, other_logp = (torch.stack(each).amax(0) for each in writes)
        if len(part) == 1:  # no other token to compare with
            other_kl = other_logp = torch.full((1,), torch.nan)
        for column, values in zip(columns, (kl, same, logp, other_kl, other_logp), strict=True):
            column[part] = values.double().numpy()
        advance(len(part))
    return _Measured(*columns)


def _read(
    model: Model, made: Template, tokens: Int[Tensor, " n"], pieces: Sequence[Pieces]
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence from the own pieces, whether the most probable token agrees, and divergence from another's pieces."""
    with_pieces = _logits(model, [made.spelled(spelling) for spelling in pieces])
    with_token = _logits(model, made.fill(tokens).tolist())
    same = with_pieces.argmax(1) == with_token.argmax(1)
    return kl_divergence(with_pieces, with_token), same, kl_divergence(with_pieces.roll(1, 0), with_token)


def _written(
    model: Model, made: Template, tokens: Int[Tensor, " n"], pieces: Sequence[Pieces]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-probability of each token behind its pieces, and behind those of another one."""
    logits = _logits(model, [made.spelled(spelling) for spelling in pieces])
    return target_probabilities(logits, tokens).log(), target_probabilities(logits, tokens.roll(1)).log()


def _logits(model: Model, rows: Sequence[Sequence[int]]) -> Float[Tensor, "n d_vocab"]:
    # The id of the padding does not matter behind the mask, so it is one that every model has.
    return model.logits(TokenBatch.pad(rows, pad_id=rows[0][0]), keep="last").float().cpu()


def _judged(parts: Sequence[tuple[Sequence[int], Sequence[Pieces], _Measured]]) -> Sides:
    ordinary = parts[1][2]
    kl, logp = (x[np.isfinite(x)] for x in (ordinary.kl, ordinary.logp))
    read_auc, write_auc = _auc(kl, ordinary.other_kl), _auc(-logp, -ordinary.other_logp)
    n, read_limit, write_limit = len(kl), float("nan"), float("nan")
    if n >= MIN_CONTROLS:
        read_limit = float(np.quantile(kl, 1 - LEVEL)) if read_auc >= MIN_AUC else read_limit
        write_limit = float(np.quantile(logp, LEVEL)) if write_auc >= MIN_AUC else write_limit
    tested = []
    for control, (ids, pieces, values) in zip((False, True), parts, strict=True):
        for k, i in enumerate(ids):
            kl_k, agreement, logp_k = (float(column[k]) for column in (values.kl, values.agreement, values.logp))
            broken = which(kl_k - read_limit, write_limit - logp_k)
            tested.append(Side(
                token_id=int(i), control=control, pieces=pieces[k], read_kl=kl_k, read_agreement=agreement,
                write_logp=logp_k, broken=broken,
            ))  # fmt: skip
    beyond = {"read": int((kl > read_limit).sum()), "write": int((logp < write_limit).sum())} if n else {}
    return Sides(
        tuple(tested), read_limit=read_limit, write_limit=write_limit, read_auc=read_auc, write_auc=write_auc,
        n_controls=n, failing={name: clopper_pearson(k, n, unit="control tokens") for name, k in beyond.items()},
    )  # fmt: skip


def _auc(own: np.ndarray, other: np.ndarray) -> float:
    other = other[np.isfinite(other)]
    return chance_above(other, own) if len(own) and len(other) else float("nan")


def which(read_excess: float, write_lack: float) -> Broken:
    """The broken side, from how far each measure lies beyond its limit; nan is not known.

    >>> which(1.0, -1.0), which(-1.0, 1.0), which(1.0, 1.0), which(-1.0, -1.0), which(float("nan"), 1.0)
    ('input', 'output', 'both', 'neither', 'unknown')
    """
    if np.isnan(read_excess) or np.isnan(write_lack):
        return "unknown"
    if read_excess > 0:
        return "both" if write_lack > 0 else "input"
    return "output" if write_lack > 0 else "neither"
