"""A model behind an OpenAI-compatible server as judge."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from workbench.core.arguments import checked
from workbench.core.display import OneLine
from workbench.core.errors import CorruptFileError, InvalidInputError, ModelUnavailableError, UnknownConfigKeyError
from workbench.core.progress import track
from workbench.core.records import from_jsonable
from workbench.engine.keeper import Keeper
from workbench.engine.log import Log
from workbench.judges.protocol import JUDGES, Answer, Question

if TYPE_CHECKING:
    import httpx  # imports rich, so it is loaded when a server is asked

PASSING_STATUSES = (408, 409, 429)
"""Failures that may pass, beside all from 500 on."""
PROMPT_REFUSED_STATUSES = (400, 413, 422)
"""Per-prompt server errors, such as a content-filter rejection or a prompt that is too long."""
MAX_REFUSALS_BEFORE_REPLY = 3
"""So many refused prompts, without a reply to any, mean that the server refuses all."""
MAX_TOKENS_OF_DIGIT = 4
MAX_TOKENS_OF_REASONS = 300
MIN_DIGIT_MASS = 0.05
"""Probability of all digits together below which a reply is read as text."""


@checked
@JUDGES.register("http")
@dataclass(frozen=True)
class HTTPJudge(OneLine):
    """A model behind an OpenAI-compatible server; nothing is sent before `ask` is called.

    Proxies and certificates are taken from the environment, as httpx does. Redirects are not followed: they would
    carry the key to another server.

    Attributes:
        url: of the API, such as "https://example.org/v1".
        model: name of the model there.
        key_variable: environment variable that holds the key; the key itself is never kept or shown.
        timeout: seconds to wait for the connection, and then for each further part of a reply.
        retries: further attempts after a failure that may pass (no connection, 408, 409, 429, 5xx).
        wait: seconds before the first further attempt; doubled each time.
        logprobs: ask for log-probabilities, which give graded answers where the server has them.
        cache: folder in which a keeper has the answers as they come; what it holds is not asked again. Without it this
            object alone remembers them.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 3
    wait: float = 1.0
    logprobs: bool = True
    cache: str | Path | None = None
    _known: dict[int, Answer] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _is_plain(self.url):
            raise InvalidInputError(
                "HTTPJudge: the address must look like https://host/v1, without user, password or query. Put the key "
                "into an environment variable."
            )
        if self.timeout <= 0 or self.retries < 0 or self.wait < 0:
            raise InvalidInputError(f"{self}: timeout must be positive, retries and wait not negative.")

    @property
    def name(self) -> str:
        """Model and host."""
        return f"{self.model} at {urlsplit(self.url).hostname}"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One request per question, at temperature 0; no value where the server refuses one prompt and answers others.

        Raises:
            ModelUnavailableError: if the server refuses all, or fails after all attempts; what it answered is kept.
            CorruptFileError: if a line of the cache is not what it should be.
        """
        if self._log is not None and not self._known:
            self._known.update({key: _kept(row, self.name) for key, row in self._log.done().items()})
        keys = [int(Question(f"{question}").id, 16) for question in questions]
        earlier = set(self._known)
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in earlier}
        if missing:
            self._ask_missing(missing, has_reply=any(self._known[key].value is not None for key in earlier & {*keys}))
        return [replace(self._known[key], kept=key in earlier) for key in keys]

    @cached_property
    def _log(self) -> Log | None:
        """Where answers are kept; those of another server, model or kind of reply are in another folder."""
        if self.cache is None:
            return None
        key = {"url": self.url, "model": self.model, "logprobs": self.logprobs}
        return Keeper.of_key(self.cache, key).log("answers", "question")

    def _ask_missing(self, missing: Mapping[int, Question], has_reply: bool) -> None:
        refused: list[int] = []  # until there is a reply the server may mean all prompts
        with self._client() as client:
            for key, question in track(list(missing.items()), description=self.name, unit="replies"):
                answer = self._asked(client, question)
                if isinstance(answer, Answer):
                    has_reply = True
                    self._keep(key, answer)
                else:
                    refused.append(key)
                    if not has_reply and len(refused) >= min(MAX_REFUSALS_BEFORE_REPLY, len(missing)):
                        raise self._unavailable(answer)
                while has_reply and refused:
                    self._keep(refused.pop(), Answer(value=None, judge=self.name))

    def _keep(self, key: int, answer: Answer) -> None:
        self._known[key] = answer
        if self._log is not None:
            self._log.append([{"question": key, "value": answer.value, "reply": answer.reply, "tokens": answer.tokens}])

    def _client(self) -> httpx.Client:
        import httpx

        headers = {}
        if key := os.environ.get(self.key_variable):
            if not (key.isascii() and key.isprintable()):
                raise InvalidInputError(
                    f"The key in {self.key_variable} holds a line break or other characters that no header may have. "
                    "Set it again."
                )
            headers["Authorization"] = f"Bearer {key}"
        return httpx.Client(base_url=self.url, headers=headers, timeout=self.timeout)

    def _asked(self, client: httpx.Client, question: Question) -> Answer | str:
        """The answer, or why the server refuses this prompt."""
        import httpx
        import tenacity

        body = {
            "model": self.model, "messages": [{"role": "user", "content": question.text}], "temperature": 0,
            "max_tokens": MAX_TOKENS_OF_REASONS if question.reasons else MAX_TOKENS_OF_DIGIT,
        }  # fmt: skip
        if self.logprobs and not question.reasons:
            body |= {"logprobs": True, "top_logprobs": max(5, question.highest + 1)}
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass), stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=tenacity.wait_exponential(multiplier=self.wait), reraise=True,
        )  # fmt: skip
        try:
            reply, seconds = attempts(_reply, client, body)
        except httpx.HTTPStatusError as error:
            problem = f"status {error.response.status_code}"
            if error.response.status_code in PROMPT_REFUSED_STATUSES:
                return problem
            raise self._unavailable(problem) from None
        except httpx.RequestError as error:
            raise self._unavailable(f"no connection: {type(error).__name__}") from None
        except (ValueError, RecursionError):
            raise self._unavailable("the reply is not JSON") from None
        return _answer(reply, question, self.name, seconds)

    def _unavailable(self, problem: str) -> ModelUnavailableError:
        return ModelUnavailableError(
            f"{self.name} gave no reply ({problem}). Check the address, the model's name and the variable "
            f"{self.key_variable}, or use FileJudge."
        )


def _is_plain(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username and not parts.query


def _reply(client: httpx.Client, body: Mapping[str, object]) -> tuple[object, float]:
    """The parsed reply, and the seconds that it took."""
    response = client.post("/chat/completions", json=body)
    response.raise_for_status()
    return response.json(), response.elapsed.total_seconds()


def _may_pass(error: BaseException) -> bool:
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in PASSING_STATUSES or error.response.status_code >= 500
    return isinstance(error, httpx.RequestError | ValueError | RecursionError)


def _kept(row: Mapping[str, object], judge: str) -> Answer:
    """An answer of an earlier run."""
    try:
        return from_jsonable(Answer, {**{k: v for k, v in row.items() if k != "question"}, "judge": judge})
    except (InvalidInputError, UnknownConfigKeyError) as error:
        raise CorruptFileError(
            f"The kept answer to question {row['question']} of {judge} can't be read ({error}). Delete its line, and "
            "it is asked again."
        ) from None


def _answer(reply: Any, question: Question, judge: str, seconds: float) -> Answer:
    """What a server's JSON says, which may have any form."""
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        value = None if question.reasons else _graded(choice, question.highest)
        if value is None and isinstance(text, str):
            value = question.read(text)
    except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError):
        text = value = None
    try:
        tokens = int(reply["usage"]["total_tokens"])
    except (KeyError, TypeError, ValueError, OverflowError):
        tokens = 0
    return Answer(value=value, judge=judge, reply=text if isinstance(text, str) else "", tokens=tokens, seconds=seconds)


def _graded(choice: Any, highest: int) -> float | None:
    """The mean of the digits, weighted by their probabilities; None where the server gives no probabilities of them.

    Raises:
        ArithmeticError: if a probability is above 1.
    """
    tops = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
    p = [(str(top["token"]).strip(), math.exp(top["logprob"])) for top in tops]
    if any(value > 1.01 for _, value in p):
        raise ArithmeticError("a probability above 1")
    masses = [sum(value for token, value in p if token == str(digit)) for digit in range(highest + 1)]
    if sum(masses) < MIN_DIGIT_MASS:
        return None
    return sum(digit * mass for digit, mass in enumerate(masses)) / sum(masses)
