"""Commands that test many tokens: glitch census and glitch search."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from workbench.cli.base import typed
from workbench.cli.places import CENSUSES, named_run
from workbench.cli.study import Begin, R, Study
from workbench.core.errors import MissingFileError
from workbench.core.progress import say
from workbench.glitch.scanning.scanner import ScanOptions

if TYPE_CHECKING:
    from workbench.glitch.counting.census import CensusReport
    from workbench.glitch.counting.plan import CensusOptions, CensusPlan
    from workbench.glitch.searching.search import SearchReport
    from workbench.models.model import Model
    from workbench.runs.run import RunDir

CHOICE = "dtype.json"


@dataclass(frozen=True, kw_only=True)
class _TestsTokens(Study[R]):
    """What both commands ask for: the model, its dtype, the ranking and the prompts."""

    model: Annotated[str, tyro.conf.Positional] = "embedded"
    """Model: "embedded", a folder, a .gguf file, or a Hugging Face id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes the faster one, if both give the same probabilities on a sample of tokens."""
    reference: tuple[int, ...] = ()
    """Ids known to be unused, for the ranking; by default they are found."""
    no_confirm: bool = False
    """Run no longer prompts for tokens that fail the short one: one failure makes a glitch token."""
    batch_size: int = 64
    """Prompts per forward pass."""

    def census_options(self) -> CensusOptions:
        """What the library is called with."""
        from workbench.glitch.counting.plan import CensusOptions

        options = CensusOptions(
            batch_size=self.batch_size, seed=self.seed, scan=ScanOptions(reference=self.reference or None)
        )
        return dataclasses.replace(options, confirm=()) if self.no_confirm else options

    def prepared(self, run: RunDir) -> tuple[Model, CensusPlan]:
        """The model in its dtype and the plan; a run that is continued keeps the dtype that it began with."""
        from workbench.core.records import from_jsonable, load_json, save_json
        from workbench.glitch.counting.plan import in_dtype, plan_census
        from workbench.glitch.verification.probing import DtypeChoice

        model = self.load(dtype="float32" if self.dtype == "auto" else self.dtype, check=True)
        noted = run.artifacts / CHOICE
        begun = from_jsonable(DtypeChoice, load_json(noted)) if noted.is_file() else None
        plan = plan_census(model, options=self.census_options(), measure_both=self.dtype == "auto" and begun is None)
        if begun is not None:
            plan = dataclasses.replace(plan, dtype=begun)
        save_json(noted, plan.dtype)
        model = in_dtype(model, plan.dtype)
        run.note_model(model)
        return model, plan


@dataclass(frozen=True, kw_only=True)
class GlitchCensus(_TestsTokens["CensusReport"]):
    """Test every token, and measure what the ranking finds.

    The ranking is that of `glitch scan`, by weights. Ctrl-C loses nothing: the same command continues.

    Example: workbench glitch census embedded --sample 2000
    """

    run_name, step = "glitch-census", "census"

    sample: int | None = None
    """Test so many ordinary tokens only, drawn by strata of the ranking, and estimate the rest."""

    def census_options(self) -> CensusOptions:
        """What the library is called with."""
        return dataclasses.replace(super().census_options(), sample=self.sample)

    def measure(self, begin: Begin) -> CensusReport:
        from workbench.glitch.counting.census import run_census

        run = begin()
        model, plan = self.prepared(run)
        say(f"Census of {model.name}: {plan}.")
        report = run_census(model, plan, run.artifacts)
        report.save(run.artifacts)
        return report

    def following(self, report: CensusReport, folder: Path) -> str:
        return typed("glitch", "search", self.model, "--census", folder)

    def title(self, report: CensusReport) -> str:
        return f"Census of {report.model}"

    def summary(self, report: CensusReport, folder: Path) -> Mapping[str, object]:
        return report.to_json()

    def places(self, report: CensusReport, folder: Path) -> str:
        return f"All tokens: {folder / 'artifacts' / 'tokens.csv'}; report: {folder / 'report.html'}"


@dataclass(frozen=True, kw_only=True)
class GlitchSearch(_TestsTokens["SearchReport"]):
    """Compare searches for glitch tokens, and their recall.

    The ranking by weights, GlitchHunter, gradient search and random order. With --census the recall of each is
    measured; without, the tokens that are asked for are tested.

    Example: workbench glitch search embedded --census latest
    """

    run_name, step = "glitch-search", "search"
    keeps_json = True

    census: Path | None = None
    """Run of `workbench glitch census` with the same model and prompts: folder, name or latest."""
    methods: tuple[Literal["indicator", "hunter", "gradient", "random"], ...] = (
        "indicator", "hunter", "gradient", "random",
    )  # fmt: skip
    """Which searches."""
    budget: int | None = None
    """Tokens that the ranking and the random order test; by default as many as the dearest other search."""
    seeds: int = 3
    """Runs of each search that draws at random."""
    resolution: float = 75.0
    """Of the hunter's communities; the higher, the smaller they are."""
    iterations: int = 125
    """Steps of the gradient search, of 8 tokens each."""

    def measure(self, begin: Begin) -> SearchReport:
        from workbench.glitch.counting.plan import prober_of
        from workbench.glitch.searching.gradient import GradientOptions
        from workbench.glitch.searching.hunter import HunterOptions
        from workbench.glitch.searching.search import SearchOptions, search

        options = SearchOptions(
            methods=self.methods, budget=self.budget, seeds=self.seeds, seed=self.seed,
            hunter=HunterOptions(resolution=self.resolution), gradient=GradientOptions(iterations=self.iterations),
        )  # fmt: skip
        run = begin()
        if self.census is not None:
            _take_over(named_run(self.census, CENSUSES, self.out), run.artifacts)
        model, plan = self.prepared(run)
        report = search(model, plan, prober_of(model, plan, run.artifacts), options=options)
        report.frame().to_csv(run.artifacts / "searches.csv", index=False)
        return report

    def title(self, report: SearchReport) -> str:
        return f"Searches for glitch tokens in {report.model}"

    def summary(self, report: SearchReport, folder: Path) -> Mapping[str, object]:
        return report.to_json()

    def places(self, report: SearchReport, folder: Path) -> str:
        return f"Every run: {folder / 'artifacts' / 'search.json'}; report: {folder / 'report.html'}"


def _take_over(census: Path, artifacts: Path) -> None:
    """Copies what a census knows, and the dtype that it ran in; the census itself is left as it is."""
    from workbench.core.records import write_atomic
    from workbench.glitch.verification.probing import CONFIRMED_FILES, SHORT_FILE

    folder = next((place for place in (census / "artifacts", census) if (place / SHORT_FILE).is_file()), None)
    if folder is None:
        raise MissingFileError(f"{census} holds no {SHORT_FILE}. Name a run folder of `workbench glitch census`.")
    for file in (folder / SHORT_FILE, folder / CHOICE, *folder.glob(CONFIRMED_FILES)):
        if file.is_file() and not (artifacts / file.name).exists():
            write_atomic(artifacts / file.name, file.read_bytes())
