"""A folder of SAEs, one per site of a model: its index, which says where each is and how good it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workbench.core.errors import CorruptFileError, InvalidInputError, MissingFileError
from workbench.core.records import from_jsonable, load_json, save_json
from workbench.core.stats import Estimate

INDEX_FILE = "saes.json"


@dataclass(frozen=True, kw_only=True)
class SiteSAE:
    """The SAE of one site, and what it leaves out on held-out tokens.

    Attributes:
        site: the site.
        folder: name of the SAE's folder inside the folder of all.
        fvu: unexplained over total variance; interval over packed rows.
        pca: the same for as many principal directions as the SAE has active features on a token.
        l0: active features per token.
        dead: share of the features that were silent on the last tokens of training.
        n_tokens: held-out tokens.
        seconds: of its training.
    """

    site: str
    folder: str
    fvu: Estimate
    pca: Estimate
    l0: float
    dead: float
    n_tokens: int
    seconds: float


@dataclass(frozen=True)
class SAEIndex:
    """What the index file holds.

    Attributes:
        model: what `load_model` takes to load the model; None if it was made in memory.
        max_fvu: limit above which an SAE counts as bad.
        saes: one per site, in the order of a forward pass.
    """

    model: str | None
    max_fvu: float
    saes: tuple[SiteSAE, ...]

    def save(self, folder: Path) -> None:
        """Writes the index file of a folder."""
        save_json(folder / INDEX_FILE, self)


def read_index(folder: str | Path) -> SAEIndex:
    """The index of a folder of SAEs.

    Raises:
        MissingFileError: if the folder has none.
        CorruptFileError: if it can't be read.
    """
    file = Path(folder).expanduser() / INDEX_FILE
    if not file.is_file():
        raise MissingFileError(
            f"{folder} holds no {INDEX_FILE}, so it is no folder of one SAE per site. Give one that "
            "`workbench circuit saes` or circuits.train_saes wrote, or name each SAE: {'resid_post.3': FOLDER}."
        )
    try:
        return from_jsonable(SAEIndex, load_json(file, dict))
    except InvalidInputError as error:
        raise CorruptFileError(f"{file}: {error} Train the SAEs again; finished ones are kept.") from error


def saes_in(folder: str | Path) -> dict[str, Path]:
    """The folder of each SAE by its site.

    Raises:
        MissingFileError: if there is no index, or an SAE of it is gone.
    """
    places = {sae.site: Path(folder).expanduser() / sae.folder for sae in read_index(folder).saes}
    gone = [site for site, place in places.items() if not place.is_dir()]
    if gone:
        raise MissingFileError(
            f"{folder}: the SAE of {gone[0]} is in {INDEX_FILE}, but there is no folder {places[gone[0]].name}. "
            "Restore it, or train again, which makes only what is missing."
        )
    return places
