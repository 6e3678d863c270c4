"""Pairs of student and teacher: loading, the vocabulary they share, log-probabilities, adapters."""
