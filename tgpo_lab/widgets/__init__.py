"""Widgets for notebooks: the guidance explorer, and three small panels that show one idea each."""

from .explorer import GuidanceExplorer
from .kl_panel import kl_panel
from .schedule_panel import schedule_panel
from .softmax_panel import softmax_panel

__all__ = ["GuidanceExplorer", "kl_panel", "schedule_panel", "softmax_panel"]
