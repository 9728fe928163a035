"""Every error that the workbench raises on purpose.

WorkbenchError
├── UnknownNameError (LookupError)      a name that does not exist; says what is close
│   ├── UnknownSiteError                a site that this model does not have
│   └── UnknownConfigKeyError           a key that a config or file does not know
├── InvalidInputError (ValueError)      a value that cannot be used
│   ├── CallError (TypeError)           a call with an argument that does not exist, or without one that is needed
│   ├── ShapeError                      a tensor of the wrong shape
│   └── DegenerateInputError            input that leaves nothing to compute (no variance, no rows, zero norm)
├── EditError (RuntimeError)            an edit that did not happen as asked
├── NotExactlyExportable (ValueError)   an intervention that a file of this kind can't express exactly
├── MismatchError (ValueError)          two things that do not belong together (SAE of another model or site)
│   └── WidthError                      a basis of another width than its site; also a ShapeError
├── CorruptFileError (ValueError)       a file whose content is not what was written
├── MissingFileError (FileNotFoundError)
├── ModelUnavailableError (RuntimeError) the model can't be obtained
├── SelfCheckError (RuntimeError)       the loaded model fails its own identities
├── ResourceError (RuntimeError)        too little memory or disk for what was asked
└── ShardsFailed (RuntimeError)         some pieces of a long job raised; the others are kept

The text of each has three parts: what was asked (with value and shape), what exists, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WorkbenchError(Exception):
    """Root of all errors raised on purpose; catching it catches nothing else."""


class UnknownNameError(WorkbenchError, LookupError):
    """A name that does not exist."""


class UnknownSiteError(UnknownNameError):
    """A site that this model does not have, or that cannot be used as asked."""


class UnknownConfigKeyError(UnknownNameError):
    """A key that a config or a saved file does not know."""


class InvalidInputError(WorkbenchError, ValueError):
    """A value that cannot be used."""


class CallError(InvalidInputError, TypeError):
    """A call with an argument that does not exist, or without one that is needed."""


class ShapeError(InvalidInputError):
    """A tensor of the wrong shape."""


class DegenerateInputError(InvalidInputError):
    """Input that leaves nothing to compute: no rows, no variance, a zero vector."""


class EditError(WorkbenchError, RuntimeError):
    """An edit that did not happen as asked."""


class NotExactlyExportable(WorkbenchError, ValueError):
    """An intervention that a file of this kind cannot express exactly; the text gives the edit and the reason."""


class MismatchError(WorkbenchError, ValueError):
    """Two things that do not belong together, such as an SAE and another model."""


class WidthError(MismatchError, ShapeError):
    """A basis of another width than the site it is to read or write."""


class CorruptFileError(WorkbenchError, ValueError):
    """A file whose content is not what was written."""


class MissingFileError(WorkbenchError, FileNotFoundError):
    """A file or folder that is not there."""


class ModelUnavailableError(WorkbenchError, RuntimeError):
    """A model that can't be obtained: not on disk and not reachable."""


class SelfCheckError(WorkbenchError, RuntimeError):
    """A loaded model that fails its own identities."""


class ResourceError(WorkbenchError, RuntimeError):
    """Too little memory or disk for what was asked."""


class ShardsFailed(WorkbenchError, RuntimeError):
    """Some shards of a long job that raised; the text names each with its error, and the others are kept."""


def did_you_mean(asked: str, known: Iterable[str], limit: int = 3) -> str:
    """A sentence that names the closest known names, or all of a short list.

    >>> did_you_mean("resid_pst", ["resid_pre", "resid_post"])
    'Did you mean resid_post, resid_pre?'
    >>> did_you_mean("xyzzy", ["a", "b"])
    'Known: a, b.'
    """
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(asked, names, n=limit, cutoff=0.6)
    if close:
        return f"Did you mean {', '.join(close)}?"
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"Known: {shown}."


def told_apart(first: tuple[str | None, str], second: tuple[str | None, str]) -> tuple[str, str]:
    """Two models in words, from the name and fingerprint of each: by their names where these are known and differ.

    >>> told_apart(("gpt2", "0123456789ab"), ("pythia-70m", "ba9876543210"))
    ('gpt2', 'pythia-70m')
    >>> told_apart(("gpt2", "0123456789ab"), ("gpt2", "ba9876543210"))
    ('gpt2 (weights 0123456789ab)', 'gpt2 (weights ba9876543210)')
    """
    names = first[0], second[0]
    if None not in names and names[0] != names[1]:
        return str(names[0]), str(names[1])
    in_words = [f"{name} (weights {weights})" if name else f"model {weights}" for name, weights in (first, second)]
    return in_words[0], in_words[1]


def require_known(kind: str, asked: str, known: Iterable[str]) -> None:
    """Refuses a name that does not exist.

    Raises:
        UnknownNameError: with the names that are close.

    >>> require_known("colour", "rad", ["red", "blue"])
    Traceback (most recent call last):
    workbench.core.errors.UnknownNameError: There is no colour 'rad'. Did you mean red?
    """
    names = tuple(known)
    if asked not in names:
        raise UnknownNameError(f"There is no {kind} {asked!r}. {did_you_mean(asked, names)}")


def require(holds: bool, given: object, rule: str) -> None:
    """Refuses options that break a rule.

    Raises:
        InvalidInputError: with what was given and the rule.
    """
    if not holds:
        raise InvalidInputError(f"{given}: {rule}")
