"""Edits, the tokens they touch, and the plans that prove that they happened."""
