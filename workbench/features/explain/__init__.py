"""Explanations of features and what they are worth on unseen documents."""
