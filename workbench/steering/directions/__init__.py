"""Directions of a concept, from labelled texts, contrasts or training."""
