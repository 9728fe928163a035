"""Labels and meanings of the scores on a feature's card."""

from __future__ import annotations

import re
from collections.abc import Container

NOT_MEASURED = "not measured"

MEANINGS = {
    "feature": "Number of the feature in the SAE.",
    "frequency": "Share of the tokens that were read on which the feature is active.",
    "max_act": "Largest activation among the tokens that were read.",
    "input_score": "Share of its strongest contexts whose peak token is also one that it promotes: 1 means that it "
    "writes what it reads.",
    "output_score": "How well steering with it writes the tokens that it promotes: (1 − rank / vocabulary) × "
    "probability of the likeliest of them in the steered run. From 0.01 on a feature is worth steering with "
    "(Arad et al. 2025).",
    "output_score_delta": "The output score minus the same score without steering: what the feature itself adds.",
    "confidence_delta": "How much steering with it changes the model's surprise at its own likeliest tokens, in nats: "
    "far from 0, either way, means that it changes what comes next.",
    "detection": "Balanced accuracy of the explanation at telling windows with the feature from windows without it, "
    "on documents that it was not made from; 0.5 is chance.",
    "hard detection": "The same with windows without the feature that are most like those which the explanation was "
    "made from; 0.5 is chance.",
    "fuzzing": "Balanced accuracy of the explanation at telling rightly from wrongly marked tokens, on documents that "
    "it was not made from; 0.5 is chance.",
    "precision": "Of the windows that the explanation picks, the share in which the feature is active.",
    "recall": "Of the windows in which the feature is active, the share that the explanation picks.",
    "f1": "Harmonic mean of precision and recall.",
    "auroc": "Chance that a right example is rated above a wrong one; 0.5 is chance.",
    "failed replies": "Share of the judge's replies that could not be read.",
}

LABELS = {
    "feature": "Feature",
    "frequency": "Frequency",
    "max_act": "Largest activation",
    "input_score": "Input score",
    "output_score": "Output score",
    "output_score_delta": "Output score gained",
    "confidence_delta": "Confidence change",
}

CONTROLS = {
    "": "another feature's explanation",
    "shuffled": "another feature's explanation",
    "empty": "no explanation",
    "top tokens": "list of its peak tokens",
}
"""What the explanation of a feature is compared with, by the name of the control."""

DETAILS = ("precision", "recall", "f1", "failed replies")
"""Scores that are shown on the card and can be searched, but have no column in the table."""

KINDS = {"activation": "same tokens (correlation)", "decoder": "like direction (cosine)"}


def meaning(name: str) -> str:
    """The meaning of a score, in one sentence.

    >>> meaning("no_such_score")
    'The meaning of this score is not recorded.'
    """
    return MEANINGS.get(name) or MEANINGS.get(last(name), "The meaning of this score is not recorded.")


def last(name: str) -> str:
    """The measure alone, without what it was measured on.

    >>> last("detection: auroc"), last("fuzzing")
    ('auroc', 'fuzzing')
    """
    return name.rpartition(": ")[2]


def split_control(key: str, scores: Container[str]) -> tuple[str, str]:
    """Name of the control and of the score, of a key such as "shuffled: detection"; no name for a bare score.

    >>> split_control("top tokens: detection: auroc", {"detection: auroc"}), split_control("fuzzing", {"fuzzing"})
    (('top tokens', 'detection: auroc'), ('', 'fuzzing'))
    """
    control, colon, score = key.partition(": ")
    return ("", key) if key in scores or not colon else (control, score)


def field(name: str) -> str:
    """The name by which a score is searched.

    >>> field("shuffled: detection: auroc"), field("max_act")
    ('shuffled_detection_auroc', 'max_act')
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "score"


def label(name: str) -> str:
    """A score's name for people.

    >>> label("detection: auroc"), label("max_act"), label("f1")
    ('Detection: AUROC', 'Largest activation', 'F1')
    """
    return LABELS.get(name, name.replace("_", " ").capitalize().replace("auroc", "AUROC"))
