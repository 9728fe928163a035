"""Judges that answer through files: anyone who can read them, or a person who is asked one question at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.jsontext import content_of, parse_json
from workbench.core.records import read_text
from workbench.judges.protocol import JUDGES, Answer, Question

PROMPTS_FILE = "export-prompts.jsonl"
REPLIES_FILE = "import-replies.jsonl"


@checked
@JUDGES.register("file")
@dataclass(frozen=True)
class FileJudge(OneLine):
    """Anyone who reads files: prompts are written to one file, replies are read from another.

    `ask` appends the prompts that have no reply yet to `export-prompts.jsonl` ({"id", "prompt"} per line) and gives
    no value for them. Write {"id", "reply"} per line to `import-replies.jsonl` in the same folder, the reply as the
    prompt asks for it, and run the same work again.

    Attributes:
        folder: of both files.
        who: who judges; shown with the scores.
    """

    folder: str | Path
    who: str = "replies from a file"

    @property
    def name(self) -> str:
        """Who judges."""
        return self.who

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The replies so far; a line in the prompts file, and no value, for the other questions.

        Raises:
            CorruptFileError: if a line of either file is not what it should be.
        """
        replies, exported = self._replies(), self._exported()
        new = {q.id: q.text for q in questions if q.id not in replies and q.id not in exported}
        append_lines(Path(self.folder) / PROMPTS_FILE, [{"id": i, "prompt": text} for i, text in new.items()])
        return [self._answer(q, replies.get(q.id)) for q in questions]

    def _answer(self, question: Question, reply: str | None) -> Answer:
        if reply is None:
            return Answer(value=None, judge=self.who)
        return Answer(value=question.read(reply), judge=self.who, reply=reply, kept=True)

    def open_prompts(self, questions: Sequence[Question] | None = None) -> int:
        """How many exported prompts have no reply: of all, or of some."""
        exported = self._exported()
        wanted = exported if questions is None else exported & {q.id for q in questions}
        return len(wanted - self._replies().keys())

    def _replies(self) -> dict[str, str]:
        lines = read_lines(Path(self.folder) / REPLIES_FILE, "reply")
        return {key: str(entry["reply"]) for key, entry in lines.items()}

    def _exported(self) -> set[str]:
        return set(read_lines(Path(self.folder) / PROMPTS_FILE, "prompt"))


@checked
@JUDGES.register("person")
@dataclass(frozen=True)
class PersonJudge(OneLine):
    """A person who is shown one question at a time, in random order, and types a number.

    Replies are kept as they come, in the format of `FileJudge`. After an interruption (Ctrl-C) run the same work
    again: what has a reply is not asked again.

    Attributes:
        folder: of the replies.
        who: who judges; shown with the scores.
        prompt: shows a text and returns what was typed; in a notebook or at a terminal `input`.
        seed: of the order, which must not give away which questions belong together.
    """

    folder: str | Path
    who: str = "a person"
    prompt: Callable[[str], str] = input
    seed: int = 0

    @property
    def name(self) -> str:
        """Who judges."""
        return self.who

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question; no value where the person typed nothing."""
        path = Path(self.folder) / REPLIES_FILE
        replies = read_lines(path, "reply")
        missing = list({q.id: q for q in questions if q.id not in replies}.values())
        for place, i in enumerate(np.random.default_rng(self.seed).permutation(len(missing))):
            reply = self._typed(missing[i], left=len(missing) - place)
            append_lines(path, [{"id": missing[i].id, "reply": reply}])
        return FileJudge(self.folder, self.who).ask(questions)

    def _typed(self, question: Question, left: int) -> str:
        """What the person typed: nothing, or a number on the scale."""
        shown = f"{question.text}\n[0 to {question.highest}, empty for no answer; {left} to go] "
        while True:
            typed = self.prompt(shown).strip()
            if not typed or question.read(typed) is not None:
                return typed
            shown = f"{typed!r} is no number from 0 to {question.highest}: "


def read_lines(path: Path, key: str) -> dict[str, Mapping[str, object]]:
    """The entries of a file of JSON lines by their "id"; of several with one id the last. Empty if there is no file.

    Raises:
        CorruptFileError: if a line is not JSON, or lacks "id" or `key`.
    """
    entries: dict[str, Mapping[str, object]] = {}
    if not path.is_file():
        return entries
    # Split at line feeds alone: JSON may hold other characters that Python takes for the end of a line.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        with content_of(f"{path}, line {number},", f'A line is {{"id": ..., "{key}": ...}}. Correct or remove it.'):
            entry = parse_json(line, f"{path}, line {number},", dict, remedy="Correct or remove that line.")
            entries[str(entry["id"])] = {**entry, key: entry[key]}
    return entries


def append_lines(path: Path, entries: Sequence[Mapping[str, object]]) -> None:
    """Adds one JSON line per entry; the folder is made where it is missing."""
    if entries:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
