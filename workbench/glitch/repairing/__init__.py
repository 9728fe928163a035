"""New rows for glitch tokens, checked before and after."""
