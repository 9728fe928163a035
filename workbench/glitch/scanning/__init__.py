"""The scan of a model, what it found, and what changed between two scans."""
