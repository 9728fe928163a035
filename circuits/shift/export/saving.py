"""Writes the repaired classifier of a study, and reads it again."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save as tensors_as_bytes
from torch import Tensor

from circuits.shift.export import loader
from circuits.shift.export.loader import FORMAT, SETTINGS, WEIGHTS, Classifier, checksum
from circuits.shift.multiclass import linear_of, logits_of
from circuits.shift.task import ShiftStudy
from workbench.bases.neuron_patch import NeuronPatch, neuron_patch
from workbench.core.arguments import checked
from workbench.core.display import OneLine, clipped, first_few
from workbench.core.errors import CorruptFileError, EditError, InvalidInputError, MismatchError, MissingFileError
from workbench.core.numbers import counted, rounding_error
from workbench.core.records import write_atomic
from workbench.hooks.sites import Point
from workbench.models.loading import load_model
from workbench.models.model import Model

LOADER = "classifier.py"
CHECKED_TEXTS = 48
ALLOWED = 1e-3
"""Difference of logits, as a share of the largest, that rounding explains in fp32; other dtypes by their precision."""


def save_classifier(study: ShiftStudy, folder: str | Path) -> Path:
    """Writes SHIFT + retrain: a patch of neurons per site, the head, and a loader that needs nothing of this package.

    The folder holds `classifier.json`, `classifier.safetensors` and `classifier.py`. Before anything is written there,
    the saved files are loaded by that loader and label test texts.

    Raises:
        NotExactlyExportable: if an SAE's features can't be written as neurons.
        EditError: if the loaded classifier says anything else than the study's.
    """
    assert study.judged is not None
    chosen = study.judged.chosen
    probe = study.refit(study.ablated(chosen, of="train"))
    patches = {
        site: neuron_patch(basis, features)
        for site, basis in study.reader.bases.items() if (features := [n.feature for n in chosen if n.site == site])
    }  # fmt: skip
    weight, bias = linear_of(probe)
    weights = {"head.weight": weight.contiguous(), "head.bias": bias} | {
        f"patch.{i}.{name}": value.contiguous()
        for i, patch in enumerate(patches.values()) for name, value in patch.weights.items()
    }  # fmt: skip
    files = {
        SETTINGS: json.dumps(_settings(study, patches), indent=1, ensure_ascii=False).encode(),
        WEIGHTS: tensors_as_bytes(weights),
        LOADER: Path(loader.__file__).read_bytes(),
    }
    expected = logits_of(probe, study.ablated(chosen, of="test"))
    with tempfile.TemporaryDirectory() as trial:
        for name, content in files.items():
            write_atomic(Path(trial) / name, content)
        model = study.reader.model
        _require_same(loader.load(trial, model.hf, model.tokenizer), study, expected)
    for name, content in files.items():
        write_atomic(Path(folder) / name, content)
    return Path(folder)


def _settings(study: ShiftStudy, patches: dict[str, NeuronPatch]) -> dict[str, object]:
    reader, task = study.reader, study.task
    model, policy = reader.model, reader.policy
    text = task.train.texts[0]
    ids = model.tokens([text]).ids[0].tolist()
    own = list(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    return {
        "format": FORMAT,
        "what": f"{task.name}: the probe of {reader.probe_site} without the features that were judged spurious",
        "label_names": list(task.label_names),
        "model": {
            "name": model.name, "source": model.source, "dtype": str(model.dtype).removeprefix("torch."),
            "fingerprint": model.fingerprint, "checksum": checksum(model.hf),
        },
        "prefix_ids": ids[: len(ids) - len(own)],
        "tokens": {
            "special_ids": list(policy.special_ids),
            "max_norm": None if math.isinf(policy.max_norm) else policy.max_norm,
        },
        "probe": {"site": reader.probe_site, **_place(model.site_map[reader.probe_site])},
        "patches": [
            {"site": site, **_place(model.site_map[site]), "rule": patch.rule, "k": patch.k,
             "normalisation": patch.normalisation}
            for site, patch in patches.items()
        ],
    }  # fmt: skip


def _place(point: Point) -> dict[str, object]:
    columns = point.columns
    if columns is not None or point.site.head is not None:
        assert point.width is not None
        every = torch.arange(point.width * (point.heads or 1) if point.site.head is not None else point.width)
        columns = every if columns is None else columns
        if point.site.head is not None:
            columns = every.view(point.heads or 1, -1)[point.site.head]
    if isinstance(columns, slice):
        columns = torch.arange(columns.start or 0, columns.stop, columns.step or 1)
    return {"module": point.path, "side": point.side, "columns": None if columns is None else columns.tolist()}


def _require_same(saved: Classifier, study: ShiftStudy, expected: Float[Tensor, "rows labels"]) -> None:
    rows = torch.linspace(0, len(expected) - 1, min(CHECKED_TEXTS, len(expected))).long().unique()
    texts = [study.test.texts[row] for row in rows.tolist()]
    found, wanted = saved.logits(texts), expected[rows]
    eps = max(torch.finfo(study.reader.model.dtype).eps / torch.finfo(torch.float32).eps, 1.0)
    allowed = min(ALLOWED * eps, 0.1) * float(wanted.abs().max().clamp_min(1.0))
    off = float((found - wanted).abs().max())
    best = wanted.topk(2, dim=1).values
    is_clear = best[:, 0] - best[:, 1] > 2 * allowed
    different = int(((found.argmax(1) != wanted.argmax(1)) & is_clear).sum())
    if not off <= allowed or different:
        raise EditError(
            f"save: the saved classifier, loaded by its own loader, differs on {counted(len(texts), 'test texts')} by "
            f"{rounding_error(off)} logits, where rounding explains {rounding_error(allowed)}; {different} of them get "
            "another label. Nothing was written. Does the SAE encode in its own way?"
        )


@checked
class ShiftClassifier(OneLine):
    """A repaired classifier that was saved; called with texts it gives a label for each."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the probabilities."""
        return self._classifier.label_names

    def __call__(self, texts: Sequence[str]) -> tuple[str, ...]:
        """The label of each text."""
        return self._classifier(_listed(texts))

    def probabilities(self, texts: Sequence[str]) -> Float[Tensor, "texts labels"]:
        """Probability of each label, a row per text."""
        return self._classifier.probabilities(_listed(texts))

    def _shown_line(self) -> str:
        settings = self._classifier.settings
        sites = first_few([patch["site"] for patch in settings["patches"]], 4) or "no site"
        return clipped(f"{first_few(self.label_names, 3)} by {settings['model']['name']}, patched at {sites}", 220)


