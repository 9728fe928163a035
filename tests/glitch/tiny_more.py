"""More tiny tokenizers: Unigram, WordPiece, and byte fallback with merges; and a scan of any of them."""

from __future__ import annotations

from dataclasses import replace

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.glitch.tiny_vocab import WORDS
from workbench.core.codec import Codec, FastCodec
from workbench.glitch.scanning.saved import SavedScan, of_tokenizer

HOSTILE = ("\u202eevil", "a\nb", "<script>alert(1)</script>", "\"'`", "a\x00b", "\u2028", "=1+1", "\x1b[2J")


def unigram() -> Tokenizer:
    """Metaspace Unigram with byte fallback."""
    pieces = [("<unk>", 0.0)] + [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    pieces += [(char, -8.0) for char in "▁abcdefghijklmnopqrstuvwxyz"]
    pieces += [(f"▁{word}", -5.0) for word in WORDS] + [(word, -6.0) for word in WORDS]
    pieces += [("alph", -7.0), ("▁del", -7.0), ("ta", -7.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def wordpiece() -> Tokenizer:
    """WordPiece, lower-casing, without bytes."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2}
    for char in "abcdefghijklmnopqrstuvwxyz.,!":
        vocab[char] = len(vocab)
        vocab[f"##{char}"] = len(vocab)
    for word in (*WORDS, "alph", "##pha", "##ta", "del"):
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("[PAD]", "[UNK]", "[CLS]")])
    return tokenizer


def scan_with(
    tokenizer: Tokenizer, grades: dict[str, str], model: str = "tiny", low: tuple[str, ...] = ()
) -> tuple[SavedScan, Codec]:
    """A scan of the tokenizer alone in which the named raw tokens have a grade, and `low` a low indicator without one."""
    codec = FastCodec.of(tokenizer)
    base = of_tokenizer(codec, model)
    facts = {i: replace(fact, indicator=0.5 + 1e-4 * i) for i, fact in base.tokens.items()}
    facts |= {i: replace(facts[i], indicator=0.1) for i in map(codec.raw.index, low)}
    for raw, grade in grades.items():
        i = codec.raw.index(raw)
        old = facts[i]
        values = {
            "verified": (0.0005, "strong_verified"),
            "borderline": (0.05, "borderline"),
            "rejected": (0.5, "weak_rejected"),
        }
        p, verdict = values.get(grade, (float("nan"), "untested"))
        facts[i] = replace(
            old, indicator=0.1, max_prob=p, verdict=verdict, candidate=grade != "reference",
            reference=grade == "reference",
        )  # fmt: skip
    return replace(base, origin="made for a test", tokens=facts, ranked=True, vocabulary=""), codec
