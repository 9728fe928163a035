"""Steering a model to refuse, and what that costs."""