def _listed(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not len(texts):
        raise InvalidInputError(f"classifier({texts!r}): give a list of one text or more.")
    return list(texts)


@checked
def load_classifier(folder: str | Path, model: Model | None = None) -> ShiftClassifier:
    """A repaired classifier that `ShiftReport.save` wrote.

    It needs no SAE. Without this package, `classifier.py` in the folder does the same with a model of transformers.

    Args:
        folder: what was saved.
        model: the model that it was made for; by default it is loaded from where it came from.

    Raises:
        MissingFileError: if there is no such folder, or a file is missing.
        CorruptFileError: if it holds something else.
        MismatchError: if the model is another one, or was made in memory and is not given.
    """
    missing = [name for name in (SETTINGS, WEIGHTS) if not (Path(folder) / name).is_file()]
    if missing:
        raise MissingFileError(f"load_classifier({str(folder)!r}): there is no {missing[0]}. Name a saved folder.")
    try:
        settings, weights = loader.read(folder)
    except ValueError as error:
        raise CorruptFileError(f"load_classifier({str(folder)!r}): {error}") from None
    about = settings["model"]
    if model is None:
        if about.get("source") is None:
            raise MismatchError(
                f"load_classifier({str(folder)!r}): it was made for {about['name']}, which was made in memory. Give "
                "it: load_classifier(folder, model)."
            )
        model = load_model(about["source"], dtype=about["dtype"])
    if model.fingerprint != about["fingerprint"]:
        raise MismatchError(
            f"load_classifier: it was made for the model {about['name']} ({about['fingerprint']}), and {model.name} is "
            f"{model.fingerprint}. Give that model."
        )
    return ShiftClassifier(Classifier(model.hf, model.tokenizer, settings, weights))
