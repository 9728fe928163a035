"""Adversarial tokenization: pairs of words whose border the tokenizer hides, made from its vocabulary alone."""

from __future__ import annotations

import itertools
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from workbench.core.codec import Codec
from workbench.core.errors import DegenerateInputError, MissingFileError, require
from workbench.core.numbers import counted
from workbench.core.progress import track
from workbench.glitch.text.spans import encode_spans
from workbench.glitch.vocabulary.tokenizer import Vocabulary

CARRIERS: dict[str, tuple[str, str]] = {
    "hashtag": ("#{}", "-"),
    "domain": ("www.{}.com", "-"),
    "identifier": ("{}()", "_"),
    "text": ("{}", "|"),
}
"""How two words stand side by side without a space, and the sign that separates them in the control."""
SPACED = ("hashtag", "domain", "identifier")
"""Carriers for scripts with spaces between words; scripts without take the text as it is."""

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
_TRIES = 64


@dataclass(frozen=True, kw_only=True)
class AdtItem:
    """Two words whose border lies inside a token, or a control pair whose border does not.

    Attributes:
        arm: "attack" if the border is hidden, "plain" if the tokens respect it.
        separated: the control: the same words with a separator.
        tokens: the text of each token of `text`.
        trap: text of the token that lies across the border; empty in the arm "plain".
    """

    arm: str
    carrier: str
    first: str
    second: str
    text: str
    separated: str
    tokens: tuple[str, ...]
    trap: str
    trap_id: int
    border: int

    @property
    def words(self) -> list[str]:
        """Both words without case, as `words_of` gives those of a right answer."""
        return [self.first.casefold(), self.second.casefold()]

    @property
    def cuts(self) -> tuple[str, ...]:
        """Beginnings of the joined words that end where a token ends, the true first word left out."""
        joined, at = self.first + self.second, self.border - len(self.first)
        ends = itertools.accumulate(map(len, self.tokens))
        cuts = [joined[: end - at] for end in ends if at < end < at + len(joined)]
        return tuple(cut for cut in cuts if cut != self.first)


@dataclass(frozen=True, kw_only=True)
class AdtOptions:
    """How items are made: as many plain ones as attack items; lengths are those of words of scripts with spaces."""

    items: int = 200
    per_trap: int = 2
    shortest: int = 3
    longest: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        is_valid = min(self.items, self.per_trap) >= 1 and 2 <= self.shortest <= self.longest
        require(is_valid, self, "items and per_trap are at least 1, and 2 <= shortest <= longest.")


def lexicon_of(vocabulary: Vocabulary, options: AdtOptions | None = None) -> tuple[str, ...]:
    """Words that the vocabulary itself holds whole, in the order of their ids.

    These are lower-case tokens with a leading space, and tokens of two or more characters of a script without spaces.
    Some are beginnings of words; attack and control share them, but a list of real words makes a cleaner test.
    """
    options = options or AdtOptions()
    words: dict[str, None] = {}
    for i, category in enumerate(vocabulary.category):
        text = vocabulary.text[i]
        bare = text[1:] if text.startswith(" ") else text
        if category != "ok" or vocabulary.reserved[i] or not bare.isalpha():
            continue
        if _unspaced(bare):
            words |= {bare: None} if len(bare) >= 2 else {}
        elif text.startswith(" ") and bare.islower() and options.shortest <= len(bare) <= options.longest:
            words[bare] = None
    return tuple(words)


def read_lexicon(path: Path) -> tuple[str, ...]:
    """The words of a file, one a line; lines that are not letters alone are left out.

    Raises:
        MissingFileError: if there is no such file.
        DegenerateInputError: if it holds fewer than two words.
    """
    if not path.is_file():
        raise MissingFileError(f"There is no lexicon {path}. Give a UTF-8 text file with a word per line.")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    words = tuple(dict.fromkeys(word for line in lines if (word := line.strip()).isalpha() and len(word) > 1))
    if len(words) < 2:
        raise DegenerateInputError(
            f"{path} holds {counted(len(words), 'words of letters alone')}; a pair needs two. Add words."
        )
    return words


def make_items(
    codec: Codec, vocabulary: Vocabulary, lexicon: Sequence[str] = (), options: AdtOptions | None = None
) -> tuple[AdtItem, ...]:
    """Attack items and as many plain ones, with the same carriers; by default of words that the vocabulary holds whole.

    For every token z and split z = p + q it looks for words that end in p and words that begin with q; a pair becomes
    an item if in the text a token really lies across the border. Tokens are tried in the order of their ids, so the
    commonest traps come first.

    Raises:
        DegenerateInputError: if no pair of words hides its border.

    Source: the idea of Wang et al. 2024, "Tokenization Matters!" (arXiv 2405.17067); the items are made without a
    language model, so their questions are about the words themselves.
    """
    options = options or AdtOptions()
    words = tuple(lexicon) or lexicon_of(vocabulary, options)
    rng = np.random.default_rng(options.seed)
    attacks = _attacks(codec, vocabulary, words, options, rng)
    if not attacks:
        raise DegenerateInputError(
            f"No pair of {len(words)} words hides its border from this tokenizer of {vocabulary.n_tokens} tokens. Give "
            "more words with lexicon=, or allow longer ones."
        )
    return (*attacks, *_plain(codec, words, attacks, rng))


