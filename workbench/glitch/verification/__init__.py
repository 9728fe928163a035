"""Whether a model can read and write a token, beside control tokens."""
