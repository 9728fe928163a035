"""The tables of the field in one call each, every one beside its control: patching, lens, attribution, head scores."""
