"""The bases that have a name; every module of this package is one, found by `workbench.bases.registry`."""
