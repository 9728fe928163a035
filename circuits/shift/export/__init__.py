"""The repaired classifier of a SHIFT study as files, and the loader that needs neither the SAE nor this package."""
