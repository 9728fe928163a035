"""Three judges: the log-probabilities of a local model, an OpenAI-compatible server, and files for anyone."""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from workbench.core.errors import CorruptFileError, InvalidInputError, ModelUnavailableError
from workbench.core.jsontext import content_of, parse_json
from workbench.core.progress import track
from workbench.core.records import read_text
from workbench.core.tokenizer import continuation, text_ids
from workbench.features.explain.judging import parse_rating, parse_reply
from workbench.models.model import Model

PROMPTS_FILE = "export-prompts.jsonl"
REPLIES_FILE = "import-replies.jsonl"
REFUSALS = ("status 400", "status 413", "status 422")
"""What a server says of a single prompt, such as one that its filter stops or that is too long."""
ALL_REFUSED = 3
"""So many refusals without a reply before them are taken as the server's word on all prompts."""
LONGEST_REASONS = 300
"""Tokens that a server may write before and with a rating."""
_BEFORE = "Rating:"
LEAST_MASS = 0.05
"""Probability of the two digits together below which a reply is read as text."""


@dataclass(frozen=True, eq=False)
class LogProbJudge:
    """A local model, read by P("1") / (P("0") + P("1")) and never by the text it writes.

    Attributes:
        model: who judges.
        batch: prompts per forward pass.
    """

    model: Model
    batch: int = 16

    @property
    def name(self) -> str:
        """The model's name."""
        return f"log-probabilities of {self.model.name}"

    def answer(self, prompts: Sequence[str]) -> list[float | None]:
        """The probability of "1" among the two digits, as the next token.

        Raises:
            InvalidInputError: if the digits are not single tokens.
        """
        return self._expected(prompts, "01")

    def rate(self, prompts: Sequence[str]) -> list[float | None]:
        """The mean of the digits 0, 1 and 2 as the next token, weighted by their probabilities.

        Raises:
            InvalidInputError: if the digits are not single tokens.
        """
        return self._expected(prompts, "012")

    def _expected(self, prompts: Sequence[str], digits: str) -> list[float | None]:
        shared, ids = self._digits(digits)
        values = torch.tensor([float(d) for d in digits])
        found: list[float | None] = []
        for start in range(0, len(prompts), self.batch):
            texts = [prompt + shared for prompt in prompts[start : start + self.batch]]
            found += (self.model.logits(texts, tokens=ids).softmax(-1).cpu() @ values).tolist()
        return found

    def _digits(self, digits: str) -> tuple[str, list[int]]:
        """What stands between a prompt and the digit, and the ids of the digits."""
        # Behind a text, since alone a SentencePiece tokenizer would put a second space in front.
        before = text_ids(self.model.tokenizer, _BEFORE)
        every = [text_ids(self.model.tokenizer, f"{_BEFORE} {d}")[len(before) :] for d in digits]
        first, *others = every
        if any(ids[:-1] != first[:-1] for ids in others) or len({ids[-1] for ids in every}) < len(every):
            raise InvalidInputError(
                f"The tokenizer of {self.model.name} writes the digits {' '.join(digits)} behind a space as {every}, "
                "which do not differ in their last token alone. Use another judge."
            )
        return continuation(self.model.tokenizer, before, first[:-1]), [ids[-1] for ids in every]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:  # noqa: D102
        del req, fp, code, msg, headers, newurl


