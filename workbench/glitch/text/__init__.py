"""Glitch tokens in texts: lint, sanitize, ban lists, adversarial tokenization."""
