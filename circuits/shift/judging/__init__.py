"""Judges of SHIFT: who calls a feature spurious, from what, and the file in which verdicts are kept."""
