"""What belongs to an SAE: its folder names the model and the store it was trained on, and holds its table and cards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from workbench.core.errors import CorruptFileError, MissingFileError
from workbench.core.records import load_json, save_json
from workbench.saes.formats.load import CONFIG_FILE

HOME_FILE = "home.json"


@dataclass(frozen=True)
class SAEHome:
    """The places of all that belongs to an SAE, found from its folder alone.

    Attributes:
        folder: of the SAE.
    """

    folder: Path

    @property
    def cards(self) -> Path:
        """Where its feature cards lie."""
        return self.folder / "cards"

    @property
    def table(self) -> Path:
        """Where its feature table lies."""
        return self.folder / "features"

    @property
    def model(self) -> str | None:
        """The model that it was trained on, as `load_model` takes it; None if that is not known."""
        named = self._noted().get("model")
        if named is None and (self.folder / CONFIG_FILE).is_file():
            metadata = load_json(self.folder / CONFIG_FILE, dict).get("metadata")
            hub_id = metadata.get("model_name") if isinstance(metadata, dict) else None
            named = hub_id if isinstance(hub_id, str) and hub_id.count("/") == 1 else None
        return named

    @property
    def store(self) -> Path | str | None:
        """Folder or address of the activations that it was trained on; None if that is not known."""
        named = self._noted().get("store")
        if named is None or _is_address(named):
            return named
        return Path(os.path.normpath(self.folder / named))

    def require_store(self) -> Path | str:
        """The store.

        Raises:
            MissingFileError: if it is not known or no longer there.
        """
        store = self.store
        if store is None:
            lack = "does not say which store it was trained on" if self.folder.is_dir() else "is no folder here"
            raise MissingFileError(f"{self.folder} {lack}. Give --store FOLDER.")
        if isinstance(store, Path) and not store.is_dir():
            raise MissingFileError(
                f"The store that {self.folder} was trained on is no longer at {store}. Give --store FOLDER."
            )
        return store

    def note(self, model: str | None, store: Path | str) -> None:
        """Writes down the model and the store; a folder by its way from here, so that both can be moved together."""
        place = str(store) if _is_address(str(store)) else os.path.relpath(Path(store).resolve(), self.folder.resolve())
        save_json(self.folder / HOME_FILE, {"model": model, "store": place})

    def _noted(self) -> dict[str, str]:
        file = self.folder / HOME_FILE
        noted = load_json(file, dict) if file.is_file() else {}
        wrong = [name for name in ("model", "store") if not isinstance(noted.get(name), str | None)]
        if wrong:
            raise CorruptFileError(f"{file}: {wrong[0]} is no text. Correct it, or delete the file and name both.")
        return {name: value for name, value in noted.items() if value is not None}


def _is_address(place: str) -> bool:
    return "://" in place