@dataclass(frozen=True)
class HTTPJudge:
    """A model behind an OpenAI-compatible server; nothing is sent before `answer` is called.

    Attributes:
        url: of the API, such as "https://example.org/v1".
        model: name of the model there.
        key_variable: environment variable that holds the key; the key itself is never kept or shown.
        timeout: seconds to wait for the connection, and then for each further part of a reply.
        retries: further attempts after a failure that may pass (no connection, 408, 409, 429, 5xx).
        wait: seconds before the first further attempt; doubled each time.
        logprobs: ask for log-probabilities, which give graded answers where the server has them.
        cache: file in which replies are kept as they come, one JSON line each; what it holds is not asked again.
            Without it this object alone remembers them.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 3
    wait: float = 1.0
    logprobs: bool = True
    cache: str | Path | None = None
    _known: dict[str, float | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
        except ValueError:
            parts = urllib.parse.urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise InvalidInputError(
                "HTTPJudge: the address must look like https://host/v1, without user, password or query. Put the key "
                "into an environment variable."
            )
        if self.timeout <= 0 or self.retries < 0 or self.wait < 0:
            raise InvalidInputError(f"{self}: timeout must be positive, retries and wait not negative.")

    @property
    def name(self) -> str:
        """Model and host."""
        return f"{self.model} at {urllib.parse.urlsplit(self.url).hostname}"

    def answer(self, prompts: Sequence[str]) -> list[float | None]:
        """One request per prompt, at temperature 0; None where the server refuses one prompt and answers others.

        Raises:
            ModelUnavailableError: if the server refuses all, or fails after all attempts; what it answered is kept.
            CorruptFileError: if a line of the cache is not what it should be.
        """
        return self._ask(prompts, _digit_in, f"{self.logprobs}", 4, self.logprobs)

    def rate(self, prompts: Sequence[str]) -> list[float | None]:
        """The last rating in each reply, which may give reasons first; otherwise as `answer`."""
        return self._ask(prompts, _rating_in, "rating", LONGEST_REASONS, False)

    def _ask(
        self, prompts: Sequence[str], read: Callable[[Any], float | None], kind: str, max_tokens: int, logprobs: bool
    ) -> list[float | None]:
        if self.cache is not None and not self._known:
            self._known.update(self._cached(Path(self.cache)))
        keys = [prompt_id(f"{self.url} {self.model} {kind} {prompt}") for prompt in prompts]
        unknown = {key for key in keys if key not in self._known}
        replied = any(self._known.get(key) is not None for key in keys)
        refused: list[str] = []  # until there is a reply these may be the server's word on all prompts
        for key, prompt in track(list(zip(keys, prompts, strict=True)), description=self.name, unit="replies"):
            if key in self._known or key in refused:
                continue
            reply, problem = self._post(prompt, max_tokens, logprobs)
            if problem is None:
                replied = True
                self._keep(key, read(reply))
            else:
                refused.append(key)
                if not replied and len(refused) >= min(ALL_REFUSED, len(unknown)):
                    raise self._unavailable(problem)
            while replied and refused:
                self._keep(refused.pop(), None)
        return [self._known[key] for key in keys]

    def _cached(self, path: Path) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for key, p in _lines(path, "p").items():
            try:
                found[key] = None if p == "None" else float(p)
            except ValueError:
                raise CorruptFileError(
                    f'{path}: the reply {key!r} has "p": {p[:40]!r}, which is no number. Remove that line.'
                ) from None
        return found

    def _keep(self, key: str, p: float | None) -> None:
        self._known[key] = p
        if self.cache is not None:
            Path(self.cache).parent.mkdir(parents=True, exist_ok=True)
            with open(self.cache, "a", encoding="utf-8") as file:
                file.write(json.dumps({"id": key, "p": p}) + "\n")

    def _post(self, prompt: str, max_tokens: int, logprobs: bool) -> tuple[Any, str | None]:
        """The reply, or why the server refuses this prompt."""
        messages = [{"role": "user", "content": prompt}]
        body: dict[str, Any] = {
            "model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens,
        }  # fmt: skip
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": 5}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            if not (key.isascii() and key.isprintable()):
                raise InvalidInputError(
                    f"The key in {self.key_variable} holds a line break or other characters that no header may have. "
                    "Set it anew."
                )
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        problem: str | None = None
        for attempt in range(self.retries + 1):
            problem, passing, reply = self._attempt(request)
            if problem is None or problem in REFUSALS:
                return reply, problem
            if not passing:
                break
            if attempt < self.retries:
                time.sleep(self.wait * 2**attempt)
        raise self._unavailable(problem)

    def _unavailable(self, problem: str | None) -> ModelUnavailableError:
        return ModelUnavailableError(
            f"{self.name} gave no reply ({problem}). Check the address, the model's name and the variable "
            f"{self.key_variable}, or use FileJudge."
        )

    def _attempt(self, request: urllib.request.Request) -> tuple[str | None, bool, Any]:
        """What went wrong, whether it may pass, and the reply."""
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=self.timeout) as response:
                return None, False, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return f"status {error.code}", error.code in (408, 409, 429) or error.code >= 500, None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            return f"no connection: {type(error).__name__}", True, None
        except (ValueError, RecursionError):
            return "the reply is not JSON", True, None


def _digit_in(reply: Any) -> float | None:
    """The probability of "1", by log-probabilities where the server gives them."""
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        tops = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        p = [(str(top["token"]).strip(), math.exp(top["logprob"])) for top in tops]
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError):
        return None
    if any(value > 1.01 for _, value in p):
        return None
    digits = [sum(value for token, value in p if token == digit) for digit in "01"]
    if sum(digits) >= LEAST_MASS:
        return digits[1] / sum(digits)
    return parse_reply(text) if isinstance(text, str) else None


def _rating_in(reply: Any) -> float | None:
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return parse_rating(text) if isinstance(text, str) else None


@dataclass(frozen=True)
class FileJudge:
    """Anyone who reads files: prompts are written to one file, replies are read from another.

    `answer` appends the prompts that have no reply yet to `export-prompts.jsonl` ({"id", "prompt"} per line) and gives
    None for them. Write {"id", "reply"} per line, the reply "1" or "0", to `import-replies.jsonl` in the same folder,
    and run the same work again.

    Attributes:
        folder: of both files.
        who: what stands beside the scores.
    """

    folder: str | Path
    who: str = "replies from a file"

    @property
    def name(self) -> str:
        """Who judges."""
        return self.who

    def answer(self, prompts: Sequence[str]) -> list[float | None]:
        """The replies that there are; None, and a line in the prompts file, for the others.

        Raises:
            CorruptFileError: if a line of either file is not what it should be.
        """
        return self._ask(prompts, parse_reply)

    def rate(self, prompts: Sequence[str]) -> list[float | None]:
        """The last rating in each reply that there is; otherwise as `answer`."""
        return self._ask(prompts, parse_rating)

    def _ask(self, prompts: Sequence[str], read: Callable[[str], float | None]) -> list[float | None]:
        replies = _lines(Path(self.folder) / REPLIES_FILE, "reply")
        asked = _lines(Path(self.folder) / PROMPTS_FILE, "prompt")
        new = {prompt_id(p): p for p in prompts if prompt_id(p) not in replies and prompt_id(p) not in asked}
        if new:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with open(Path(self.folder) / PROMPTS_FILE, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in new.items())
        found = [replies.get(prompt_id(prompt)) for prompt in prompts]
        return [None if reply is None else read(reply) for reply in found]

    def open_prompts(self, prompts: Sequence[str] | None = None) -> int:
        """How many exported prompts have no reply: of all, or of some."""
        replies = _lines(Path(self.folder) / REPLIES_FILE, "reply")
        asked = set(_lines(Path(self.folder) / PROMPTS_FILE, "prompt"))
        return len(asked - set(replies) if prompts is None else asked & {*map(prompt_id, prompts)} - set(replies))


def prompt_id(prompt: str) -> str:
    """By which a reply finds its prompt: the start of its SHA-256."""
    return hashlib.sha256(prompt.encode("utf-8", errors="backslashreplace")).hexdigest()[:16]


def _lines(path: Path, key: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if not path.is_file():
        return found
    # Split at line feeds alone: JSON may hold other characters that Python takes for the end of a line.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        with content_of(f"{path}, line {number},", f'A line is {{"id": ..., "{key}": ...}}. Correct or remove it.'):
            entry = parse_json(line, f"{path}, line {number},", dict, remedy="Correct or remove that line.")
            found[str(entry["id"])] = str(entry[key])
    return found
