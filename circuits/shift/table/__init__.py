"""Methods that a SHIFT study compares itself with, one file per kind; each registers what it has."""
