"""Feature cards: everything that a pass over a store says about each feature."""
