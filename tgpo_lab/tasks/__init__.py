"""Prompts and how they are put to a model; rewards that check its answers."""
