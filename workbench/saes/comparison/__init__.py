"""Whether SAEs have the same features, and whether a corpus is what the model would write."""
