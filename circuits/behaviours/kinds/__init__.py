"""One file per behaviour; each registers itself when it is imported."""
