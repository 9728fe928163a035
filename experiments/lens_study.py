"""Which lens reads what: logit, regression, tuned and Jacobian lens on the same held-out text, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workbench.cli.base import model_words, typed
from workbench.cli.study import Begin, Study
from workbench.core.errors import DegenerateInputError, InvalidInputError
from workbench.core.jsontext import Json
from workbench.features.lenses.reading import LOGIT, LensReading
from workbench.report.base import Headline, Metric, Report, Says, Section, Table
from workbench.report.headline import DIFFERENCE

if TYPE_CHECKING:
    import pandas as pd

    from workbench.core.tokens import TokenBatch
    from workbench.features.lenses.linear import LinearLens
    from workbench.models.model import Model

Fitted = Literal["regression", "tuned", "jacobian"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LensComparison(Report):
    """Readings of held-out text by several lenses; the target is the token that follows.

    Attributes:
        kinds: the fitted lenses.
        reading: of the first of them, with the others and all controls beside it.
    """

    kinds: tuple[str, ...]
    reading: LensReading

    def frame(self) -> pd.DataFrame:
        """One row per site and lens: KL to the output and log rank of the target, each less that of the logit lens."""
        import pandas as pd

        rows = []
        for name in self.reading.readings:
            for i, site in enumerate(self.reading.sites):
                row: dict[str, object] = {"lens": name, "site": str(site), "layer": site.layer}
                for what, value in (("kl", self.reading.kl(name, i)), ("log_rank", self.reading.log_rank(name, i))):
                    change = self.reading.difference(LOGIT, what, i, name)  # type: ignore[arg-type]
                    for prefix, shown in ((what, value), (f"{what}_less_logit", change)):
                        if shown is not None:
                            row |= {prefix: shown.value, f"{prefix}_low": shown.low, f"{prefix}_high": shown.high}
                rows.append(row)
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Json]:
        """The reading by site."""
        return {"kinds": list(self.kinds), **self.reading.to_json()}

    def headline(self) -> Headline:
        """The first lens beside the logit lens, over all sites."""
        name, table = self.kinds[0], self._table()
        says = Says(
            f"Over all sites the {name} lens is closer to the model's output than the logit lens.",
            f"Over all sites the {name} lens is no better than the logit lens.",
            f"Over all sites the {name} lens is further from the model's output than the logit lens.",
        )
        column = f"{DIFFERENCE} to the logit lens"
        return Headline.read(
            says, value=(table, name, "KL"), control=(table, LOGIT, "KL"), difference=(table, name, column),
            measure="KL to the output, nats", difference_name="lens minus logit lens", better="lower",
        )  # fmt: skip

    def _table(self) -> Table:
        rows = []
        for name in self.reading.readings:
            is_other = name != LOGIT
            better, worse = self.reading.against(LOGIT, "kl", name) if is_other else (None, None)
            rows.append(
                (name, self.reading.n_fit.get(name) or None, self.reading.kl(name),
                 self.reading.difference(LOGIT, "kl", None, name) if is_other else None, better, worse,
                 self.reading.log_rank(name),
                 self.reading.difference(LOGIT, "log_rank", None, name) if is_other else None)
            )  # fmt: skip
        columns = ("lens", "fitted on", "KL", f"{DIFFERENCE} to the logit lens", "sites better", "sites worse",
                   "log10(1 + rank)", f"{DIFFERENCE} of log ranks")  # fmt: skip
        return Table(columns, tuple(rows), "Lenses and their controls. KL to the output in nats and rank of the token "
                     "that follows, means over sites; differences are paired over texts; sites where the interval of "
                     "the difference of KL excludes 0.")  # fmt: skip

    def findings(self) -> tuple[str, ...]:
        """Each lens against the logit lens in words."""
        found = []
        for name in self.kinds:
            found.append(self.reading.compared("kl", "closer to the output", name))
            found.append(self.reading.compared("log_rank", "better at the token that follows", name))
        overlap = self.reading.half_overlap()
        if overlap is not None:
            found.append(f"Lenses of either half of the prompts share {overlap} of their ten most probable tokens.")
        return (*found, "A lens says what the end of the model would read, not what later layers use.")

    def section(self) -> Section:
        """Curves over layers, the lenses beside their controls, and a row per site."""
        metrics: dict[str, Metric] = {}
        for name in (LOGIT, *self.kinds):
            kl = self.reading.kl(name)
            metrics |= {} if kl is None else {f"{name}: kl": kl}
        blocks = (self.reading.curves(), self._table(), self.reading.by_site(), self.reading.picture())
        return Section("Lenses on held-out text", blocks, self.findings(), metrics, self.headline())


@dataclass(frozen=True, kw_only=True)
class LensStudy(Study[LensComparison]):
    """Compare fitted lenses with the logit lens, on held-out text.

    Layer by layer, with permuted, random and distant maps beside them.

    Example: workbench circuit lenses --fit corpus.jsonl --kinds regression tuned
    """

    run_name = "circuit-lenses"
    step = "lenses"

    fit: tuple[Path, ...] = ()
    """Files of text: .txt, .jsonl or .parquet; the last texts are held out."""
    kinds: tuple[Fitted, ...] = ("regression", "tuned")
    """Lenses to fit: regression, tuned, jacobian; the first is in the headline."""
    column: str = "text"
    """Of .jsonl and .parquet files."""
    texts: int = 400
    """Texts at most."""
    held_out: int = 40
    """Of these, texts that lenses are compared on."""
    per_text: int = 5
    """Tokens of each held-out text that are read, every other one from its end."""
    context: int = 64
    """Tokens of each text that are used."""
    prompts: int = 8
    """Of the Jacobian lens, which costs a backward pass per prompt and dimension."""
    steps: int = 100
    """Of the tuned lens."""
    tokens: int = 512
    """Per step of the tuned lens."""
    rate: float = 0.1
    """Of the tuned lens."""
    sites: tuple[str, ...] = ()
    """Where to read; by default the output of every block but the last."""
    lenses: Path | None = field(default=None, metadata={"config": False})
    """Folder of lenses: those that are in it are used as they are, others are fitted and kept there."""

    def measure(self, begin: Begin) -> LensComparison:
        if not self.kinds or self.held_out < 2 or self.per_text < 1:
            raise InvalidInputError(f"--kinds {self.kinds}, --held-out {self.held_out}: at least one lens, 2 texts.")
        texts = self._texts()
        model = self.load_model(check=False)
        run = begin(model)
        folder = self.lenses or run.artifacts / "lenses"
        fitted = {kind: self._lens(model, kind, texts[: -self.held_out], folder) for kind in self.kinds}
        first, *others = self.kinds
        reading = fitted[first].read(
            model, self._rows(model, texts), positions=range(-2, -2 - 2 * self.per_text, -2),
            beside={str(kind): fitted[kind] for kind in others}, seed=self.seed,
        )  # fmt: skip
        report = LensComparison(kinds=self.kinds, reading=reading)
        report.frame().to_csv(run.artifacts / "table.csv")
        return report

    def _rows(self, model: Model, texts: list[str]) -> TokenBatch:
        """The held-out texts; too short ones are left out."""
        from workbench.features.lenses.source import longer_than, rows_of

        rows = rows_of(model, texts[-self.held_out :], self.context)
        return longer_than(rows, 2 * self.per_text + 2, "--per-text")[0]

    def _texts(self) -> list[str]:
        from itertools import chain, islice

        from workbench.activations.files import documents, text_files

        if not self.fit:
            raise InvalidInputError("There is no text to fit on. Give --fit FILES.")
        every = chain.from_iterable(documents(path, self.column) for path in text_files(self.fit))
        texts = list(islice((text for text in every if text.strip()), self.texts))
        if len(texts) <= self.held_out + 1:
            raise DegenerateInputError(
                f"--fit has {len(texts)} texts, and --held-out {self.held_out} of them leaves too few to fit on. Give "
                "more texts, or hold out fewer."
            )
        return texts

    def _lens(self, model: Model, kind: Fitted, texts: list[str], folder: Path) -> LinearLens:
        from workbench.features.lenses.files import JSON
        from workbench.features.lenses.fitting import fit_lens
        from workbench.features.lenses.loading import load_lens
        from workbench.features.lenses.tuned import TunedOptions

        if (folder / kind / JSON).exists():
            return load_lens(folder / kind, model)
        options = TunedOptions(steps=self.steps, tokens=self.tokens, rate=self.rate, seed=self.seed)
        return fit_lens(
            model, kind, texts, sites=self.sites or None, prompts=self.prompts, context=self.context, options=options,
            out=folder / kind,
        )  # fmt: skip

    def following(self, report: LensComparison, folder: Path) -> str:
        kind = self.kinds[0]
        place = (self.lenses or folder / "artifacts" / "lenses") / kind
        own = ["--kind", kind, "--from", place]
        return typed("circuit", "lens", "The capital of France is", *own, *model_words(self.model))


if __name__ == "__main__":
    import tyro

    tyro.cli(LensStudy).run()
