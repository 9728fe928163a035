"""SHIFT without a person and without attribute labels: is there evidence for a shortcut, and in which features?"""
