"""The main job, end to end on one model: every step with its control and its interval."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import (
    feature_selection,
    glitch_tokens,
    refusal,
    score_features,
    self_text_sae,
    shift,
    steering_features,
)
from workbench.activations.store import open_store
from workbench.bases.sae import SAELike
from workbench.cli.base import typed
from workbench.cli.study import Study
from workbench.cli.training import TrainingOptions
from workbench.core.errors import InvalidInputError, WorkbenchError
from workbench.core.progress import clock
from workbench.core.records import to_jsonable, write_atomic
from workbench.core.tokens import TokenBatch
from workbench.features.cards.cardmaking import CardOptions, feature_cards
from workbench.features.scores.table import FeatureTable
from workbench.models.model import Model
from workbench.report.base import Headline, Metric, Report, Says, Section, Table
from workbench.report.features import feature_page
from workbench.runs.content import headline_rows
from workbench.runs.run import FEATURE_PAGE, RunDir, list_runs
from workbench.runs.settings import settings_of
from workbench.saes.config import SAEConfig
from workbench.saes.formats.load import load_sae
from workbench.saes.home import SAEHome
from workbench.steering.refusal import data as refusal_data

LONGEST = 512
"""Tokens of the longest row that the steps run, with a tokenizer that makes a token of every byte."""


@dataclass(frozen=True, kw_only=True)
class Demo(TrainingOptions, Study[Report]):
    """Run the whole job on one model, from its text to a report.

    Glitch tokens, an SAE, scores of its features, steering, SHIFT and refusal, each beside its controls.

    Example: workbench demo
    """

    run_name = "demo"

    tokens: int = feature_selection.Sizes.tokens
    """Tokens of its own text that the model writes; most of the time goes here."""
    layer: int | None = None
    """Layer of the SAE; the middle one by default."""
    fresh: bool = dataclasses.field(default=False, metadata={"config": False})
    """Run again even if a finished run with this configuration exists."""

    def run(self) -> None:
        """Runs the steps that are not done yet and prints the findings."""
        done = None if self.fresh else self._finished()
        run = done or self._work()
        sections = {step: run.load_step(step) for step in run.steps()}
        report = (run.path / "report.html").resolve()
        summary = {
            "run": run.path, "report": report, "reused": bool(done),
            "headlines": [row for step, section in sections.items() for row in headline_rows(step, section)],
            "findings": [finding for section in sections.values() for finding in section.findings],
        }  # fmt: skip
        self.emit(summary, self._told(run, sections, report, bool(done)))

    def _told(self, run: RunDir, sections: Mapping[str, Section], report: Path, reused: bool) -> Iterator[str]:
        """One line per step, and what to run next."""
        yield ""
        for section in sections.values():
            if section.headline is not None:
                yield f"{section.title}: {section.headline.line()}"
        yield ""
        if reused:
            yield "This run was finished before; `workbench demo --fresh` runs it again."
        sae = run.artifacts / "sae"
        yield f"Report:       {report}"
        if (run.path / FEATURE_PAGE).is_file():
            yield f"All features: {(run.path / FEATURE_PAGE).resolve()}"
        yield "Next:"
        yield f"  {typed('report', run.path, '--open')}     # the report in the browser"
        yield f"  {typed('features', 'show', sae)}     # the page of all features again, with other options"
        yield f"  {typed('serve', '--sae', sae)}     # steer and ablate features while you write"

    def _finished(self) -> RunDir | None:
        """The newest run of this configuration if it is finished; a newer one that was interrupted is continued."""
        for info in list_runs(self.out):
            if info.name != self.run_name or info.status == "unreadable":
                continue
            run = RunDir.open(info.path)
            if run.config == settings_of(self):
                return run if run.finished else None
        return None

    def _work(self) -> RunDir:
        run = self.start(fresh=self.fresh)
        with run:
            study = _Study(self, run)
            if not run.has("sae"):
                study.require_possible()
            for number, (name, title, step) in enumerate(STEPS, 1):
                if run.has(name):
                    _say(f"[{number}/{len(STEPS)}] {title}: done before")
                    continue
                _say(f"[{number}/{len(STEPS)}] {title}")
                start = time.perf_counter()
                reason = study.reason_against(name)
                section = step(study) if reason is None else left_out(title, reason)
                seconds = time.perf_counter() - start
                run.save_step(name, replace(section, metrics={**section.metrics, "seconds": round(seconds, 1)}))
                _say(f"      {clock(seconds)}" if reason is None else f"      left out: {reason}")
            run.finish(f"Workbench demo: {study.model.name}")
        return run


def left_out(title: str, reason: str) -> Section:
    """The section of a step that was not run."""
    said = f"Left out: {reason}"
    return Section(title, (), (said,), headline=Headline(sentence=said))


def _say(line: str) -> None:
    """Progress goes to stderr, so that `--json` has stdout for itself."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class _Study:
    """What the steps share; each part is made when it is first needed, so a resumed run loads no more than it uses."""

    def __init__(self, config: Demo, run: RunDir) -> None:
        self.config, self.run = config, run

    @functools.cached_property
    def model(self) -> Model:
        model = self.config.load_model(check=False)
        self.run.note_model(model)
        return model

    @functools.cached_property
    def sae_config(self) -> SAEConfig:
        return self.config.sae_config(self.model.d_model, self.config.seed)

    def require_possible(self) -> None:
        """Refuses what a later step would refuse: a layer or a k that there is not, rows that are too long."""
        if self.model.tokenizer is None:
            raise InvalidInputError(
                f"{self.model.name} has no tokenizer, and the demo reads and writes text. Save one in its folder."
            )
        self.model.require_room(LONGEST)
        _ = self.site, self.sae_config

    def reason_against(self, step: str) -> str | None:
        """Why this model can't do a step; None if it can."""
        if step != "refusal":
            return None
        try:
            self.model.tokens(refusal_data.as_chats(["Hello"]))
        except WorkbenchError as error:
            return f"refusals are answers to chat messages. {error}"
        return None

    @property
    def site(self) -> str:
        layer = self.config.layer if self.config.layer is not None else self.model.n_layers // 2
        return str(self.model.resolve(f"resid_post.{layer}"))

    @property
    def sae_folder(self) -> Path:
        return self.run.artifacts / "sae"

    @property
    def store_folder(self) -> Path:
        return self.run.artifacts / "acts"

    @property
    def table_folder(self) -> Path:
        return SAEHome(self.sae_folder).table

    @functools.cached_property
    def sae(self) -> SAELike:
        return load_sae(self.sae_folder)

    @functools.cached_property
    def table(self) -> FeatureTable:
        return FeatureTable.load(self.table_folder)


