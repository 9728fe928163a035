"""Commands that look inside a model: check, sites, tokens, capture, generate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from workbench.cli.base import BaseCommand, Command, model_words, typed
from workbench.core.errors import InvalidInputError
from workbench.core.jsontext import Record
from workbench.core.numbers import counted, number
from workbench.core.records import write_atomic
from workbench.interventions.intervention import Intervention
from workbench.models.generation import Generation
from workbench.models.loading import load_tokenizer


def _template_options(given: tuple[str, ...]) -> Record:
    """`name=value` pairs; a value that is JSON (true, 3) is read as such, any other as text."""
    options: Record = {}  # of a template, which is another program's
    for pair in given:
        name, sign, value = pair.partition("=")
        if not name or not sign:
            raise InvalidInputError(f"--template-option {pair}: write name=value, such as enable_thinking=false.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


@dataclass(frozen=True, kw_only=True)
class Check(Command):
    """Verify the sites of a model: identities, edits, gradients.

    Exit code: 2 if a site is not what its name says.

    Example: workbench check --model embedded
    """

    def run(self) -> None:
        """Prints one line per check; exits with 2 if one fails."""
        model = self.load()
        report = model.self_check()
        rows = [{"check": c.name, "ok": c.ok, "detail": c.detail} for c in report.checks]
        withdrawn = {str(site): why for site, why in report.withdrawn.items()}
        self.emit(
            {"model": model.name, "ok": report.ok, "checks": rows, "withdrawn": withdrawn}, [repr(model), str(report)],
            typed("sites", *model_words(self.model)),
        )  # fmt: skip
        report.require()


@dataclass(frozen=True, kw_only=True)
class Sites(Command):
    """List the sites of a model, and why one is missing.

    Each with its shape and the module that it is read from.

    Example: workbench sites
    """

    def run(self) -> None:
        """Prints the table."""
        model = self.load()
        table = model.sites()
        middle = f"resid_post.{model.n_layers // 2}"
        following = typed("capture", "The sky is blue.", *model_words(self.model), "--sites", middle)
        self.emit({"sites": table.rows}, [str(table)], following)


@dataclass(frozen=True, kw_only=True)
class Tokens(BaseCommand):
    """Show how a text becomes token ids, with BOS and padding.

    Example: workbench tokens "Hello world" --chat
    """

    text: tyro.conf.Positional[str]
    """The text."""
    model: str = "embedded"
    """Model whose tokenizer is used: "embedded", a Hugging Face id, a folder or a .gguf file."""
    chat: bool = False
    """Treat the text as a user message and apply the chat template."""
    bos: Annotated[str, tyro.conf.arg(metavar="auto|yes|no")] = "auto"
    """Put BOS in front: auto puts there what the tokenizer puts there, such as [gMASK]<sop>."""
    template_option: tuple[str, ...] = ()
    """Options of the chat template, such as enable_thinking=false."""

    def run(self) -> None:
        """Prints id and text of every token."""
        from workbench.core.tokens import encode

        choices = {"auto": "auto", "yes": True, "no": False}
        if self.bos not in choices:
            raise InvalidInputError(f"--bos {self.bos}: use auto, yes or no.")
        value = [{"role": "user", "content": self.text}] if self.chat else self.text
        options = _template_options(self.template_option)
        batch = encode(load_tokenizer(self.model), value, choices[self.bos], **options)
        ids = batch.ids[0].tolist()
        following = typed("generate", self.text, *model_words(self.model), *["--chat"] * self.chat)
        lines = [
            f"{i:4d}  {token:7d}  {text!r}"
            for i, (token, text) in enumerate(zip(ids, batch.str_tokens[0], strict=True))
        ]
        self.emit({"ids": ids, "tokens": batch.str_tokens[0], "note": batch.note}, [*lines, batch.note], following)


@dataclass(frozen=True, kw_only=True)
class Capture(Command):
    """Save the activations of a text at named sites.

    The file is activations.safetensors, one tensor per site.

    Example: workbench capture "The sky is blue" --sites resid_post.10 mlp_out.3 --out captured
    """

    text: tyro.conf.Positional[str]
    """The text."""
    sites: tuple[str, ...] = ("resid_post.0",)
    """Sites, such as resid_post.10 mlp_out.3 embed."""
    out: Path = Path()
    """Folder for the file."""
    overwrite: bool = False
    """Replace a file that is there."""

    def run(self) -> None:
        """Writes `activations.safetensors` into `out` and prints shapes and norms: medians, which no sink dominates."""
        from safetensors.torch import save

        file = self.out / "activations.safetensors"
        if file.exists() and not self.overwrite:
            raise InvalidInputError(f"{file} is there already. Name another folder with --out, or add --overwrite.")
        model = self.load()
        batch = model.tokens(self.text)
        acts = model.capture(batch, self.sites)
        header = {"model": model.name, "fingerprint": model.fingerprint, "text": self.text}
        write_atomic(file, save({site: acts[site].contiguous().cpu() for site in acts}, metadata=header))
        shapes = {
            site: {"shape": list(acts[site].shape), "median_norm": float(acts[site].float().norm(dim=-1).median())}
            for site in acts
        }
        lines = [
            f"{site}: shape {tuple(row['shape'])}, median norm {number(row['median_norm'])}"
            for site, row in shapes.items()
        ]
        following = typed("harvest", *model_words(self.model), "--sites", *self.sites)
        self.emit({"file": str(file), "sites": shapes}, [*lines, f"wrote {file}"], following)


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue a text or answer a chat message.

    Example: workbench generate "The capital of France is" --max-new-tokens 20
    """

    text: tyro.conf.Positional[str]
    """The prompt."""
    chat: bool = False
    """Treat the prompt as a user message and apply the chat template."""
    max_new_tokens: int = 40
    """Longest continuation, in tokens."""
    temperature: float = 1.0
    """0 takes the most probable token at every step."""
    top_k: int = 0
    """Sample among the k most probable tokens only; 0 for all."""
    top_p: float = 1.0
    """Sample among the most probable tokens that together reach this probability; 1 for all."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the highest probability; 0 for all."""
    stop: tuple[str, ...] = ()
    """Strings that end the continuation."""
    template_option: tuple[str, ...] = ()
    """Options of the chat template, such as enable_thinking=false."""
    intervention: Path | None = None
    """Folder of a saved intervention, or its ZIP archive; the unedited continuation is shown beside the edited one."""

    def run(self) -> None:
        """Prints the continuation and its mean log-probability."""
        edits = None if self.intervention is None else Intervention.load(self.intervention)
        model = self.load()
        value = [{"role": "user", "content": self.text}] if self.chat else self.text
        prompt = model.tokens(value, **_template_options(self.template_option))

        def continued(intervention: Intervention | None) -> Generation:
            return model.generate(
                prompt, self.max_new_tokens, intervention=intervention, seed=self.seed, temperature=self.temperature,
                stop=self.stop, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            )  # fmt: skip

        out = continued(edits)
        note = "; ".join(filter(None, (prompt.note, out.note)))
        logprobs = [round(float(x), 4) for x in out.logprobs[0]]
        mean = f"{number(sum(logprobs) / len(logprobs))} nats" if logprobs else "no token was generated"
        summary = {
            "text": out.texts[0], "ids": out.ids[0].tolist(), "logprobs": logprobs, "ended": out.ended[0],
            "note": note,
        }  # fmt: skip
        ended = out.ended[0].replace("_", " ")
        said = f"[{counted(len(logprobs), 'tokens')}, ended by {ended}, mean log-probability {mean}; {note}]"
        lines = [out.texts[0], said]
        if edits is not None:
            summary["unedited"] = continued(None).texts[0]
            summary["edits"] = out.report
            lines += [f"[{report}]" for report in out.report] + ["", "Unedited:", summary["unedited"]]
        middle = f"resid_post.{model.n_layers // 2}"
        self.emit(summary, lines, typed("capture", self.text, *model_words(self.model), "--sites", middle))
