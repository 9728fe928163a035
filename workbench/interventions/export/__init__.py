"""Interventions as files that other programs run: exact, or refused with the reason."""
