"""Flagged tokens as ban lists that inference engines take."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workbench.core.arguments import checked
from workbench.core.errors import DegenerateInputError, InvalidInputError, require, require_known
from workbench.core.html import Shown
from workbench.core.numbers import counted, number
from workbench.core.records import save_json, write_atomic
from workbench.glitch.reporting import sentences
from workbench.glitch.scanning.saved import GRADES, SavedScan, TokenFact, check_grades


@dataclass(frozen=True)
class BanFormat:
    """A form of ban list; `limit` ids at most in a request, `exact` if a banned token can't be written at all."""

    use: str
    limit: int | None = None
    exact: bool = True


FORMATS: dict[str, BanFormat] = {
    "transformers": BanFormat("model.generate(inputs, **json.load(file)); scores become -inf"),
    "vllm": BanFormat(
        "body of a request, or SamplingParams(**…); a bias of -100, the lowest that is kept", 1024, False
    ),
    "openai": BanFormat("body of a request; a bias of -100, the lowest allowed", 300, False),
    "llamacpp": BanFormat("body of a request to /completion; false means never"),
    "llamacpp-cli": BanFormat("options of llama-cli and llama-server: $(cat FILE)"),
}
"""Every format. Biases lie in [-100, 100]: vLLM clips others and refuses over 1,024 entries, OpenAI takes 300."""

DEFAULT_GRADES = ("verified",)
_REASONS = (
    "ids to keep", "ids beyond the matrix", "of a kind that glitch.json alone does not tell", "special tokens",
    "single bytes and incomplete characters",
)  # fmt: skip
_RANK = {grade: k for k, grade in enumerate(GRADES)}


@dataclass(frozen=True, eq=False)
class BanList(Shown):
    """Ids to ban, the best founded first, and by reason those that were left out."""

    model: str
    origin: str
    tokens: tuple[TokenFact, ...]
    left_out: dict[str, tuple[int, ...]]

    @property
    def ids(self) -> tuple[int, ...]:
        """The banned ids."""
        return tuple(fact.token_id for fact in self.tokens)

    def payload(self, form: str) -> dict[str, object] | str:
        """The list in a format: JSON values, or text for the command line.

        Raises:
            UnknownNameError: for a format that does not exist.
            InvalidInputError: if the engine does not take so many.
        """
        require_known("ban list format", form, FORMATS)
        limit = FORMATS[form].limit
        if limit is not None and len(self.ids) > limit:
            raise InvalidInputError(
                f"{counted(len(self.ids), 'ids')} are to be banned, and {form} takes at most {number(limit)} in a "
                f"request. Export fewer grades, or the first ones only (top={limit}): they are in order of evidence."
            )
        if form == "transformers":
            return {"bad_words_ids": [[i] for i in self.ids]}
        if form == "llamacpp":
            return {"logit_bias": [[i, False] for i in self.ids]}
        if form == "llamacpp-cli":
            return " ".join(f"--logit-bias {i}-inf" for i in self.ids) + "\n"
        return {"logit_bias": {str(i): -100 for i in self.ids}}

    def contents(self, form: str) -> dict[str, object]:
        """What is in the list and what is not, for a file beside it."""
        rows = [
            {"token_id": t.token_id, "text": t.text, "grade": t.grade, "max_prob": t.max_prob, "indicator": t.indicator}
            for t in self.tokens
        ]
        return {
            "model": self.model, "scan": self.origin, "format": form, "use": FORMATS[form].use,
            "exact": FORMATS[form].exact, "grades": dict(Counter(t.grade for t in self.tokens)), "tokens": rows,
            "left_out": self.left_out,
        }  # fmt: skip

    def save(self, path: str | Path, form: str) -> tuple[Path, Path]:
        """Writes the list and, beside it, `<name>.contents.json` with what is in it. Returns both paths."""
        payload, target = self.payload(form), Path(path)
        text = payload if isinstance(payload, str) else json.dumps(payload) + "\n"
        contents = target.with_name(f"{target.name}.contents.json")
        return write_atomic(target, text), save_json(contents, self.contents(form))

    def said(self, form: str) -> tuple[str, ...]:
        """What is in the list, in sentences."""
        grades = Counter(t.grade for t in self.tokens)
        untested = "Some were never tested: the model may be able to say them, and then the ban takes words away."
        bias = "A bias of -100 makes a token practically impossible; it is no proof, as -inf is."
        return sentences(
            f"{number(len(self.ids))} ids of {self.model} are banned "
            f"({', '.join(f'{number(n)} {grade}' for grade, n in grades.items())}); flags from {self.origin}.",
            *(f"Left out: {number(len(ids))} {reason}." for reason, ids in self.left_out.items() if ids),
            untested if "candidate" in grades or "reference" in grades else "",
            "" if FORMATS[form].exact else bias,
        )


@checked
def ban_list(
    scan: SavedScan, grades: Iterable[str] = DEFAULT_GRADES, *, top: int | None = None, include_special: bool = False,
    include_bytes: bool = False, keep: Iterable[int] = (),
) -> BanList:  # fmt: skip
    """The flagged tokens to ban, ordered by grade, then by how improbable the model found them.

    Args:
        scan: the scan.
        grades: which grades to ban.
        top: only so many, the first ones.
        include_special: ban special tokens too; without end and turn tokens a model can't stop.
        include_bytes: ban single bytes and incomplete characters too; without them some characters can't be written.
        keep: ids that stay in any case.

    Raises:
        DegenerateInputError: if nothing is left to ban.
        InvalidInputError: for a negative id in `keep`, or `top` below 1.
    """
    kept = set(keep)
    is_valid = (top is None or top >= 1) and all(i >= 0 for i in kept)
    require(is_valid, f"ban_list(top={top}, keep={sorted(kept)[:5]})", "top is at least 1 and ids are not negative.")
    wanted = check_grades(grades)
    flags = scan.flags(wanted)
    if include_special and "reference" in wanted:
        # a special that the model was never seen to say is unused as well
        flags |= {i: "reference" for i, t in scan.tokens.items() if _special(t) and t.reference}
    reasons = {i: _reason(scan.tokens[i], include_special, include_bytes, i in kept) for i in flags}
    left_out = {reason: tuple(i for i, why in reasons.items() if why == reason) for reason in _REASONS}
    chosen = sorted((scan.tokens[i] for i, why in reasons.items() if why is None), key=_order)
    left_out["beyond top"] = () if top is None else tuple(fact.token_id for fact in chosen[top:])
    if not chosen:
        raise DegenerateInputError(
            f"Nothing to ban: the scan of {scan.model} has {len(flags)} tokens of the grades {', '.join(wanted)}, and "
            f"none may be banned (flagged in all: {scan.counts() or 'none'}). Ask for other grades, or scan with "
            "--verify top."
        )
    return BanList(scan.model, scan.origin, tuple(chosen[:top]), left_out)


def _reason(fact: TokenFact, include_special: bool, include_bytes: bool, keep: bool) -> str | None:
    checks = (
        keep, fact.category == "no_row", fact.category == "", _special(fact) and not include_special,
        (fact.is_byte or fact.category == "partial_utf8") and not include_bytes,
    )  # fmt: skip
    return next((reason for reason, holds in zip(_REASONS, checks, strict=True) if holds), None)


def _special(fact: TokenFact) -> bool:
    return fact.category in ("special", "unreachable_special")


def _order(fact: TokenFact) -> tuple[int, float, float, int]:
    p, indicator = (math.inf if math.isnan(value) else value for value in (fact.max_prob, fact.indicator))
    return _RANK[fact.grade or "no_row"], p, indicator, fact.token_id
