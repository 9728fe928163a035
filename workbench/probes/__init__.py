"""Linear probes on pooled activations."""
