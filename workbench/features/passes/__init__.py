"""One pass over a store: windows, contexts, counts."""
