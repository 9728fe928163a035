"""Cues by name, as a command line has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from circuits.cues.kinds import Casing, Cluster, Cue, FirstNoun, FirstVerb, Length, Punctuation, Token
from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError, require_known

_PLAIN: Mapping[str, Callable[[], Cue]] = {
    "length": Length, "tense": FirstVerb, "number": FirstNoun, "casing": Casing, "punctuation": Punctuation,
    "cluster": Cluster, "token": lambda: Token("©"),
    "token-end": lambda: Token("©", "end"),
}  # fmt: skip
_WITH_TEXT: Mapping[str, Callable[[str], Cue]] = {
    "punctuation": Punctuation, "token": Token, "token-end": lambda text: Token(text, "end"),
}  # fmt: skip


@checked
def cue_named(name: str) -> Cue:
    """The cue of a name: length, tense, number, casing, punctuation, cluster, token (put in front) or token-end.

    A text follows a colon. The first token of a text is not read by a probe, so a token behind the text shows more.

    >>> cue_named("length"), cue_named("token:(c)").name, cue_named("punctuation:...").name
    (Length(threshold=None), 'token (c)', 'final ...')

    Raises:
        UnknownNameError: if there is no such cue.
        InvalidInputError: for a text behind a cue that has none.
    """
    kind, colon, text = name.partition(":")
    require_known("cue", kind, tuple(_PLAIN))
    if not colon:
        return _PLAIN[kind]()
    if kind not in _WITH_TEXT:
        raise InvalidInputError(
            f"The cue {kind!r} has no text of its own, and {name!r} gives it one. A text belongs behind "
            f"{' and '.join(f'{other}:' for other in _WITH_TEXT)}."
        )
    return _WITH_TEXT[kind](text)
