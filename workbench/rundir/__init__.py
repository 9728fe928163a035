"""What `workbench.runs` is made of: environment, lock, list and mirror of run folders."""
