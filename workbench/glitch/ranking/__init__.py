"""How suspicious each token is, from the weights alone."""
