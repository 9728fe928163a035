"""How good an SAE is: reconstruction, splice, probes, absorption, known truth."""
