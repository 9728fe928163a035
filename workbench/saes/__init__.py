"""Sparse autoencoders: training, saving in the format of sae_lens, evaluation."""
