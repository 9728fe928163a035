"""Neutral openings: they leave open what comes next, so that the model or the steering decides it."""

from __future__ import annotations

from workbench.core.errors import InvalidInputError

NEUTRAL_PROMPTS = (
    "The other day I read that",
    "One thing worth knowing is that",
    "She looked up and said",
    "In the end, we decided to",
    "My neighbour keeps telling me about",
    "The first thing you notice is",
    "After a while it turned out that",
    "If you ask me, the best part is",
    "He opened the letter, and it began with",
    "Most people here believe that",
    "Let me tell you about",
    "On the way home they talked about",
    "What surprised everyone was",
    "There is a simple reason for this:",
    "The page was blank except for the words",
    "Some time ago I started to",
    "It is often forgotten that",
    "The next morning there was",
    "A short note on the table said",
    "What I like most about it is",
    "They had been waiting for",
    "The answer, as it happens, is",
    "Nobody in the room expected",
    "I was asked to write about",
)


def neutral_prompts(n: int) -> tuple[str, ...]:
    """The first n of them.

    Raises:
        InvalidInputError: if there are not so many.
    """
    if not 1 <= n <= len(NEUTRAL_PROMPTS):
        raise InvalidInputError(
            f"n_prompts={n}: there are 1 to {len(NEUTRAL_PROMPTS)} neutral prompts. Or give your own."
        )
    return NEUTRAL_PROMPTS[:n]


PLAIN_TEXTS = (
    "The ferry leaves the harbour twice a day, once before breakfast and once in the late afternoon. Most of the "
    "passengers know each other by name, and the crew knows who will want help with a bicycle or a heavy bag.",
    "To repair a dripping tap, first close the valve under the sink and open the tap until no water comes. Unscrew the "
    "handle, lift out the old washer, and press a new one of the same size into its place.",
    "A small committee met in March to decide where the new library should stand. Three sites were considered, and "
    "each had its friends; in the end the old market hall was chosen, because two bus lines already stop there.",
    "Bread rises because yeast feeds on the sugars in the flour and gives off gas, which the dough holds in many small "
    "bubbles. In a cold kitchen this takes longer, but slow dough often tastes better than dough that was hurried.",
)
"""Ordinary prose on nothing in particular, on which the harm of an edit is measured."""

INSTRUCTION = "The following text uses these words again and again: {words}.\n\n"
"""What stands before a prompt when words alone are to do what steering does."""
