"""Run folders: environment, lock, list and mirror."""
