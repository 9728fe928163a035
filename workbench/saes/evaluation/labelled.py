"""Labelled sets for probing that need no download: labels of tokens, and texts that every Python installation has."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.core.codec import token_bytes
from workbench.core.errors import DegenerateInputError
from workbench.core.tokenizer import TokenizerLike
from workbench.core.tokens import TokenBatch
from workbench.saes.evaluation.stdlib_sources import library_files, library_root, parsed

UNLABELLED = -1


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of two classes, 0 and 1; those of one document are never split between training and test."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    documents: tuple[str, ...]


TOKEN_LABELS: dict[str, Callable[[str], bool]] = {
    "digit": lambda text: text.strip().isdigit(),
    "capitalised": lambda text: text.strip()[:1].isupper(),
    "newline": lambda text: "\n" in text,
    "begins a word": lambda text: text.startswith(" ") and text.strip().isalpha(),
    "punctuation": lambda text: bool(text.strip()) and not any(c.isalnum() for c in text),
}
"""Labels that a token's text decides."""


def token_texts(tokenizer: TokenizerLike) -> list[str]:
    """The text of every token id with its leading space, which decoding it alone drops for SentencePiece."""
    return [text.decode(errors="replace") for text in token_bytes(tokenizer)]


def token_labels(
    batch: TokenBatch, texts: Sequence[str], entropy: Float[Tensor, "rows pos"] | None = None
) -> dict[str, Int[Tensor, "rows pos"]]:
    """Labels 0 and 1 for every token of a batch by the name of the set; padding is -1.

    `texts` is the text of each token id, see `token_texts`. The entropy of the model's next-token distribution adds the
    set "uncertain next token", above its median.
    """
    # embeddings may be padded beyond the tokenizer
    used = {int(i): texts[int(i)] if i < len(texts) else "" for i in batch.ids.unique()}
    labels = {}
    for name, rule in TOKEN_LABELS.items():
        table = {i: int(rule(text)) for i, text in used.items()}
        labels[name] = torch.tensor([[table[int(i)] for i in row] for row in batch.ids])
    lengths = batch.lengths[:, None]
    labels["second half of the row"] = (2 * batch.positions >= lengths).long().cpu()
    if entropy is not None:
        labels["uncertain next token"] = (entropy > entropy[batch.mask].median()).long().cpu()
    return {name: value.masked_fill(~batch.mask.cpu(), UNLABELLED) for name, value in labels.items()}


def local_text_sets(per_class: int = 200, words: int = 40) -> tuple[LabelledTexts, ...]:
    """Balanced sets from the standard library of this Python; the same installation always gives the same sets.

    A class has at most `per_class` texts, each cut after `words` words.

    "code or docstring", "loop or no loop" and "method or function". A document is a module.

    Raises:
        DegenerateInputError: if the standard library is not there as source.
    """
    pools: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
        name: ([], []) for name in ("code or docstring", "loop or no loop", "method or function")
    }
    for function in _library_functions():
        module, doc, code = function.module, function.doc, function.code
        if len(doc.split()) >= 12:
            pools["code or docstring"][0].append((module, _cut(doc, words)))
            pools["code or docstring"][1].append((module, _cut(code, words)))
        if 12 <= len(code.split()) <= words:
            pools["loop or no loop"][function.loops].append((module, code))
            pools["method or function"][function.top_level].append((module, code))
    return tuple(_balanced(name, *pool, per_class) for name, pool in pools.items())


def _balanced(
    name: str, negative: list[tuple[str, str]], positive: list[tuple[str, str]], per_class: int
) -> LabelledTexts:
    """Every n-th text of each class, so that all of the alphabet of modules is in."""
    n = min(len(negative), len(positive), per_class)
    if n < 10:
        raise DegenerateInputError(
            f"The set {name!r} has {n} texts per class; the standard library of this Python has no source files. Give "
            "labelled texts of your own."
        )
    rows = [
        (label, *pool[i * len(pool) // n])
        for label, pool in enumerate((negative, positive))
        for i in range(n)
    ]  # fmt: skip
    return LabelledTexts(
        name, tuple(text for _, _, text in rows), tuple(label for label, _, _ in rows),
        tuple(module for _, module, _ in rows),
    )  # fmt: skip


@dataclass(frozen=True)
class _Function:
    module: str
    doc: str
    code: str
    loops: bool
    top_level: bool


@functools.cache
def _library_functions() -> tuple[_Function, ...]:
    """Functions and methods of the standard library; parsing it takes seconds, and it does not change."""
    return tuple(
        _Function(
            module, ast.get_docstring(node) or "", _code(node),
            any(isinstance(inner, ast.For | ast.While) for inner in ast.walk(node)), isinstance(parent, ast.Module),
        )
        for module, tree in _modules() for node, parent in _functions(tree)
    )  # fmt: skip


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """The modules that are one file of the library, without its packages."""
    for path in library_files():
        tree = parsed(path) if path.parent == library_root() else None
        if tree is not None:
            yield path.stem, tree


def _functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, ast.AST]]:
    for parent in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in parent.body:
            if isinstance(node, ast.FunctionDef):
                yield node, parent


def _code(node: ast.FunctionDef) -> str:
    """Source without docstring, comments and indentation of its own."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    bare = copy.copy(node)
    bare.body, bare.decorator_list = body, []
    return ast.unparse(bare)


def _cut(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])
