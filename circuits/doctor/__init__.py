"""Whether an attribution says what it seems to say: eleven checks, and a verdict that travels with it."""
