"""Steered texts rated by a judge."""
