"""What a model does with a token that it does not know: three small tasks, and a name for each way to fail them."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from workbench.core.codec import token_bytes
from workbench.core.errors import DegenerateInputError
from workbench.core.progress import task as progress
from workbench.core.stats import Estimate
from workbench.core.tokens import TokenBatch
from workbench.glitch.reporting import rate
from workbench.glitch.verification.prompts import Forms, TokenPrompt, prompt_set
from workbench.glitch.verification.verify import Outcome
from workbench.glitch.vocabulary.tokenizer import Vocabulary
from workbench.models.model import Model

Label = Literal[
    "ok", "spelling_mistake", "incapability", "hallucinatory_completion", "question_repetition", "random_characters"
]
LABELS: dict[str, str] = {
    "ok": "the answer holds what was asked for",
    "question_repetition": "not so, and it says a long part of the question again",
    "incapability": "not so, and it is empty or says that it can't",
    "random_characters": "not so, and fewer than half of its characters are letters, digits or spaces, or one repeats",
    "spelling_mistake": "not so, but it is almost the text (similarity of at least 0.7)",
    "hallucinatory_completion": "not so: something else",
}
"""Labels with their rules; the first that holds is given. Symptoms after Li et al. 2024, the rules are our own."""
TASKS = (
    TokenPrompt("repetition", "", "Please give this text back, exactly as it is: «{token}»\n",
                "Here it is again: «{token}"),
    TokenPrompt("spelling", "", "Please spell this text, with a hyphen between its letters: «{token}»\n",
                "Letter by letter it is:{token}"),
    TokenPrompt("length", "", "How many characters does this text have: «{token}»?\n",
                "The number of its characters is{token}"),
)  # fmt: skip
"""The tasks of Li et al. 2024 in our words: say it, spell it with hyphens, count its characters."""
_CANNOT = re.compile(
    r"\b(?:sorry|apologi[sz]e|unable|can(?:no|')t|can not|could(?: no|n')t|do(?: no|n')t (?:understand|know|have)|"
    r"not (?:sure|clear|able|provided|given)|no (?:text|word)|unclear|please provide)\b",
    re.IGNORECASE,
)
_MIN_SIMILARITY, _MIN_ECHO_CHARACTERS = 0.7, 20


@dataclass(frozen=True)
class Symptom(Outcome):
    """The model's reply about one token, up to the end of the line, with a key of `LABELS`."""

    task: str
    reply: str
    label: Label


@dataclass(frozen=True)
class Symptoms:
    """Replies to all tasks; `failures` is the share of controls that fail each: ordinary tokens fail it as well.

    Tokens of white space only are not asked about.
    """

    replies: tuple[Symptom, ...]
    form: str
    failures: dict[str, Estimate]
    candidate_failures: dict[str, Estimate]
    max_new_tokens: int
    notes: tuple[str, ...] = ()

    def of(self, token_id: int) -> dict[str, Symptom]:
        """The replies about one token, by task."""
        return {s.task: s for s in self.replies if s.token_id == token_id}

    def counts(self, task: str, control: bool) -> Counter[str]:
        """How often each label was given."""
        return Counter(s.label for s in self.replies if s.task == task and s.control == control)


