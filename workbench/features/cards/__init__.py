"""Feature cards: all that a pass over a store finds out about each feature."""
