"""Searches for glitch tokens side by side."""
