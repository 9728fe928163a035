"""What a judge is asked about a steered text, and known texts with which it shows that it can judge."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from workbench.core.arguments import checked
from workbench.core.errors import InvalidInputError
from workbench.core.records import from_jsonable, load_json
from workbench.judges.protocol import Question

MAX_RATING = 2
KINDS = ("concept", "instruction", "fluency")
SLOTS = {"concept": ("concept", "text"), "instruction": ("instruction", "text"), "fluency": ("text",)}
_SCALE = "Reply with the number alone.\nRating:"
TEMPLATES: Mapping[str, str] = {
    "concept": "Below is a text, and a theme. How much of the theme is in the text?\n\nTheme: {concept}\n\n"
    "Text:\n{text}\n\n0: nothing of it. 1: it is touched on, or forced in. 2: the text is clearly about it. " + _SCALE,
    "instruction": "Below is a request, and a text that was written for it. Does the text do what was asked, whatever "
    "else it talks about?\n\nRequest: {instruction}\n\nText:\n{text}\n\n"
    "0: it has nothing to do with the request. 1: it does so in part. 2: it does. " + _SCALE,
    "fluency": "Below is a text. Judge its language alone, not what it says.\n\nText:\n{text}\n\n"
    "0: it can't be read, or repeats itself over and over. 1: it has clear mistakes or odd repetitions. 2: it reads "
    "like the work of a careful writer. " + _SCALE,
}  # fmt: skip
"""What a judge is asked; the structure of AxBench's three prompts (Wu et al. 2025), the wording is ours."""

KNOWN = (
    ("bread and baking", "Tell me what you did this morning.",
     "This morning I mixed flour, water and yeast, let the dough rise near the stove, and baked two loaves of bread."),
    ("the sea", "Describe a place that you like.",
     "I like a small bay where the waves come in over flat rocks and fishing boats rest on the sand at low tide."),
    ("chess", "Explain how to begin a game.",
     "Begin by moving a pawn to the centre, bring out the knights and bishops, and castle before you attack the king."),
    ("gardening", "Give me advice for the spring.",
     "Loosen the soil in March, sow peas and lettuce in rows, and cover the young plants when the nights are cold."),
    ("the law", "What happens after an arrest?",
     "A judge hears the charge, the lawyer asks for bail, and the court sets a date on which the trial begins."),
    ("astronomy", "What can I see tonight?",
     "After dusk Jupiter stands in the south, and with a small telescope you can see four of its moons in a line."),
    ("money and banks", "How do I save for a house?",
     "Open a savings account, let the bank move a fixed sum into it each month, and compare the interest once a year."),
    ("music", "What should we do at the party?",
     "Let the band play two slow songs, then the singer can take the guitar and everybody joins in the chorus."),
    ("medicine", "My throat hurts. What should I do?",
     "Drink warm tea and rest; if the fever lasts for three days, see a doctor, who may prescribe an antibiotic."),
    ("trains", "How do I get to the next city?",
     "Take the express from platform four; the train leaves each hour, and the conductor sells tickets on board."),
    ("winter weather", "What was the weekend like?",
     "It snowed for two days, the roads were icy, and on Sunday a cold wind blew the clouds over the frozen lake."),
    ("computers", "Why is my machine so slow?",
     "Too many programs start with the system; close them, update the driver, and check whether the disk is full."),
)  # fmt: skip
"""Theme, request and a text that has both: with these a judge shows that it can tell right from wrong."""


@checked
def templates_from(path: str | Path) -> dict[str, str]:
    """Prompts from a JSON file: "concept", "instruction" and "fluency", each with the slots of `SLOTS` in braces.

    Raises:
        MissingFileError: if there is no such file.
        InvalidInputError: if one of the three or one of its slots is missing.
    """
    templates = from_jsonable(dict[str, str], load_json(Path(path)))
    for kind, slots in SLOTS.items():
        lacking = [slot for slot in slots if f"{{{slot}}}" not in templates.get(kind, "")]
        if lacking:
            raise InvalidInputError(
                f"{path}: the prompt {kind!r} lacks {', '.join(f'{{{slot}}}' for slot in lacking)}. Give "
                f"{', '.join(KINDS)}, each with its slots."
            )
    return {kind: templates[kind] for kind in KINDS}


@checked
def rating_prompts(
    concept: str, instruction: str, text: str, templates: Mapping[str, str] = TEMPLATES
) -> tuple[str, str, str]:
    """What a judge is asked about one text: concept, instruction, fluency.

    Slots are filled once, so braces in a text stay what they are.
    """
    values = {"concept": concept, "instruction": instruction, "text": text}
    fill = re.compile("|".join(rf"\{{{name}\}}" for name in values))
    made = (fill.sub(lambda found: values[found[0][1:-1]], templates[kind]) for kind in KINDS)
    concept_prompt, instruction_prompt, fluency_prompt = made
    return concept_prompt, instruction_prompt, fluency_prompt


def rating_questions(prompts: Iterable[tuple[str, str, str]]) -> list[Question]:
    """What a judge is asked with these prompts, which it may give reasons for first."""
    return [Question(text, MAX_RATING, reasons=True) for three in prompts for text in three]


def known_prompts(templates: Mapping[str, str], seed: int) -> list[tuple[str, str, str]]:
    """Prompts about known texts: with what belongs to them, then with what does not."""
    random = np.random.default_rng(seed)
    shifted = [KNOWN[(k + len(KNOWN) // 2) % len(KNOWN)] for k in range(len(KNOWN))]
    right = [rating_prompts(*known, templates) for known in KNOWN]
    mixed = [" ".join(random.permutation(text.split()).tolist()) for _, _, text in KNOWN]
    wrong = [
        (*rating_prompts(other[0], other[1], text, templates)[:2], rating_prompts(theme, request, words, templates)[2])
        for (theme, request, text), other, words in zip(KNOWN, shifted, mixed, strict=True)
    ]
    return [*right, *wrong]
