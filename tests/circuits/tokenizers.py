"""Tokenizers of the kinds that behaviours meet: pieces with a space in front and bytes, and words without a space."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from circuits.behaviours.kinds import agreement
from circuits.behaviours.registry import SPLITS
from tests.tiny import tiny_tokenizer
from workbench.models.model import Model
from workbench.models.tiny import tiny_hf


def pieces_tokenizer(pieces: Iterable[str], digits: int = 1) -> PreTrainedTokenizerFast:
    """SentencePiece's kind: a space is part of the piece behind it; what no piece spells is spelled in bytes.

    Numbers are cut into `digits` digits each, from the left.
    """
    known = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *dict.fromkeys(pieces)]
    scores = [(piece, -20.0 if piece.startswith("<") or piece == "▁" else -1.0) for piece in known]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
            pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}"), "isolated"),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def words_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Whole words; spaces only part them."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *dict.fromkeys(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def model_with(tokenizer: PreTrainedTokenizerFast | None = None) -> Model:
    """A tiny model with this tokenizer, or with one that reads bytes."""
    tokenizer = tokenizer or tiny_tokenizer()
    return Model(tiny_hf("llama", len(tokenizer), 0), tokenizer, name="tiny")


def agreeing_model(plurals: bool = True) -> Model:
    """A model whose tokenizer has a piece for every word of agreement, or only singular ones."""
    nouns = [noun for split in SPLITS for noun in (*agreement.NOUNS[split].people, *agreement.NOUNS[split].things)]
    if plurals:
        forms = [form for noun in nouns for form in (noun, agreement.plural(noun))]
    else:
        forms = [noun for noun in nouns if agreement.plural(noun) == noun + "s"]
    verbs = [form for both in agreement.TRANSITIVES for form in both]
    words = [
        *forms,
        *verbs,
        *(verb.strip() for both in agreement.VERBS for verb in both),
        *agreement.PREPOSITIONS,
        "that",
        "the",
    ]
    return model_with(pieces_tokenizer(["The", "s", *(f"▁{word}" for word in words)]))
