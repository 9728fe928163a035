"""SHIFT: the task, the evidence, the methods, the study and its report."""
