"""Draws the picture of the README: steering the embedded model towards space, beside its controls.

usage: python docs/picture.py    (a few minutes on 2 cores; writes docs/pictures/space.svg and prints the figures)
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import workbench as wb
from workbench.report.base import Section
from workbench.report.blocks import Lines, Series
from workbench.report.plots import standalone_svgs
from workbench.steering import Concept, ConceptReport, DirectionOptions, steer_concepts

PICTURE = Path(__file__).parent / "pictures" / "space.svg"
SPACE = (
    "The rocket flew to the moon.",
    "Astronauts orbit the planet.",
    "A telescope shows a distant galaxy.",
    "The spaceship landed on Mars.",
)
OTHERS = (
    "The bus went to the town.",
    "Workers walk round the park.",
    "A window shows a quiet street.",
    "The car stopped at home.",
)
WORDS = (
    " planet, planets, galaxy, galaxies, star, stars, moon, Mars, Earth, universe, cosmos, rocket, orbit, space, solar"
)
NAMES = {
    "difference of means": "direction from 4 + 4 sentences",
    "random directions of the same norm": "random direction, same norm",
}
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.6)


def main() -> None:
    """Runs the comparison, prints what it found, and draws the share of words about space by strength."""
    model = wb.load_model("embedded", dtype="float32")
    pieces = [model.tokenizer.encode(word, add_special_tokens=False) for word in WORDS.split(",")]
    concept = Concept("space", SPACE, OTHERS, tokens=tuple(piece[0] for piece in pieces if len(piece) == 1))
    chosen = DirectionOptions(methods=("difference of means",))
    report = steer_concepts(model, [concept], "resid_post.15", STRENGTHS, directions=chosen)
    for finding in report.findings():
        sys.stdout.write(f"{finding}\n")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg(curves(report)), encoding="utf-8")


def curves(report: ConceptReport) -> Lines:
    """The direction and its control, in percent of the tokens."""
    made = next(block for block in report.section().blocks if isinstance(block, Lines))
    shown = tuple(
        Series(
            NAMES[s.name], s.x, *(tuple(100 * value for value in part) for part in (s.y, s.low or s.y, s.high or s.y))
        )
        for s in made.series
        if s.name in NAMES
    )
    title = f"Words about space in what SmolLM2-135M writes ({report.n_evaluation} neutral prompts, 95 % intervals)"
    return replace(
        made, series=shown, title=title, y_label="% of tokens about space", x_label="norm added, of the mean norm"
    )


def svg(lines: Lines) -> str:
    """The picture as a file."""
    (picture,) = standalone_svgs(Section("Space", (lines,))).values()
    return picture + "\n"


if __name__ == "__main__":
    main()
