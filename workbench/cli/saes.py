"""What the commands that work with an SAE share: they find its model, store, table and cards from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from workbench.cli.base import LoadsModel
from workbench.cli.places import RUNS, sae_folder

if TYPE_CHECKING:
    from workbench.saes.home import SAEHome


@dataclass(frozen=True, kw_only=True)
class SAECommand(LoadsModel):
    """A command that works with an SAE, whose folder says which model and store are its own."""

    model: str | None = None
    """Model: "embedded", a Hugging Face id, a folder or a .gguf file; by default that of the SAE, or "embedded"."""

    def sae_path(self) -> Path | None:
        """Folder of the SAE; None if none was given."""
        raise NotImplementedError(f"{type(self).__name__} has no sae_path(). Define it.")

    def runs_folder(self) -> Path:
        """Where runs are looked up by name."""
        return RUNS

    def home(self) -> SAEHome:
        """What belongs to the SAE."""
        from workbench.saes.home import SAEHome

        return SAEHome(self.sae_path() or Path())

    def model_name(self) -> str:
        """What `--model` says, or what the SAE was trained on."""
        path = self.sae_path()  # one that does not exist is met before a model is loaded
        return self.model or (None if path is None else self.home().model) or "embedded"


@dataclass(frozen=True, kw_only=True)
class OneSAE(SAECommand):
    """A command whose first argument is an SAE."""

    sae: tyro.conf.Positional[Path]
    """SAE: its folder, or a run that holds one (folder, name or latest)."""

    def sae_path(self) -> Path:
        """Folder of the SAE."""
        return sae_folder(self.sae, self.runs_folder())
