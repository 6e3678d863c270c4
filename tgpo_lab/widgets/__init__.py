"""Widgets for notebooks: the guidance explorer, and small panels that show one idea each."""

from .explorer import GuidanceExplorer

__all__ = ["GuidanceExplorer"]