def _attacks(
    codec: Codec, vocabulary: Vocabulary, words: Sequence[str], options: AdtOptions, rng: np.random.Generator
) -> list[AdtItem]:
    ends, starts = _index(words)
    attacks: list[AdtItem] = []
    seen: set[tuple[str, str]] = set()
    texts = [text for text, c in zip(vocabulary.text, vocabulary.category, strict=True) if c == "ok" and len(text) > 1]
    traps = [text for text in texts if text.isalpha() and (text.islower() or _unspaced(text))]
    for trap in track(traps, description="traps", unit="tokens"):
        pairs = [pair for pair in _pairs(trap, ends, starts, rng) if pair not in seen]
        tried = [_item(first, second, _carrier(first + second, rng)) for first, second in pairs]
        made = [item for item in _tokenized(codec, tried) if item.arm == "attack"]
        made = made[: min(options.per_trap, options.items - len(attacks))]
        attacks += made
        seen |= {(item.first, item.second) for item in made}
        if len(attacks) >= options.items:
            break
    return attacks


def _index(words: Sequence[str]) -> tuple[Mapping[str, list[str]], Mapping[str, list[str]]]:
    """Words by each of their proper endings, and by each of their proper beginnings."""
    ends: dict[str, list[str]] = defaultdict(list)
    starts: dict[str, list[str]] = defaultdict(list)
    for word in words:
        for at in range(1, len(word)):
            ends[word[at:]].append(word)
            starts[word[:at]].append(word)
    return ends, starts


def _pairs(
    trap: str, ends: Mapping[str, list[str]], starts: Mapping[str, list[str]], rng: np.random.Generator
) -> list[tuple[str, str]]:
    pairs = []
    for at in range(1, len(trap)):
        left, right = ends.get(trap[:at], ()), starts.get(trap[at:], ())
        if left and right:
            picks = rng.integers(0, (len(left), len(right)), size=(max(1, _TRIES // len(trap)), 2))
            pairs += [(left[a], right[b]) for a, b in picks.tolist()]
    return [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]


def _plain(
    codec: Codec, words: Sequence[str], attacks: Sequence[AdtItem], rng: np.random.Generator
) -> Iterator[AdtItem]:
    """A pair with the same carrier for each attack whose border the tokens respect, as far as such pairs are found."""
    by_script = {True: [w for w in words if _unspaced(w)], False: [w for w in words if not _unspaced(w)]}
    for item in attacks:
        pool = by_script[_unspaced(item.first)]
        picks = rng.integers(0, len(pool), size=(_TRIES, 2)).tolist()
        tried = [_item(pool[a], pool[b], item.carrier) for a, b in picks if a != b]
        yield from [other for other in _tokenized(codec, tried) if other.arm == "plain"][:1]


def _item(first: str, second: str, carrier: str) -> AdtItem:
    frame, sign = CARRIERS[carrier]
    return AdtItem(
        arm="", carrier=carrier, first=first, second=second, text=frame.format(first + second),
        separated=frame.format(f"{first}{sign}{second}"), tokens=(), trap="", trap_id=-1,
        border=frame.index("{}") + len(first),
    )  # fmt: skip


def _carrier(text: str, rng: np.random.Generator) -> str:
    return "text" if _unspaced(text) else SPACED[int(rng.integers(len(SPACED)))]


def _tokenized(codec: Codec, items: Sequence[AdtItem]) -> Iterator[AdtItem]:
    """The items with their tokens and their arm; those whose tokens do not tile the text are left out."""
    for item, (ids, spans) in zip(items, encode_spans(codec, [item.text for item in items]), strict=True):
        if not spans or [a for a, _ in spans[1:]] != [b for _, b in spans[:-1]] or spans[-1][1] != len(item.text):
            continue
        tokens = tuple(item.text[a:b] for a, b in spans)
        across = next((k for k, (a, b) in enumerate(spans) if a < item.border < b), None)
        if across is None:
            yield replace(item, arm="plain", tokens=tokens)
        else:
            yield replace(item, arm="attack", tokens=tokens, trap=tokens[across], trap_id=ids[across])


def _unspaced(text: str) -> bool:
    """Whether a text is of a script that puts no spaces between words.

    >>> _unspaced("tokens"), _unspaced(chr(0x6771) + chr(0x4EAC))
    (False, True)
    """
    return bool(text) and all(unicodedata.name(char, "").startswith(_UNSPACED) for char in text)
