"""Linear heads on frozen features that resist a spurious attribute: one file per method, and what each may see."""
