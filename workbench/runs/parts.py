"""Parts of a long measurement that are kept as they are made, so that a stopped study measures none of them twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from workbench.core.records import from_jsonable, load_json, save_json, to_jsonable

T = TypeVar("T")


class Parts:
    """Results by name, a JSON file each, in a folder of their own for each key.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> Parts(folder.name, {"model": "a"}).get("mean", float, lambda: 0.5)
    0.5
    >>> Parts(folder.name, {"model": "a"}).get("mean", float, lambda: 1 / 0)
    0.5
    >>> folder.cleanup()
    """

    def __init__(self, folder: str | Path, key: Any) -> None:
        """Opens the folder that belongs to the key.

        Args:
            folder: of all keys.
            key: everything that results depend on, in any form that `to_jsonable` takes. Another key finds nothing.
        """
        text = json.dumps(to_jsonable(key), sort_keys=True)
        self._folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]

    def get(self, name: str, cls: type[T] | Any, make: Callable[[], T]) -> T:
        """The kept result, or the one that `make` returns, which is kept.

        Args:
            name: of the part; a file name.
            cls: its type, as `from_jsonable` takes it.
            make: called when there is none.

        Raises:
            CorruptFileError: if the file of the part is not JSON.
        """
        file = self._folder / f"{name}.json"
        if file.exists():
            return from_jsonable(cls, load_json(file))
        made = make()
        save_json(file, made)
        return made
