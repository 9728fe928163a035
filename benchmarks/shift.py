"""The table of a SHIFT study, whose texts are read once however many methods it has, against one run per method.

usage: python benchmarks/shift.py [--model embedded] [--layer 11] [--rows 40] [--methods shared]

Both sides use the same functions: the straightforward one reads the texts, fits the probe and, where a method ablates
features, has them judged, for each method by itself. "shared" are the methods that only use these texts; "all" are
also those that run the model by themselves (texts without some words; effects and ablations of embeddings), which
costs the same on both sides and bounds the ratio. Predictions must be equal, draw by draw. The SAE has random features:
what is found means nothing, its cost is that of a trained one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Another file of this folder has the name of the package that is measured, which the root of the repository holds.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402

import circuits  # noqa: E402
from circuits.shift.asked import decider_of  # noqa: E402
from circuits.shift.choosing import methods_for  # noqa: E402
from circuits.shift.deciders import Decider  # noqa: E402
from circuits.shift.judgement import judge_features, judged  # noqa: E402
from circuits.shift.reading import ShiftOptions, read_study  # noqa: E402
from circuits.shift.task import Prediction, ShiftMethod, ShiftTask  # noqa: E402
from workbench.bases.base import Basis  # noqa: E402
from workbench.core.errors import DegenerateInputError  # noqa: E402
from workbench.models.loading import load_model  # noqa: E402
from workbench.models.model import Model  # noqa: E402

ABLATES = ("SHIFT", "random features", "skyline", "neurons", "embed")
"""How the names of methods begin that need judged features."""

RUNS_BY_ITSELF = ("embed", "length-matched", "gendered words", "concept bottleneck")
"""How the names of methods begin that run the model on other texts than those that all share."""

Bases = dict[str, Basis]


def predictions(
    model: Model, bases: Bases, task: ShiftTask, options: ShiftOptions, decider: Decider, methods: Sequence[ShiftMethod]
) -> dict[str, Prediction]:
    """What each method predicts, all from texts that are read once; without those that find nothing to compute."""
    study = read_study(model, bases, task, options, needs={need for method in methods for need in method.needs})
    if any(method.name.startswith(ABLATES) for method in methods):
        study = judged(study, judge_features(study, decider))
    made = {}
    for method in methods:
        try:
            made[method.name] = method.run(study)
        except DegenerateInputError as error:
            print(f"  {method.name}: {error}")
    return made


def differing(whole: dict[str, Prediction], alone: dict[str, Prediction]) -> list[str]:
    """Methods whose predictions are not the same on both sides."""
    if whole.keys() != alone.keys():
        return sorted(whole.keys() ^ alone.keys())
    return [
        name for name, one in whole.items()
        if len(one.draws) != len(alone[name].draws)
        or not all(torch.equal(a, b) for a, b in zip(one.draws, alone[name].draws, strict=True))
    ]  # fmt: skip


def compared(
    model: Model, bases: Bases, task: ShiftTask, options: ShiftOptions
) -> tuple[dict[str, Prediction], float, float]:
    """Predictions of all methods, the seconds of one run for all, and those of one run for each.

    Raises:
        SystemExit: if they do not predict the same.
    """
    decider = decider_of(None, task, options.seed)
    methods, _ = methods_for(task, decider, options)
    start = time.perf_counter()
    whole = predictions(model, bases, task, options, decider, methods)
    at_once = time.perf_counter() - start
    alone: dict[str, Prediction] = {}
    start = time.perf_counter()
    for method in methods:
        alone |= predictions(model, bases, task, options, decider, [method])
    if wrong := differing(whole, alone):
        raise SystemExit(f"not equal: {', '.join(wrong)}; no ratio is printed")
    return whole, at_once, time.perf_counter() - start


def named(task: ShiftTask, methods: Sequence[str]) -> str | tuple[str, ...]:
    """As `ShiftOptions` takes them."""
    if list(methods) != ["shared"]:
        return methods[0] if len(methods) == 1 and methods[0] in ("all", "standard") else tuple(methods)
    every, _ = methods_for(task, decider_of(None, task), ShiftOptions(methods="all"))
    return tuple(method.name for method in every if not method.name.startswith(RUNS_BY_ITSELF))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--methods", nargs="+", default=["shared"], help="shared, all, standard, or names")
    for name, default in (("layer", 11), ("rows", 40), ("d-sae", 4608), ("draws", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    model = load_model(o.model, check=False)
    site = str(model.resolve(f"resid_post.{o.layer}"))
    task = circuits.biographies(circuits.BiographyOptions(n_train=o.rows, n_test=o.rows))
    options = ShiftOptions(methods=named(task, o.methods), random_draws=o.draws)
    print(f"{model}, {torch.get_num_threads()} threads, {site}, {o.rows} rows of each set")
    whole, at_once, alone = compared(model, circuits.random(model, [site], o.d_sae, 32), task, options)
    print(f"{len(whole)} methods, equal predictions")
    print(f"one run for all   {at_once:8.1f} s")
    print(f"one run for each  {alone:8.1f} s")
    print(f"ratio             {alone / at_once:8.1f} x (target 5)")


if __name__ == "__main__":
    main()
