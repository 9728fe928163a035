"""Input score, output score, logit lens, and the table that holds them."""
