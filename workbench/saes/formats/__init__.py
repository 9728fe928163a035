"""SAEs of other projects: reading their files, bringing them into one form, making a sae_lens SAE of them."""
