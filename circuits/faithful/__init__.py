"""How much of a behaviour a circuit carries."""
