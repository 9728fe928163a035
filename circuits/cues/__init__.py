"""Cues that texts carry, such as their length, and tasks in which such a cue goes with the label."""
