"""What a model's generation settings say about which tokens may come, by transformers' own processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.core.errors import InvalidInputError
from workbench.models.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel


RULES = (
    "sequence_bias", "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
"""Settings that every generation obeys, in the order in which transformers applies them."""

_NO_CHOICE = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "stop_strings", "max_length",
    "max_new_tokens", "use_cache", "transformers_version", "do_sample", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "cache_implementation", "disable_compile",
)  # fmt: skip
"""Settings that are honoured elsewhere, are arguments of every call, or choose no token."""


class FolderRules:
    """The rules of a model's generation settings, for one job.

    Each row is judged by its own tokens, without padding, so the rules do not depend on its batch.
    """

    def __init__(self, settings: dict[str, object], options: Sampling, device: torch.device) -> None:
        self._settings, self._max_new_tokens = settings, options.max_new_tokens
        self._stop = torch.tensor(options.stop_at, dtype=torch.long, device=device)
        self._device = device
        self._by_length: dict[int, Any] = {}

    @classmethod
    def of(cls, hf: PreTrainedModel, options: Sampling, device: torch.device) -> FolderRules | None:
        """The rules of this model; None if it has none."""
        settings = {name: value for name in RULES if (value := _set(hf, name)) is not None}
        return cls(settings, options, device) if settings else None

    def __call__(
        self,
        ids: Int[Tensor, "batch columns"],
        mask: Bool[Tensor, "batch columns"],
        n_new: int,
        logits: Float[Tensor, "batch vocab"],
    ) -> Float[Tensor, "batch vocab"]:
        """Logits after the rules; those of tokens that may not come are -inf.

        Args:
            ids: left-padded tokens up to now, `n_new` of them generated.
            mask: True at real tokens.
            n_new: number of generated tokens.
            logits: of the next token; not changed.

        Raises:
            InvalidInputError: for a setting that transformers can't use.
        """
        scores, padding = logits.clone(), (~mask).sum(1)
        try:
            for pad in padding.unique().tolist():
                rows = (padding == pad).nonzero().squeeze(1)
                own = ids[rows, pad:]
                for processor in self._processors(own.shape[1] - n_new):
                    scores[rows] = processor(own, scores[rows])
        except (ValueError, TypeError, IndexError) as error:
            raise InvalidInputError(
                f"The model's generation settings can't be used: {error}. Correct model.hf.generation_config, or "
                f"generation_config.json in its folder; set are {', '.join(self._settings)}."
            ) from error
        return scores

    def _processors(self, prompt_length: int) -> Sequence[Any]:
        if prompt_length not in self._by_length:
            made = [self._processor(name, value, prompt_length) for name, value in self._settings.items()]
            self._by_length[prompt_length] = [processor for processor in made if processor is not None]
        return self._by_length[prompt_length]

    def _processor(self, name: str, value: Any, prompt_length: int) -> Any:
        import transformers

        g: Any = transformers  # whose annotations of devices are narrower than what it takes
        device, stop, has_stop = self._device, self._stop, bool(len(self._stop))
        if name == "sequence_bias":
            return g.SequenceBiasLogitsProcessor(value)
        if name == "no_repeat_ngram_size":
            return g.NoRepeatNGramLogitsProcessor(value) if value > 0 else None
        if name == "bad_words_ids":
            return g.NoBadWordsLogitsProcessor(value, stop)
        if name == "min_length":
            return g.MinLengthLogitsProcessor(value, stop, device) if value > 0 and has_stop else None
        if name == "min_new_tokens":
            made = g.MinNewTokensLengthLogitsProcessor
            return made(prompt_length, value, stop, device) if value > 0 and has_stop else None
        if name == "forced_bos_token_id":
            return g.ForcedBOSTokenLogitsProcessor(value)
        if name == "forced_eos_token_id":
            return g.ForcedEOSTokenLogitsProcessor(prompt_length + self._max_new_tokens, value, device)
        if name == "exponential_decay_length_penalty":
            return g.ExponentialDecayLengthPenalty(tuple(value), stop, prompt_length) if has_stop else None
        if name == "suppress_tokens":
            return g.SuppressTokensLogitsProcessor(value, device)
        begins = prompt_length + (prompt_length == 1 and "forced_bos_token_id" in self._settings)
        return g.SuppressTokensAtBeginLogitsProcessor(value, begins, device)


def left_aside(hf: PreTrainedModel) -> str:
    """A sentence about the generation settings of a model that its generations do not follow; empty if there are none.

    Temperature, filters and penalties are arguments of each call, so that two models are sampled alike.
    """
    config = getattr(hf, "generation_config", None)
    if config is None:
        return ""
    skipped = {
        name: value
        for name, value in config.to_diff_dict().items()
        if not name.startswith("_") and name not in (*RULES, *_NO_CHOICE) and value is not None
    }
    if not skipped:
        return ""
    return "left aside of the model's generation settings: " + ", ".join(f"{k}={v}" for k, v in skipped.items())


def stop_strings(hf: PreTrainedModel) -> tuple[str, ...]:
    """Strings that end a text by the model's generation settings."""
    found = _set(hf, "stop_strings") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _set(hf: PreTrainedModel, name: str) -> Any:
    return getattr(getattr(hf, "generation_config", None), name, None)
