"""Exercises of notebook 06."""

from __future__ import annotations

from .checking import Exercise

EXERCISES: tuple[Exercise, ...] = ()
