"""The options that say which texts a SHIFT study is about, and which SAEs it uses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from workbench.cli.places import sae_folder
from workbench.core.errors import InvalidInputError

if TYPE_CHECKING:
    from circuits.shift.columns import Columns
    from circuits.shift.task import ShiftTask
    from workbench.bases.sae import AnySAE


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """A table of texts, or generated biographies; with cues built in if some are named."""

    data: tyro.conf.Positional[str] = ""
    """Table with one row per text (.csv, .tsv, .jsonl, .ndjson, .parquet), or a data set of the Hugging Face hub (id
    or folder); without one, generated biographies."""
    text: str | None = None
    """Column of the texts."""
    label: str | None = None
    """Column of the labels, which the probe reads."""
    attribute: str | None = None
    """Column of the attribute that goes with the label in training, if it is known."""
    split: str | None = None
    """Column that says train, test or dev; by default rows are split here."""
    twin: str | None = None
    """Column with each training text after the attribute was swapped, all else equal."""
    classes: tuple[str, ...] = ()
    """Labels that are used, in order, such as nurse professor; VALUE=NAME also names one."""
    attributes: tuple[str, ...] = ()
    """The same for the attribute."""
    spurious_words: tuple[str, ...] = ()
    """Words that give the attribute away."""
    target_words: tuple[str, ...] = ()
    """Words that belong to the label."""
    leave_out_leaks: bool = False
    """Leave test rows out that duplicate training rows, instead of refusing the table."""
    limit: int | None = None
    """Rows of the table that are read at most."""
    professions: tuple[str, ...] = ("professor", "nurse")
    """Labels of the biographies: two or more of professor, nurse, attorney, journalist, dentist, architect, painter,
    chef, teacher, photographer."""
    cue: tuple[str, ...] = ()
    """Cues built into the texts: length, tense, number, casing, punctuation, cluster, token,
    token-end (behind the text); token:(c) names one."""
    rho: float | None = None
    """Share of training texts in which label and attribute agree, 0.5 to 1; by default 0.95 with cues, else what the
    texts have."""
    train_rows: int | None = None
    """Training texts; by default 240 biographies, 400 of them with cues, or as many texts of a table with cues as
    possible."""
    test_rows: int | None = None
    """Test texts; by default 400 biographies, 320 of them with cues, or as many texts of a table with cues as
    possible."""

    def make_task(self, seed: int, positive: str | None = None) -> ShiftTask:
        """The task.

        Raises:
            InvalidInputError: for options that do not go together, or a table that can't be used.
        """
        from circuits.cues.making import with_cues
        from circuits.cues.named import cue_named

        cues = [cue_named(name) for name in self.cue]
        self._refuse_unused()
        task = self._of_table(seed) if self.data else self._of_biographies(seed)
        if not cues:
            return task
        if positive is not None:
            task = task.one_against_rest(positive)
        n_train, n_test = self.train_rows, self.test_rows
        if not self.data:
            n_train, n_test = n_train or 400, n_test or 320
        return with_cues(task, cues, 0.95 if self.rho is None else self.rho, seed, n_train=n_train, n_test=n_test)

    def _of_table(self, seed: int) -> ShiftTask:
        from circuits.shift.sources import read_task
        from circuits.shift.strength import SplitOptions

        rho = None if self.cue else self.rho
        options = SplitOptions(rho=rho, seed=seed, leaks="leave out" if self.leave_out_leaks else "refuse")
        columns: Columns = {
            "options": options, "spurious_words": self.spurious_words, "target_words": self.target_words,
        }  # fmt: skip
        for name in ("text", "label", "attribute", "split", "twin"):
            if (column := getattr(self, name)) is not None:
                columns[name] = column
        for name in ("classes", "attributes"):
            if values := getattr(self, name):
                columns[name] = _choice(name, values)
        return read_task(self.data, limit=self.limit, **columns)

    def _of_biographies(self, seed: int) -> ShiftTask:
        from circuits.shift.biographies import BiographyOptions, biographies

        if self.cue:
            return fair_biographies(self.professions, self.train_rows or 400, self.test_rows or 320, seed)
        sizes = BiographyOptions()
        return biographies(
            BiographyOptions(
                professions=self.professions, n_train=sizes.n_train if self.train_rows is None else self.train_rows,
                n_test=sizes.n_test if self.test_rows is None else self.test_rows, seed=seed,
            )
        )  # fmt: skip

    def _refuse_unused(self) -> None:
        of_tables = (
            "text", "label", "attribute", "split", "twin", "classes", "attributes", "spurious_words", "target_words",
            "leave_out_leaks", "limit",
        )  # fmt: skip
        if not self.data and (given := [name for name in of_tables if getattr(self, name)]):
            raise InvalidInputError(
                f"--{given[0].replace('_', '-')} is for a table, and there is none. Give it first: workbench shift "
                "data.csv --text TEXT --label LABEL."
            )
        if self.cue:
            return
        if not self.data and self.rho is not None:
            raise InvalidInputError(
                "--rho: label and attribute of the biographies always go together in training. Give a table, or --cue."
            )
        if self.data and (self.train_rows is not None or self.test_rows is not None):
            raise InvalidInputError(
                "--train-rows and --test-rows: all rows of a table are used. Give --limit, or --cue, for fewer."
            )


def fair_biographies(professions: tuple[str, ...], n_train: int, n_test: int, seed: int) -> ShiftTask:
    """Biographies in whose training texts gender says nothing; twice as many as asked for, so that cues can choose."""
    from circuits.shift.biographies import BiographyOptions, biographies

    groups = 2 * len(professions)
    train, test = (-(-2 * n // groups) * groups for n in (n_train, n_test))
    made = biographies(BiographyOptions(professions=professions, n_train=train, n_test=test, seed=seed))
    assert made.balanced is not None
    return replace(made, train=made.balanced, swapped=None)


def _choice(option: str, values: tuple[str, ...]) -> dict[str | int, str] | tuple[str, ...]:
    """Values of a column; with a name for each if one is given.

    >>> _choice("classes", ("21=professor", "13=nurse")), _choice("classes", ("nurse", "chef"))
    ({'21': 'professor', '13': 'nurse'}, ('nurse', 'chef'))
    """
    pairs = [value.partition("=") for value in values]
    if not any(equals for _, equals, _ in pairs):
        return values
    if wrong := [
        value for value, (old, equals, new) in zip(values, pairs, strict=True) if not (old and equals and new)
    ]:
        raise InvalidInputError(f"--{option} {wrong[0]}: some are VALUE=NAME, this is not. Name all of them, or none.")
    return {old: new for old, _, new in pairs}


def read_saes(places: tuple[Path, ...], runs: Path) -> dict[str, AnySAE | str | Path]:
    """The SAEs by their sites; a place is one of an SAE, or a folder of one per site.

    Raises:
        InvalidInputError: if there is none, or two read one site.
        MissingFileError: if a place holds no SAE.
    """
    from circuits.saes.folder import INDEX_FILE, saes_in
    from workbench.bases.fits import sae_site
    from workbench.saes.formats.load import load_sae

    saes: dict[str, AnySAE | str | Path] = {}
    for place in places:
        if (place / INDEX_FILE).is_file():
            found: dict[str, AnySAE | str | Path] = {**saes_in(place)}
        else:
            sae = load_sae(sae_folder(place, runs))
            found = {sae_site(sae): sae}
        if twice := [site for site in found if site in saes]:
            raise InvalidInputError(f"--sae {place}: another SAE is at {twice[0]} already. Give one of them.")
        saes |= found
    return saes


def sae_model(places: tuple[Path, ...], runs: Path) -> str | None:
    """The model that the first of these SAEs belongs to, where it is known."""
    from circuits.saes.folder import INDEX_FILE, read_index
    from workbench.saes.home import SAEHome

    if not places:
        raise InvalidInputError("--sae: there is none. Give the folder of an SAE, or of one SAE per site.")
    place = places[0]
    if (place / INDEX_FILE).is_file():
        return read_index(place).model
    return SAEHome(sae_folder(place, runs)).model
