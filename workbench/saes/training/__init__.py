"""Training SAEs and transcoders on stored activations."""
