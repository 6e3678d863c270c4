"""Exercises of notebook 08."""

from __future__ import annotations

from .checking import Exercise

EXERCISES: tuple[Exercise, ...] = ()
