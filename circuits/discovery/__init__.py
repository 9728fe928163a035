"""Behaviours that nobody named: samples of confident predictions, to be clustered by what they rest on."""
