from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.glitch.tiny_more import wordpiece
from tests.glitch.tiny_vocab import N_UNUSED, SPECIAL, WORDS, byte_level, sentencepiece
from workbench.core.codec import FastCodec, bytes_of, codec_in, codec_of, token_bytes
from workbench.core.errors import MissingFileError
from workbench.glitch.vocabulary.tokenizer import IMPOSSIBLE_BYTES, Survival, analyse
from workbench.models.model import Model


def test_byte_level_categories_are_exact() -> None:
    tokenizer = byte_level()
    vocabulary = analyse(FastCodec.of(tokenizer))
    at = tokenizer.token_to_id
    assert vocabulary.category[at(SPECIAL)] == "special"
    assert {vocabulary.category[at(word)] for word in WORDS} == {"ok"}
    assert {vocabulary.category[at(f"Ġ{word}")] for word in WORDS} == {"ok"}
    assert vocabulary.text[at("Ġalpha")] == " alpha"
    assert vocabulary.category.count("partial_utf8") == 128  # bytes 80 to FF, alone
    assert vocabulary.text[at("Ã")] == "<0xC3>"
    assert int(vocabulary.reserved.sum()) == N_UNUSED and vocabulary.reserved[at("<unused3>")]
    assert vocabulary.missing_bytes == () and vocabulary.lossy == ()
    assert sum(vocabulary.byte >= 0) == 256


def test_a_merge_that_the_rules_never_reach_is_unreachable() -> None:
    tokenizer = byte_level()
    vocab = tokenizer.get_vocab()
    plain = {token: i for token, i in vocab.items() if not token.startswith("<unused") and token != SPECIAL}
    plain = {token: k for k, token in enumerate(sorted(plain, key=plain.__getitem__))}
    plain["qqq"] = len(plain)
    orphan = type(tokenizer)(models.BPE(vocab=plain, merges=[]))
    orphan.pre_tokenizer, orphan.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    vocabulary = analyse(FastCodec.of(orphan))
    assert vocabulary.category[plain["qqq"]] == "unreachable_multi"
    assert vocabulary.category[plain["q"]] == "ok"


def test_missing_bytes_are_found_lossy_only_where_text_holds_them() -> None:
    # U+0104 stands for byte 04 and U+00F1 for byte F1; ÿ stands for FF, which no text holds
    vocabulary = analyse(FastCodec.of(byte_level(missing=("Ą", "ñ", "ÿ"))))
    assert vocabulary.missing_bytes == (0x04, 0xF1, 0xFF)
    assert [item.byte for item in vocabulary.lossy] == [0x04, 0xF1]
    assert (vocabulary.lossy[0].text, vocabulary.lossy[0].back) == ("a\x04b", "ab")


def test_sentencepiece_tokens_are_judged_with_the_space_that_they_have_in_text() -> None:
    tokenizer = sentencepiece()
    vocabulary = analyse(FastCodec.of(tokenizer))
    at = tokenizer.token_to_id
    assert vocabulary.adds_space and vocabulary.style == "byte_fallback"
    for word in WORDS:
        assert vocabulary.category[at(word)] == "ok", word
        assert vocabulary.category[at(f"▁{word}")] == "ok", word
    assert (vocabulary.text[at("alpha")], vocabulary.text[at("▁alpha")]) == ("alpha", " alpha")
    assert vocabulary.category[at("zq")] == "unreachable_multi"
    assert vocabulary.category[at("<0x61>")] == "unreachable_single"  # text "a" has its own token
    assert vocabulary.category[at("<0x41>")] == "ok"  # "A" has none
    assert vocabulary.category[at("<0xE2>")] == "partial_utf8"
    assert vocabulary.byte[at("<0xE2>")] == 0xE2
    assert vocabulary.lossy == ()


def _stripping(normalizer: object, pre_tokenizer: object, *, metaspace: bool) -> Tokenizer:
    """Spaces as ▁ without one put in front of a text, and a decoder that strips one all the same."""
    tokenizer = sentencepiece()
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    if metaspace:
        tokenizer.decoder = decoders.Metaspace("▁", "always")
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        _stripping(normalizers.Replace(" ", "▁"), None, metaspace=False),
        _stripping(None, pre_tokenizers.Metaspace("▁", "never", False), metaspace=True),
    ],
)
def test_a_space_that_only_decoding_strips_is_brought_back(tokenizer: Tokenizer) -> None:
    vocabulary = analyse(FastCodec.of(tokenizer))
    at = tokenizer.token_to_id
    assert not vocabulary.adds_space
    assert {vocabulary.category[at(mark + word)] for word in WORDS for mark in ("", "▁")} == {"ok"}
    assert (vocabulary.text[at("alpha")], vocabulary.text[at("▁alpha")]) == ("alpha", " alpha")
    assert vocabulary.category[at("zq")] == "unreachable_multi"


