"""A model on adversarial tokenization items: how much worse is it where the tokenizer hides the border of two words?"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.core.errors import DegenerateInputError
from workbench.core.numbers import number, p_value
from workbench.core.progress import task
from workbench.core.records import from_jsonable, json_lines, to_jsonable, write_atomic
from workbench.core.stats import SIGNED_SHARE, Estimate, clopper_pearson, mcnemar, paired_difference
from workbench.engine.log import Log
from workbench.glitch.reporting import TokenReport, measured, rate, sentences, shown
from workbench.glitch.text.adt import AdtItem
from workbench.glitch.verification.scoring import dtype_name
from workbench.models.model import Model
from workbench.report.base import Bars, Block, Headline, Metric, Says, Table, Text, beside

SHOTS = 4
FORMS = ("joined", "separated")
"""The two ways in which each pair is shown."""
_TASK = "Each line shows two words and then the same two words with a space between them.\n"
_NEW_TOKENS = 24


@dataclass(frozen=True)
class AdtAnswer:
    """What the model wrote for one item, where the words stand side by side and where a sign separates them."""

    item: AdtItem
    joined: str
    separated: str

    @property
    def right_joined(self) -> bool:
        """Whether the answer holds the two words."""
        return words_of(self.joined)[:2] == self.item.words

    @property
    def right_separated(self) -> bool:
        """The same for the control."""
        return words_of(self.separated)[:2] == self.item.words

    @property
    def along_tokens(self) -> bool:
        """Whether a wrong answer cuts the joined words where a token ends."""
        first = words_of(self.joined)[:1]
        return not self.right_joined and bool(first) and first[0] in {cut.casefold() for cut in self.item.cuts}


@dataclass(frozen=True, eq=False)
class AdtReport(TokenReport):
    """Result of `run_adt`: one answer per item, attacks first."""

    _title = "Adversarial tokenization of {self.model}"

    model: str
    answers: tuple[AdtAnswer, ...]

    def arm(self, name: str) -> tuple[AdtAnswer, ...]:
        """The answers of one arm: "attack" or "plain"."""
        return tuple(answer for answer in self.answers if answer.item.arm == name)

    def accuracy(self, name: str, separated: bool = False) -> Estimate:
        """Share of right answers of an arm, joined or in its control, with the exact interval.

        Raises:
            DegenerateInputError: if the arm has no items.
        """
        right = [a.right_separated if separated else a.right_joined for a in self.arm(name)]
        return clopper_pearson(sum(right), len(right), unit="items")

    def drop(self, name: str) -> Estimate:
        """Accuracy in the control minus accuracy where the words are joined; positive if joining hurts."""
        answers = self.arm(name)
        return paired_difference(
            [float(a.right_separated) for a in answers], [float(a.right_joined) for a in answers], unit="items",
            within=SIGNED_SHARE,
        )  # fmt: skip

    def p_value(self, name: str) -> float:
        """Exact McNemar test of the control against the joined form."""
        answers = self.arm(name)
        return mcnemar(
            sum(a.right_separated and not a.right_joined for a in answers),
            sum(a.right_joined and not a.right_separated for a in answers),
        )

    def hidden_border_p(self) -> float:
        """Fisher's exact test of joined accuracy, attack against plain items: two-sided; 1.0 without plain items.

        Both arms lack a separator, so this is about the hidden border. The words differ between the arms.
        """
        from scipy.stats import fisher_exact

        table = [[sum(a.right_joined for a in self.arm(name)), len(self.arm(name))] for name in ("attack", "plain")]
        tested: Any = fisher_exact([[right, n - right] for right, n in table])  # scipy does not type its results
        return float(tested.pvalue)

    def errors_along_tokens(self, name: str) -> Estimate | None:
        """Share of wrong answers that cut where a token ends; None without wrong answers."""
        return rate((a.along_tokens for a in self.arm(name) if not a.right_joined), "errors")

    def headline(self) -> Headline:
        """Right answers where the words are joined beside the same items with a separator."""
        return Headline.of(
            Says(
                "The model reads words wrongly where a token hides their border.",
                "The model reads words as well where a token hides their border as with a separator.",
                "The model reads words better where a token hides their border than with a separator.",
            ),
            self._beside(),
            "lower",
        )  # fmt: skip

    def _beside(self) -> Table:
        drop = self.drop("attack")
        gain = replace(drop, value=-drop.value, low=-drop.high, high=-drop.low)
        joined, apart = self.accuracy("attack"), self.accuracy("attack", True)
        return beside("share of right answers", ("joined words", joined), ("with a separator", apart), gain)

    def findings(self) -> tuple[str, ...]:
        """What was found, in sentences, also if it is nothing."""
        attack, control, drop = self.accuracy("attack"), self.accuracy("attack", True), self.drop("attack")
        plain = "No pairs with a respected border were found, so the drop may come from the missing separator."
        if self.arm("plain"):
            plain = (
                f"Joined pairs whose border the tokens respect: {self.accuracy('plain')} right against {attack} of the "
                f"hidden ones (Fisher p {p_value(self.hidden_border_p())}); their own drop is {self.drop('plain')}."
            )
        share = self.errors_along_tokens("attack")
        return sentences(
            f"{attack.n} pairs of words whose border lies inside a token: {number(attack.value)} right joined, "
            f"{number(control.value)} with a separator; drop {drop} (exact McNemar p "
            f"{p_value(self.p_value('attack'))}).",
            plain,
            "" if share is None else f"Wrong answers that cut where a token ends: {share}.",
            f"WEAK TASK: even with a separator only {number(control.value)} are right, so there is little to lose; the "
            "drop says more on a stronger model." if control.high < 0.5 else "",
        )  # fmt: skip

    def metrics(self) -> dict[str, Metric]:
        """Accuracies, drops and p-values."""
        metrics: dict[str, Metric | None] = {}
        for name in self._arms:
            metrics |= {
                f"{name}_joined": self.accuracy(name), f"{name}_separated": self.accuracy(name, True),
                f"{name}_drop": self.drop(name), f"{name}_mcnemar_p": self.p_value(name),
            }  # fmt: skip
        metrics["hidden_border_p"] = self.hidden_border_p() if self.arm("plain") else None
        return measured(metrics | {"errors_along_tokens": self.errors_along_tokens("attack")})

    @property
    def _arms(self) -> list[str]:
        return [name for name in ("attack", "plain") if self.arm(name)]

    def _blocks(self) -> Iterator[Block]:
        yield Text(
            "Each pair is shown joined and with a separator. In the attack arm a token lies across the border of the "
            "words, in the plain arm none does. The answer is right if it is the two words."
        )
        bars = [(f"{name}, {form}", self.accuracy(name, form == "separated")) for name in self._arms for form in FORMS]
        yield Bars("Right answers", tuple(label for label, _ in bars), tuple(value for _, value in bars), "share")
        rows = tuple(
            (shown(a.item.text), "|".join(map(shown, a.item.tokens)), f"{a.item.first} {a.item.second}",
             shown(a.joined), shown(a.separated))
            for a in self.arm("attack")[:40]
        )  # fmt: skip
        yield Table(("text", "tokens", "words", "answer", "answer with separator"), rows, "First attack items")


def prompts_of(items: Sequence[AdtItem], shots: Sequence[AdtItem]) -> tuple[str, ...]:
    """Two prompts per item, joined and separated; worked examples of both forms stand in front of each."""
    worked = "".join(
        f"{shot.text if k % 2 == 0 else shot.separated} -> {shot.first} {shot.second}\n" for k, shot in enumerate(shots)
    )
    return tuple(f"{_TASK}{worked}{text} ->" for item in items for text in (item.text, item.separated))


def run_adt(
    model: Model, items: Sequence[AdtItem], *, batch_size: int = 32, journal: str | Path | None = None
) -> AdtReport:
    """Asks the model for the two words of every item, in both forms, greedily.

    The first plain items serve as worked examples and are not counted. A run that was stopped continues from the
    journal, which keeps every batch of answers.

    Raises:
        DegenerateInputError: if there are no attack items.
        MismatchError: if the journal holds answers of another model, or to other prompts.
    """
    plain, attacks = ([item for item in items if item.arm == arm] for arm in ("plain", "attack"))
    if not attacks:
        raise DegenerateInputError(f"run_adt: none of the {len(items)} items is an attack. Make some with make_items.")
    shots = plain[:SHOTS]
    asked = [*attacks, *plain[len(shots) :]]
    prompts = prompts_of(asked, shots)
    digest = hashlib.sha256(json.dumps([_NEW_TOKENS, *prompts]).encode()).hexdigest()[:12]
    key = {"model": model.fingerprint, "dtype": dtype_name(model), "prompts": digest}
    book = None if journal is None else Log(Path(journal), key, row_id="prompt")
    said = {k: str(row["answer"]) for k, row in book.done().items()} if book else {}
    with task(total=len(prompts), description="adversarial tokenization", unit="prompts") as running:
        running.skip(len(said))
        left = [k for k in range(len(prompts)) if k not in said]
        for start in range(0, len(left), batch_size):
            part = left[start : start + batch_size]
            written = model.generate([prompts[k] for k in part], _NEW_TOKENS, temperature=0.0, stop=("\n",))
            new = {k: text.split("\n", 1)[0] for k, text in zip(part, written.texts, strict=True)}
            said |= new
            if book is not None:
                book.append([{"prompt": k, "answer": text} for k, text in new.items()])
            running.advance(len(part))
    answers = tuple(AdtAnswer(item, said[2 * k], said[2 * k + 1]) for k, item in enumerate(asked))
    return AdtReport(model.name, answers)


def words_of(answer: str) -> list[str]:
    """The words of an answer, without case and without signs around them.

    >>> words_of(" Counts, parent."), words_of("counts-parent")
    (['counts', 'parent'], ['counts-parent'])
    """
    stripped = (re.sub(r"^\W+|\W+$", "", word) for word in answer.split())
    return [word.casefold() for word in stripped if word]


def save_items(path: str | Path, items: Iterable[AdtItem]) -> Path:
    """Writes the items, one JSON object a line, and returns the path."""
    return write_atomic(path, "".join(json.dumps(to_jsonable(item)) + "\n" for item in items))


def load_items(path: str | Path) -> tuple[AdtItem, ...]:
    """The items of a file that `save_items` wrote."""
    return tuple(from_jsonable(AdtItem, line) for line in json_lines(path))