def symptoms(
    model: Model, vocabulary: Vocabulary, candidates: Sequence[int], controls: Sequence[int], *,
    forms: Forms = "auto", max_new_tokens: int = 64, batch_size: int = 64,
) -> Symptoms:  # fmt: skip
    """Asks the model to repeat, spell and measure each token, and names what goes wrong; greedy, by id.

    The forms "auto" and "both" take the chat form where there is one.

    Raises:
        DegenerateInputError: if there is no token to ask about, or no task can be built for this tokenizer.
    """
    texts = [written.decode("utf-8", errors="replace").strip() for written in token_bytes(model.tokenizer)]
    asked = [(i, k >= len(candidates)) for k, i in enumerate((*candidates, *controls)) if i < len(texts) and texts[i]]
    if not asked:
        raise DegenerateInputError(
            f"symptoms: none of the {len(candidates)} candidates and {len(controls)} controls has a text to ask about. "
            "Give ids of tokens that are more than white space."
        )
    made = prompt_set(model, vocabulary, TASKS, "raw" if forms == "raw" else "auto", steps=max_new_tokens + 1)
    form = made.forms[-1]
    # Raw text continues behind the answer's line; a chat reply ends by itself, and may begin with an empty line.
    stop = ("\n",) if form == "raw" else ()
    replies: list[Symptom] = []
    chosen = [t for t in made.templates if t.form == form]
    with progress(total=len(chosen) * len(asked), description="symptoms", unit="replies") as running:
        for template in chosen:
            task, question = template.prompt.name, template.prompt.text("")
            for start in range(0, len(asked), batch_size):
                part = asked[start : start + batch_size]
                rows = TokenBatch.of_rows(template.fill(torch.tensor([i for i, _ in part])))
                said = model.generate(rows, max_new_tokens, temperature=0.0, stop=stop, batch_size=batch_size).texts
                for (i, control), reply in zip(part, said, strict=True):
                    reply = reply.strip().split("\n")[0]
                    replies.append(Symptom(int(i), control, task, reply, label_of(task, texts[i], reply, question)))
                running.advance(len(part))
    failures, own = _failures(replies, True, "control tokens"), _failures(replies, False, "candidates")
    return Symptoms(tuple(replies), form, failures, own, max_new_tokens, made.notes)


def _failures(replies: Sequence[Symptom], control: bool, unit: str) -> dict[str, Estimate]:
    asked = [s for s in replies if s.control == control]
    tasks = dict.fromkeys(s.task for s in asked)
    return {
        task: failing for task in tasks
        if (failing := rate((s.label != "ok" for s in asked if s.task == task), unit)) is not None
    }  # fmt: skip


def label_of(task: str, text: str, reply: str, question: str = "") -> Label:
    """The label of a reply; the rules are in `LABELS`.

    >>> label_of("repetition", " wurden", "werden"), label_of("repetition", " wurden", "The text is wurden.")
    ('spelling_mistake', 'ok')
    >>> label_of("spelling", "lamp", "L-A-M-P"), label_of("length", "lamp", "It has 5.")
    ('ok', 'hallucinatory_completion')
    >>> label_of("repetition", "abc", "I'm sorry"), label_of("repetition", "abc", "@@@@@")
    ('incapability', 'random_characters')
    """
    wanted = text.strip()
    if succeeds(task, wanted, reply):
        return "ok"
    echo = difflib.SequenceMatcher(None, question, reply, autojunk=False).find_longest_match()
    if echo.size >= _MIN_ECHO_CHARACTERS:
        return "question_repetition"
    if not reply.strip() or _CANNOT.search(reply):
        return "incapability"
    bare, plain = "".join(reply.split()), sum(c.isalnum() or c.isspace() for c in reply)
    if 2 * plain < len(reply) or (len(bare) >= 5 and len(set(bare)) == 1):
        return "random_characters"
    if task != "length" and _similarity(_target(task, wanted), reply) >= _MIN_SIMILARITY:
        return "spelling_mistake"
    return "hallucinatory_completion"


def succeeds(task: str, wanted: str, reply: str) -> bool:
    """Whether a reply holds what was asked for: the text (case-sensitive), its letters with hyphens, or its length.

    >>> succeeds("length", "lamp", "14"), succeeds("repetition", "Lamp", "lamp")
    (False, False)
    """
    if task == "length":
        return str(len(wanted)) in re.findall(r"\d+", reply)
    if task == "spelling":
        return _target(task, wanted).lower() in re.sub(r"\s*-\s*", "-", reply).lower()
    return wanted in reply


def _target(task: str, wanted: str) -> str:
    return "-".join(wanted) if task == "spelling" else wanted


def _similarity(wanted: str, reply: str) -> float:
    """Of the text and the most similar of: the reply, and its words."""
    tries = (reply, *reply.split())
    return max((difflib.SequenceMatcher(None, wanted.lower(), t.strip(".,«»\"'").lower()).ratio() for t in tries),
               default=0.0)  # fmt: skip