def _check(study: _Study) -> Section:
    report = study.model.self_check()
    report.require()
    rows = tuple((check.name, "holds" if check.ok else "fails", check.detail) for check in report.checks)
    table = Table(("check", "result", "measured"), rows, "Run on the loaded model, before anything else.")
    held = sum(check.ok for check in report.checks)
    count = Table(("self-checks", "number"), (("that hold", held), ("that were made", len(rows))), "Self-checks")
    finding = f"{study.model.name} passes {held} of {len(rows)} self-checks: its sites are what their names say."
    headline = Headline.read(
        Says(
            works=f"The sites of {study.model.name} are what their names say, and edits of them reach the logits.",
            no_better="", fails=f"A site of {study.model.name} is not what its name says.",
        ),
        value=(count, "that hold", "number"), control=(count, "that were made", "number"),
        measure="self-checks that hold", better="at least",
    )  # fmt: skip
    metrics: dict[str, Metric] = {"checks": len(rows), "withdrawn_sites": len(report.withdrawn)}
    return Section("The model", (table, count), (finding,), metrics, headline)


def _glitch(study: _Study) -> Section:
    untested = ()
    try:
        report = glitch_tokens.study(study.model, "top", options=glitch_tokens.brief(study.run.artifacts))
    except InvalidInputError as error:
        # Without unused rows to compare with there is no ranking to test; the list says so, and so does the finding.
        report, untested = glitch_tokens.study(study.model), (f"No token was tested: {error}",)
    report.to_csv(study.run.artifacts / "glitch_tokens.csv")
    section = report.section()
    return replace(section, findings=(*section.findings, *untested))


def _sae(study: _Study) -> Section:
    config = study.config
    options = self_text_sae.Options(
        tokens=config.tokens,
        seed=config.seed,
        # A quarter of a short text would not fill one training batch.
        shares=(0.25,) if config.tokens >= 32_768 else (),
        sae=study.sae_config,
    )
    report = self_text_sae.study(study.model, study.site, study.store_folder, study.sae_folder, options)
    return report.section()


def _features(study: _Study) -> Section:
    store = open_store(study.store_folder)
    table = score_features.study(study.model, study.sae, store)
    table.save(study.table_folder)
    # rules would take longer than all other steps together
    options = CardOptions(explain=False, shown=5, per_decile=0)
    cards = feature_cards(study.model, study.sae, store, table=table, options=options)
    cards.save(study.sae_folder / "cards")
    page = feature_page(map(to_jsonable, cards), f"Features of {study.model.name}, {study.site}")
    write_atomic(study.run.path / FEATURE_PAGE, page.html)
    return table.report().section()


def _steering(study: _Study) -> Section:
    return steering_features.study(study.model, study.sae, study.table).section()


def _plain_text(study: _Study) -> TokenBatch:
    """Held-out rows of the model's own text: none of them was trained on."""
    return TokenBatch.of_rows(open_store(study.store_folder).token_rows("heldout")[:16].long())


def _shift(study: _Study) -> Section:
    return shift.study(study.model, study.sae, _plain_text(study)).section()


def _refusal(study: _Study) -> Section:
    return refusal.study(study.model, study.sae, _plain_text(study)).section()


STEPS: tuple[tuple[str, str, Callable[[_Study], Section]], ...] = (
    ("model", "Load the model and check its sites", _check),
    ("glitch", "List glitch tokens and test the most suspicious", _glitch),
    ("sae", "Let the model write, and train an SAE on what it wrote", _sae),
    ("features", "Score all features: what they read, what they write", _features),
    ("steering", "Steer with the best output features, beside controls", _steering),
    ("shift", "SHIFT: ablate the features that carry a spurious attribute", _shift),
    ("refusal", "Refusal: steer with a direction and with features", _refusal),
)
"""Name, title and work of every step, in order."""


if __name__ == "__main__":
    import tyro

    tyro.cli(Demo).run()
