"""Edits of many strengths on many prompts, with every measure and control."""
