"""Lenses with a map per layer: fitted by regression, tuned, or the mean Jacobian; their controls, files and edits."""
