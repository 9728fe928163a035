"""What each token id is, and how its text is written with other tokens."""
