"""Circuits as graphs: their nodes, on disk, for other tools, as a page."""
