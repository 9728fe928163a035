"""How many glitch tokens a model has: census and sample."""
