"""Neutral openings: they leave open what comes next, so that the model or the steering decides it."""

from __future__ import annotations

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
