"""The model: loading, self-check, tokens, reads, edits, generation."""
