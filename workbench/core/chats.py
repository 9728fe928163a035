"""Chat messages through a tokenizer's template, refused where the template can't or does not write what they say."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from workbench.core.display import first_few
from workbench.core.errors import InvalidInputError, did_you_mean
from workbench.core.tokenizer import TokenizerLike

Message = Mapping[str, Any]
"""A role with a text, a list of parts or a tool call: what may be in it is up to the template."""
Chat = Sequence[Message]

_GIVEN = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Names that every template gets."""
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""Marks of what the assistant wrote, which transformers adds to Jinja's language."""


def is_chat(value: object) -> bool:
    """Whether this is one list of messages."""
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], Mapping)


def rendered(tokenizer: TokenizerLike, chat: Chat, options: Mapping[str, object] | None = None) -> str:
    """The text that the tokenizer's template makes of a chat, with the generation prompt.

    Every message has to appear in it: the template is run once more with marks in place of the texts, and each mark has
    to come out. So a template may change a text (strip it, drop `<think>`), and may not leave one out.

    Raises:
        InvalidInputError: without a template; for messages that it refuses, leaves out or writes as objects; for
            an option that it does not have; for a template that fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError("tokens(chat): this tokenizer has no chat template. Give plain text instead.")
    options = options or {}
    known = template_options(tokenizer) if options else frozenset()
    for name in options:
        if name not in known:
            has = f"has no such option. {did_you_mean(name, known)}" if known else "has no options."
            raise InvalidInputError(f"tokens(chat, {name}=...): the chat template {has} Leave it out.")
    texts = [_texts(chat, i) for i in range(len(chat))]
    text = _run(tokenizer, chat, options)
    _require_whole(tokenizer, chat, texts, text, options)
    return text


def _run(tokenizer: TokenizerLike, chat: Chat, options: Mapping[str, object]) -> str:
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in chat], tokenize=False, add_generation_prompt=True, **options
        )
    except Exception as error:  # a template is a program: it may raise anything
        roles = ", ".join(str(message.get("role")) for message in chat[:6]) + (", …" if len(chat) > 6 else "")
        raise InvalidInputError(
            f"The chat template refuses or can't write these {len(chat)} messages (roles {roles}): "
            f"{type(error).__name__}: {str(error).strip()[:300]}. Give messages that it takes, or set "
            "tokenizer.chat_template."
        ) from error


def _texts(chat: Chat, i: int) -> tuple[str, ...]:
    """The texts of a message; empty for one that has none on purpose, such as a tool call."""
    message = chat[i]
    if not isinstance(message, Mapping):
        raise InvalidInputError(f"tokens(chat): message {i} is a {type(message).__name__}; give role and content.")
    content = message.get("content")
    if content is None:
        if len(set(message) - {"role", "content"}) and message.get("role") != "user":
            return ()
        raise InvalidInputError(
            f"tokens(chat): message {i} ({message.get('role')}) has no 'content', but {first_few(sorted(message))}. "
            f"{did_you_mean('content', message)} Write its text as 'content'."
        )
    if isinstance(content, str):
        return (content,)
    if isinstance(content, Sequence):
        return tuple(text for part in content if isinstance(text := _text_of(part), str))
    raise InvalidInputError(
        f"tokens(chat): the content of message {i} ({message.get('role')}) is a {type(content).__name__}; give a text "
        "or a list of parts."
    )


def _text_of(part: object) -> object:
    return part.get("text") if isinstance(part, Mapping) else part


def _require_whole(
    tokenizer: TokenizerLike, chat: Chat, texts: Sequence[tuple[str, ...]], text: str, options: Mapping[str, object]
) -> None:
    """Raises for a message whose text is not in the prompt, or there only as a Python object."""
    try:
        marked = _run(tokenizer, [_marked(message, i) for i, message in enumerate(chat)], options).casefold()
    except InvalidInputError:  # a template that asks what the texts are: look for them themselves
        marked = None
    squeezed = _squeezed(text)
    for i, (message, said) in enumerate(zip(chat, texts, strict=True)):
        is_there = [
            _squeezed(one) in squeezed if marked is None else _mark(i, k) in marked
            for k, one in enumerate(said) if one.strip()
        ]  # fmt: skip
        if not all(is_there):
            advice = "the content as one text."
            if isinstance(message.get("content"), str):
                advice = "a list of parts, [{'type': 'text', 'text': ...}], or have no place for this role."
            raise InvalidInputError(
                f"tokens(chat): the template leaves out the text of message {i} ({message.get('role')}), "
                f"{_clipped(said)}. It may want {advice}"
            )
        if any(shown in text for shown in _as_objects(message)):
            raise InvalidInputError(
                f"tokens(chat): the template writes the parts of message {i} ({message.get('role')}) as objects, "
                f"{_clipped(map(repr, message['content']))}, not as text. Give its content as one text."
            )


def _as_objects(message: Message) -> list[str]:
    """How a list of parts looks where a template prints it as it is; results of tools may look so on purpose."""
    content = message.get("content")
    if not content or isinstance(content, str) or message.get("role") == "tool":
        return []
    parts = [part for part in content if isinstance(part, Mapping)]
    return [repr(content), *map(repr, parts), *(json.dumps(part, ensure_ascii=False, default=str) for part in parts)]


def _clipped(texts: Iterable[str]) -> str:
    joined = " ".join(texts)
    return repr(joined[:60] + ("…" if len(joined) > 60 else ""))


def _marked(message: Message, i: int) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        content = _mark(i, 0) if content.strip() else content
    elif content is not None:
        content, k = list(content), 0
        for at, part in enumerate(content):
            if isinstance(text := _text_of(part), str):
                mark = _mark(i, k) if text.strip() else text
                content[at] = {**part, "text": mark} if isinstance(part, Mapping) else mark
                k += 1
    return {**message, "content": content}


def _mark(i: int, k: int) -> str:
    return f"qzmessage{i}part{k}zq"


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


def template_options(tokenizer: TokenizerLike) -> frozenset[str]:
    """Names that the tokenizer's chat template asks for, apart from the messages and the special tokens."""
    written = tokenizer.chat_template
    sources = list(written.values()) if isinstance(written, Mapping) else [written]
    asked = frozenset().union(*map(_asked, sources)) - _GIVEN
    return frozenset(name for name in asked if not name.endswith(("_token", "_tokens")))


@functools.lru_cache(maxsize=16)
def _asked(source: str) -> frozenset[str]:
    from jinja2 import TemplateError, meta
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    try:
        asked = meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", source)))
        return frozenset(asked) - set(environment.globals)
    except TemplateError:  # running it will say what is wrong
        return frozenset()
