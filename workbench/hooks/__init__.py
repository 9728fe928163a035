"""Reading and writing activations at named sites of an unmodified model."""