def test_spaces_that_decoding_adds_lose_no_byte() -> None:
    codec = FastCodec.of(wordpiece())
    lossy = {item.byte: item.back for item in analyse(codec).lossy}
    # "a!b" comes back as "a! b"; other signs are not in the vocabulary, control characters are dropped
    assert not {ord(char) for char in ".,! \t\n"} & lossy.keys()
    assert {ord("?"), 0x00, 0x1D} <= lossy.keys() and lossy[0] == "ab"
    survival = Survival(codec)
    assert {char for char in map(chr, range(128)) if survival.lost(char)} == {chr(b) for b in lossy if b < 128}


def test_white_space_that_is_dropped_or_unknown_is_lost() -> None:
    settings = json.loads(
        byte_level(missing=("ĝ",)).to_str()
    )  # the stand-in of byte 1D, which Python calls white space
    settings["model"]["vocab"]["ab"] = 5000
    settings["model"]["merges"].append(["a", "b"])  # "a", "b" and "ab" are different ids that read alike
    assert [item.byte for item in analyse(FastCodec.of(Tokenizer.from_str(json.dumps(settings)))).lossy] == [0x1D]
    pieces = [("<unk>", 0.0), *((c, -1.0) for c in "▁ab")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert Survival(FastCodec.of(tokenizer)).lost("\n a") == {"\n"}


def test_a_token_that_only_another_context_gives_is_reachable() -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Strip(left=True, right=False)
    vocabulary = analyse(FastCodec.of(tokenizer))
    assert not vocabulary.adds_space
    assert {vocabulary.category[tokenizer.token_to_id(f"Ġ{word}")] for word in WORDS} == {"ok"}


def test_pieces_of_words_are_reachable_inside_words() -> None:
    words = [
        "[UNK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
        "the",
        "##ing",
        "##ние",
    ]
    words += [*"ние", "##н", "##и", "##е", "Upper"]
    tokenizer = Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    vocabulary = analyse(FastCodec.of(tokenizer))
    at = words.index
    assert (vocabulary.text[at("##ing")], vocabulary.text[at("the")]) == ("ing", "the")
    reached = {w for i, w in enumerate(words) if vocabulary.category[i] == "ok"}
    assert set(words) - reached - {"[UNK]"} == {"Upper"}


def test_pieces_that_only_begin_a_word_are_reachable_before_the_rest_of_it() -> None:
    vocab = {c: i for i, c in enumerate([*"abcq", *(f"{c}</w>" for c in "abcq"), "ab", "ab</w>"])}
    model = models.BPE(vocab=vocab, merges=[("a", "b"), ("a", "b</w>")], end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder(suffix="</w>")
    assert set(analyse(FastCodec.of(tokenizer)).category) == {"ok"}


def test_unigram_with_a_space_in_front_of_every_text() -> None:
    pieces = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁the", -1.0),
        ("the", -3.0),
        ("ing", -2.0),
        *((c, -5.0) for c in "thein"),
        ("th", -99.0),
    ]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("g", -5.0), ("«", -5.0)], unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.normalizer = normalizers.Strip()
    vocabulary = analyse(FastCodec.of(tokenizer))
    at = tokenizer.token_to_id
    assert vocabulary.adds_space
    assert {vocabulary.category[at(t)] for t in ("▁the", "the", "ing", "t", "▁")} == {"ok"}
    assert vocabulary.category[at("th")] == "unreachable_multi"  # two letters are always cheaper


def test_what_the_normaliser_rewrites_is_unreachable_and_not_lossy() -> None:
    tokenizer = byte_level()
    decomposed = "e\u0301"
    tokenizer.add_tokens([AddedToken(decomposed, normalized=False), AddedToken("Ω", normalized=True)])
    written = "".join(
        chr_ for chr_ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\u2126")[0][0]
    )
    settings = json.loads(tokenizer.to_str())
    settings["model"]["vocab"][written] = 5000
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.normalizer = normalizers.NFC()
    vocabulary = analyse(FastCodec.of(tokenizer))
    assert vocabulary.category[tokenizer.token_to_id(written)] == "unreachable_single"  # ohm sign becomes Omega
    assert vocabulary.category[tokenizer.token_to_id(decomposed)] == "ok"  # matched before normalisation
    assert vocabulary.lossy == ()


