"""What the page hands over: a Python block that writes the edited text again, and the edits as a saved intervention."""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from workbench.core.errors import InvalidInputError
from workbench.core.records import to_jsonable
from workbench.features.scores.origin import origin
from workbench.interventions.files import pack
from workbench.interventions.intervention import Intervention
from workbench.serve.ask import Ask, FeatureEdit
from workbench.serve.edits import by_mode, steered
from workbench.serve.playground import Playground
from workbench.steering.sweep.options import SCOPES, ScopeName

_SCOPES: dict[ScopeName, str] = {"last+generated": "wb.Last() | wb.Generated()", "all": "wb.All()"}


def python_block(playground: Playground, ask: Ask) -> str:
    """Python that loads the model and the SAE and writes the edited text of a run: the same tokens.

    Raises:
        InvalidInputError: for edits that `Playground.check` refuses, or of an SAE that was not loaded from anywhere.
    """
    playground.check(ask)
    model = playground.model
    dtype = str(model.dtype).removeprefix("torch.")
    lines = ["import workbench as wb", ""]
    lines.append(f"model = wb.load_model({model.source!r}, dtype={dtype!r}, device={str(model.device)!r})")
    if ask.edits:
        if playground.sae_source is None:
            raise InvalidInputError(
                "Copy as Python: the SAE of this playground was made in memory, so no code can load it again. Save the "
                "edits as an intervention, which holds the SAE."
            )
        lines += [f"sae = wb.load_sae({playground.sae_source!r}, device=model.device)", *_edit_lines(playground, ask)]
    prompt = [{"role": "user", "content": ask.prompt}] if ask.chat else ask.prompt
    edited = "intervention=edits, " if ask.edits else ""
    options = f"{edited}seed={ask.seed}, temperature={ask.temperature!r}"
    lines += [
        f"prompt = {prompt!r}",
        f"text = model.generate(prompt, {ask.max_new_tokens}, {options})",
        "print(text.texts[0])",
    ]
    if any("torch." in line for line in lines[3:-3]):
        lines.insert(0, "import torch")
    return "\n".join(lines) + "\n"


def save_edits(playground: Playground, ask: Ask, out: Path | None) -> Path:
    """Saves the edits of a run in a folder of `out` that is named after them; the same edits have the same folder.

    Raises:
        InvalidInputError: without `out`, without edits, or for edits that `Playground.check` refuses.
    """
    if out is None:
        raise InvalidInputError(
            "Save as intervention: this server was started without a folder to write to. Download the edits, copy them "
            "as Python, or start it with --out FOLDER."
        )
    edits = _edits(playground, ask)
    folder = out / _folder_name(playground, ask)
    return folder if (folder / "intervention.json").is_file() else edits.save(folder)


def packed_edits(playground: Playground, ask: Ask) -> tuple[str, IO[bytes]]:
    """Name and contents of a file with the edits of a run: what `save_edits` writes, as a ZIP archive.

    The contents are a temporary file without a name, which is gone when it is closed.

    Raises:
        InvalidInputError: without edits, or for edits that `Playground.check` refuses.
    """
    edits, name = _edits(playground, ask), _folder_name(playground, ask)
    with tempfile.TemporaryDirectory(prefix="workbench-") as place:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - handed over open
        pack(edits.save(Path(place) / name), file)
    return f"{name}.zip", file


def _edits(playground: Playground, ask: Ask) -> Intervention:
    if not ask.edits:
        raise InvalidInputError("Save as intervention: no feature is edited. Choose one first.")
    playground.check(ask)
    assert playground.sae is not None
    assert playground.site is not None
    edits = steered(playground.sae, playground.site, ask.edits, SCOPES[ask.scope])
    return replace(edits, made_for=playground.model.fingerprint)


def generate_command(playground: Playground, ask: Ask, folder: Path) -> str:
    """The command that writes the text of a run with the saved edits, as it is typed."""
    dtype = str(playground.model.dtype).removeprefix("torch.")
    words = ["workbench", "generate", ask.prompt, "--model", playground.model.source, "--intervention", str(folder)]
    words += ["--max-new-tokens", str(ask.max_new_tokens), "--temperature", repr(ask.temperature)]
    words += ["--seed", str(ask.seed), "--dtype", dtype, "--device", str(playground.model.device)]
    return shlex.join([*words, *["--chat"] * ask.chat])


def _folder_name(playground: Playground, ask: Ask) -> str:
    """Features in words, and a digest of all that decides what is saved; nothing of it is text from the page."""
    assert playground.sae is not None
    what = [ask.edits, ask.scope, origin(playground.model, playground.sae, playground.site)]
    text = json.dumps(to_jsonable(what), sort_keys=True)
    features = "-".join(str(edit.feature) for edit in ask.edits[:4])
    return f"features-{features}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _edit_lines(playground: Playground, ask: Ask) -> list[str]:
    ops = [_op(mode, group) for mode, group in by_mode(ask.edits)]
    lines = [f"scope = {_SCOPES[ask.scope]}"]
    for place, op in enumerate(ops):
        lines.append(f"edits {'+=' if place else '='} wb.Intervention.at({str(playground.site)!r}, {op}, scope)")
    return lines


def _op(mode: str, group: Sequence[FeatureEdit]) -> str:
    """The code of the op that `steered` makes of the edits of one mode."""
    features = [edit.feature for edit in group]
    amounts = [edit.strength for edit in group]
    several = f"torch.tensor({amounts})"
    if mode == "steer":
        if len(group) == 1:
            return f"wb.SAEAddMax(sae, {amounts[0]} * sae.W_dec[{features[0]}])"
        return f"wb.SAEAddMax(sae, {several}.to(sae.W_dec) @ sae.W_dec[{features}])"
    if mode == "ablate":
        return f"wb.SAEAblate(sae, {features})"
    name = {"scale": "SAEScale", "clamp": "SAEClamp"}[mode]
    return f"wb.{name}(sae, {features}, {amounts[0] if len(group) == 1 else several})"
