"""Which characters come back from encode and decode: one measure for the scan of a tokenizer and for texts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from workbench.core.codec import Codec


@dataclass(frozen=True, eq=False)
class Survival:
    """Which characters come back from encode and decode, alone or between letters; each is tried once.

    A character is lost if it never comes back, or if normalisation removes it; white space is lost if the words beside
    it come back changed or glued together, though a plain space keeps them apart. Spaces that decoding adds, as
    WordPiece does around signs, and other changes by normalisation (case, accents, compatibility forms) are no loss.
    `bad` maps the lost characters that were `seen` to what comes back for `between`.
    """

    codec: Codec
    seen: set[str] = field(default_factory=set)
    bad: dict[str, str] = field(default_factory=dict)

    def lost(self, text: str) -> set[str]:
        """Characters of the text that are lost."""
        present = {char for char in set(text) if not is_half(char)}
        new = sorted(present - self.seen)
        if new:
            trials = [[char, between(char), f" {char} "] for char in (*new, " ", "")]
            flat = list(itertools.chain(*trials))
            ids = self.codec.encode(flat)
            back = self.codec.decode(ids)
            apart, glued = ((ids[row], back[row]) for row in (-5, -2))
            for k, char in enumerate(new):
                row = 3 * k + 1
                same = [self._same(flat[at], back[at]) for at in (row - 1, row, row + 1)]
                if char.isspace():
                    is_glued = ids[row] == glued[0] or (back[row] == glued[1] != apart[1])
                    failed = is_glued or not same[1]
                else:
                    bare = self.codec.normalize(between(""))
                    failed = not any(same) or self.codec.normalize(between(char)) == bare
                if failed:
                    self.bad[char] = back[row]
            self.seen.update(new)
        return present & self.bad.keys()

    def _same(self, text: str, back: str) -> bool:
        return "".join(self.codec.normalize(text).split()) == "".join(self.codec.normalize(back).split())


def between(char: str) -> str:
    """A character between two letters, as it is tried and shown."""
    return f"a{char}b"


def is_half(char: str) -> bool:
    r"""Whether it is half a surrogate pair, which is no character.

    >>> is_half("\ud800"), is_half("a")
    (True, False)
    """
    return "\ud800" <= char <= "\udfff"
