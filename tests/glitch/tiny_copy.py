"""A tiny model with words in its vocabulary, and stand-ins for models that say some tokens and not others."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.glitch.tiny_vocab import SPECIAL, WORDS, byte_level, matrix
from workbench.core.codec import FastCodec
from workbench.core.tokens import TokenBatch
from workbench.glitch.verification.probing import SHORT
from workbench.glitch.verification.prompts import PROMPTS, Template, prompt_set, template
from workbench.glitch.vocabulary.tokenizer import analyse
from workbench.models.model import Model
from workbench.models.tiny import D_MODEL, tiny_hf

BACKEND = byte_level()
N = BACKEND.get_vocab_size()
AT = BACKEND.token_to_id
CODEC = FastCodec.of(BACKEND)
VOCABULARY = analyse(CODEC)
PADDING = list(range(N, N + 6))
PLANTED = [AT(word) for word in (WORDS[0], WORDS[4], "Ġ" + WORDS[6])]


def _encode(text: str) -> list[int]:
    return CODEC.encode([text])[0]


SHORT_IDS = template(SHORT, VOCABULARY, _encode)
LONG_IDS = tuple(template(prompt, VOCABULARY, _encode) for prompt in PROMPTS)


class Parrot(Model):
    """Gives the token in the first slot of any known prompt the probability that `says` names, else `usual`."""

    dtype = torch.float32
    fingerprint = "parrot"

    def __init__(self, says: dict[int, float], usual: float = 0.5, known: tuple[Template, ...] = ()) -> None:
        self.says, self.usual = says, usual
        self.rows: list[tuple[int, int]] = []
        self.stop_after: int | None = None
        self.slots = {len(t.ids): int(t.slots[0]) for t in (SHORT_IDS, *LONG_IDS, *known)}

    def logits(self, batch: TokenBatch, keep: str = "all") -> Tensor:
        assert keep == "last"
        width = batch.ids.shape[1]
        steps = next(k for k in range(3) if width - k in self.slots)
        asked = batch.ids[:, self.slots[width - steps]].tolist()
        if self.stop_after is not None and len(self.rows) + len(asked) > self.stop_after:
            raise KeyboardInterrupt
        self.rows += [(i, width - steps) for i in asked]
        p = torch.full((len(batch), N), 1e-9)
        p[:, 0] = 1.0
        for row, i in enumerate(asked):
            value = self.says.get(i, self.usual)
            p[row, i], p[row, 0] = value, 1 - value
        return p.log()

    def tokens_run(self, width: int | None = None) -> list[int]:
        """Ids in the order in which they were run, of prompts of one length or of all."""
        return [i for i, wide in self.rows if width in (None, wide)]


def wordy_model(family: str = "llama", seed: int = 0) -> Model:
    """A random model whose vocabulary has words, six padding rows and three planted rows beside them."""
    hf = tiny_hf(family, N + len(PADDING), seed)
    with torch.no_grad():
        rows = matrix(N + len(PADDING), [*PADDING, *PLANTED], seed=seed, width=D_MODEL, noise=0.01)
        hf.get_output_embeddings().weight.copy_(0.4 * rows)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=SPECIAL, pad_token=SPECIAL)
    return Model(hf, tokenizer, name=f"wordy-{family}")


def saved(path: Path, model: Model) -> Path:
    """The model as a folder."""
    model.hf.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


def slow_best(model: Model, token: int, prompts: tuple = (SHORT, *PROMPTS), steps: int = 3) -> float:
    """Highest probability of one token, one prompt and one greedy step at a time, without any cache."""
    vocabulary, best = analyse(FastCodec.of(model.tokenizer.backend_tokenizer)), 0.0
    for k, made in enumerate(prompt_set(model, vocabulary, prompts, "raw", strict=True).templates):
        row = made.fill(torch.tensor([token]))
        for _ in range(1 if prompts[k] is SHORT else steps):
            logits = model.logits(TokenBatch.of_rows(row), keep="last")
            best = max(best, float(logits.softmax(1)[0, token]))
            row = torch.cat([row, logits.argmax(1)[:, None]], 1)
    return best
