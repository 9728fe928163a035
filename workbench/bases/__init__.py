"""What one encodes and decodes activations with: SAEs, transcoders, neurons, heads, PCA, random directions."""