@pytest.mark.parametrize("options", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_added_tokens_are_reachable_however_they_match(options: dict[str, bool]) -> None:
    for tokenizer in (byte_level(), sentencepiece()):
        tokenizer.add_tokens([AddedToken("<tool>", **options), AddedToken("zzqqzz", **options)])
        tokenizer.add_special_tokens([AddedToken("<mark>", special=True, **options)])
        vocabulary = analyse(FastCodec.of(tokenizer))
        found = [vocabulary.category[tokenizer.token_to_id(text)] for text in ("<tool>", "zzqqzz", "<mark>")]
        assert found == ["ok", "ok", "special"], options


def test_a_space_in_front_of_the_first_word_only() -> None:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    vocabulary = analyse(FastCodec.of(tokenizer))
    assert vocabulary.adds_space
    words = {tokenizer.token_to_id(mark + word) for word in WORDS for mark in ("", "Ġ")}
    assert {vocabulary.category[i] for i in words} == {"ok"}


def test_ids_without_a_token_are_gaps() -> None:
    tokenizer = byte_level()
    codec = FastCodec.of(tokenizer)
    holed = FastCodec((*codec.raw, None, None), codec.special, codec.style, codec.backend)
    vocabulary = analyse(holed)
    assert vocabulary.category[-2:] == ("no_token", "no_token")
    assert vocabulary.n_tokens == tokenizer.get_vocab_size()


def test_the_callers_truncation_stays() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    codec = FastCodec.of(tokenizer)
    assert len(codec.encode(["a b c d e"])[0]) > 2
    assert tokenizer.truncation["max_length"] == 2


def test_specials_are_the_same_from_the_folder_as_from_the_loaded_tokenizer(tmp_path: Path) -> None:
    backend = byte_level()
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="<unused0>", pad_token=SPECIAL,
        additional_special_tokens=["<unused1>", "alpha"],
    )  # fmt: skip
    loaded.save_pretrained(tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))  # as many hub folders: without the flags
    named = {backend.token_to_id(raw) for raw in (SPECIAL, "<unused0>", "<unused1>", "alpha")}
    assert codec_in(tmp_path).special == codec_of(loaded).special == named
    config = {"eos_token": {"content": "ember"}, "pad_token": None, "add_bos_token": True, "bos_token": "absent",
              "additional_special_tokens": None, "extra_special_tokens": {"image_token": "bravo"},
              "added_tokens_decoder": {"3": {"content": "x", "special": True}, "4": {"content": "y", "special": False}}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    at = backend.token_to_id
    assert codec_in(tmp_path).special == {at(SPECIAL), at("ember"), at("bravo"), 3}


class WithoutBackend:
    """A tokenizer as one written in Python looks from outside."""

    all_special_ids = ()

    def __init__(self, backend: Tokenizer) -> None:
        self.inner = backend

    def get_vocab(self) -> dict[str, int]:
        return self.inner.get_vocab()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.inner.encode(text).ids}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize(
    ("backend", "style"), [(byte_level(), "byte_level"), (sentencepiece(), "byte_fallback"), (wordpiece(), "none")]
)
def test_a_tokenizer_without_a_backend_has_the_same_bytes(backend: Tokenizer, style: str) -> None:
    slow, fast = codec_of(WithoutBackend(backend)), FastCodec.of(backend)
    assert slow.style == fast.style == style
    assert bytes_of(slow) == bytes_of(fast)
    assert (analyse(slow).byte == analyse(fast).byte).all()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="tokenizer"):
        codec_in(tmp_path)


@pytest.mark.embedded
def test_the_embedded_tokenizer_has_the_known_counts(embedded: Model) -> None:
    vocabulary = analyse(codec_of(embedded.tokenizer))
    counts = {name: vocabulary.category.count(name) for name in set(vocabulary.category)}
    assert counts == {"ok": 48_822, "special": 17, "partial_utf8": 313}
    assert int((vocabulary.byte >= 0).sum()) == 235
    expected = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
    assert set(vocabulary.missing_bytes) == expected | IMPOSSIBLE_BYTES
    assert {item.byte for item in vocabulary.lossy} == expected


@pytest.mark.parametrize("mark", [{"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "</w>"}])
def test_marks_of_words_that_no_decoder_takes_away_are_no_text(mark: dict[str, str]) -> None:
    backend = Tokenizer(models.BPE(unk_token="[UNK]", **mark))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["[UNK]"], show_progress=False, **mark)
    backend.train_from_iterator(["the cat sat on the mat and the dog ran to the house"] * 3, trainer)
    vocabulary = analyse(FastCodec.of(backend))
    assert not [raw for raw, kind in zip(vocabulary.raw, vocabulary.category, strict=True) if "unreach" in kind]
    assert not any(text.startswith("##") or text.endswith("</w>") for text in vocabulary.text)


def test_a_byte_vocabulary_without_a_backend_has_bytes() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    vocabulary = analyse(codec_of(tokenizer))
    kinds = [vocabulary.category[3 + byte] for byte in range(256)]
    assert kinds == ["ok"] * 128 + ["partial_utf8"] * 128
    assert vocabulary.byte[3:].tolist() == list(range(256)) and not vocabulary.missing_bytes and not vocabulary.lossy
    assert vocabulary.text[3 + 0xC3] == "<0xC3>"
    assert token_bytes(tokenizer)[3 + 0xC3] == b"\xc3"
