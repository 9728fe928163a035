"""Erasers and transports of a labelled concept, fitted on streaming covariances: LEACE, INLP, MiMiC, MiMiC+."""
